"""Models behind OpenAI-compatible servers: another node, which is one, and one that does everything wrong."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from daemon.answering.upstreams import Upstreams
from daemon.engine.interface import ChatRequest, Delta, EmbeddingRequest, Sampling
from daemon.engine.upstream.provider import Limits, UpstreamProvider
from daemon.engine.upstream.reach import open_session
from daemon.errors import Busy, ContextOverflow, InferenceError, ModelLoadError, NotFound, SwarmError, Unserved, UsageError
from tests.functional.asking import call, completion, events, free_slots, listed, request, token
from tests.functional.nodes import Node
from tests.functional.nodes import until as until_
from tests.functional.swarm_nodes import swarm_node, until

KEY = "sk-never-to-be-seen"
QUESTION = ChatRequest(({"role": "user", "content": "a very private prompt"},))
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def chunk(text: str | None = None, finish: str | None = None) -> bytes:
    event = {"choices": [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


class Server:
    """An OpenAI-compatible server that answers as `handler` says, and notes what it was sent."""

    def __init__(self) -> None:
        self.url = ""
        self.handler: Handler = self.streams(chunk("hello"), chunk(" there"), chunk(None, "stop"), b"data: [DONE]\n\n")
        self.models: Handler = self.says(200, {"data": [{"id": "great-1"}, {"id": "small"}]})
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.gone = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers.get("Authorization"))
        self.paths.append(request.path)
        if request.method == "GET":
            return await self.models(request)
        self.asked.append(await request.json())
        try:
            return await self.handler(request)
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise

    def streams(self, *pieces: bytes, forever: bytes = b"", hang: bool = False, headers: dict[str, str] | None = None) -> Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **(headers or {})})
            await response.prepare(request)
            for piece in pieces:
                await response.write(piece)
            while forever:
                await response.write(forever)
            if hang:
                await asyncio.Event().wait()
            return response

        return handler

    @staticmethod
    def says(status: int, body: Any, headers: dict[str, str] | None = None) -> Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            if isinstance(body, str):
                return web.Response(status=status, text=body, content_type="text/html", headers=headers)
            return web.json_response(body, status=status, headers=headers)

        return handler


@asynccontextmanager
async def running() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        yield server
    finally:
        await runner.cleanup()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running() as made:
        yield made


QUICK = Limits(slots=2, connect_s=5, first_s=5, silence_s=0.2, whole_s=5, answer=4 << 20)


@asynccontextmanager
async def provider(server: Server, limits: Limits = QUICK) -> AsyncIterator[UpstreamProvider]:
    async with open_session(server.url, "loopback", with_key=True) as http:
        yield UpstreamProvider(server.url, "great-1", KEY, http, limits)


async def answer(server: Server, request: ChatRequest = QUESTION) -> list[Delta]:
    async with provider(server) as asked, aclosing(asked.generate(request)) as deltas:
        return [delta async for delta in deltas]


async def test_an_answer_comes_as_it_is_made(server: Server) -> None:
    found = await answer(server, ChatRequest(QUESTION.messages, Sampling(max_tokens=5, temperature=0)))
    assert "".join(delta.text for delta in found) == "hello there" and found[-1].finish == "stop"
    assert server.asked == [
        {"model": "great-1", "messages": list(QUESTION.messages), "stream": True, "stream_options": {"include_usage": True},
         "temperature": 0, "max_tokens": 5}
    ]  # fmt: skip
    assert server.keys == [f"Bearer {KEY}"] and server.paths == ["/v1/chat/completions"]


FAULTS: dict[str, tuple[Callable[[Server], Handler], type[SwarmError], str]] = {
    "cut": (lambda s: s.streams(chunk("hel")), InferenceError, "without saying how"),
    "done without an end": (lambda s: s.streams(chunk("hel"), b"data: [DONE]\n\n"), InferenceError, "without saying how"),
    "silent": (lambda s: s.streams(chunk("hel"), hang=True), InferenceError, "fell silent"),
    "endless line": (lambda s: s.streams(forever=b"x" * 65536), InferenceError, "too large"),
    "endless event": (lambda s: s.streams(forever=b"data: " + b"x" * 9999 + b"\n"), InferenceError, "too large"),
    "endless answer": (lambda s: s.streams(forever=chunk("x" * 4096)), InferenceError, "larger than any"),
    "endless comments": (lambda s: s.streams(forever=b": still here\n\n" * 1000), InferenceError, "larger than any"),
    "no JSON": (lambda s: s.streams(b"data: {]\n\n"), InferenceError, "strict JSON"),
    "another form": (lambda s: s.streams(b'data: {"choices":[7]}\n\n'), InferenceError, "not of the form"),
    "an error in the stream": (lambda s: s.streams(chunk("a"), b'data: {"error":{"message":"boom"}}\n\n'), InferenceError, "boom"),
    "withheld": (lambda s: s.streams(chunk("a"), chunk(None, "content_filter")), InferenceError, "content filter"),
    "HTML": (lambda s: s.says(200, "<h1>Welcome"), InferenceError, "no event stream"),
    "no stream": (lambda s: s.says(200, {"choices": []}), InferenceError, "no event stream"),
    "wrong key": (lambda s: s.says(401, {"error": {"message": f"Incorrect API key: {KEY}"}}), InferenceError, "refused the key"),
    "forbidden": (lambda s: s.says(403, "<h1>no"), InferenceError, "refused the key"),
    "no model": (lambda s: s.says(404, {"error": {"message": "no great-1", "code": "model_not_found"}}), ModelLoadError, "does not have"),
    "busy": (lambda s: s.says(429, {"error": {"message": "slow down"}}), Busy, "as many requests"),
    "refused": (lambda s: s.says(400, {"error": {"message": f"\x1b[2J top_k? {KEY}"}}), UsageError, "top_k"),
    "too long": (lambda s: s.says(400, {"error": {"message": "x", "code": "context_length_exceeded"}}), ContextOverflow, "more tokens"),
    "broken": (lambda s: s.says(500, {"error": {"message": "boom"}}), Unserved, "answered 500"),
    "redirect": (lambda s: s.says(307, "", {"Location": "http://127.0.0.1:9/v1/elsewhere"}), InferenceError, "redirects"),
    "compressed": (
        lambda s: s.streams(gzip.compress(chunk("x")), headers={"Content-Encoding": "gzip"}), InferenceError, "compresses",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
async def test_every_fault_is_a_typed_error(server: Server, fault: tuple[Callable[[Server], Handler], type[SwarmError], str]) -> None:
    make, kind, why = fault
    server.handler = make(server)
    with pytest.raises(SwarmError, match=why) as caught:
        await answer(server)
    assert type(caught.value) is kind
    assert KEY not in str(caught.value) and server.url not in str(caught.value) and str(caught.value).isprintable()
    assert len(server.paths) == 1


async def test_nobody_there() -> None:
    async with running() as server:
        pass
    with pytest.raises(Unserved, match="cannot be reached"):
        await answer(server)


async def test_figures_that_never_come_do_not_spoil_an_answer(server: Server) -> None:
    server.handler = server.streams(chunk("all of it"), chunk(None, "length"), hang=True)
    found = await answer(server)
    assert (found[0].text, found[-1].finish) == ("all of it", "length")


async def test_row_22_what_it_redirects_to_gets_neither_key_nor_prompt(server: Server) -> None:
    async with running() as other:
        server.handler = server.says(308, "", {"Location": other.url + "/chat/completions"})
        server.models = server.says(302, "", {"Location": other.url + "/models"})
        with pytest.raises(InferenceError, match="redirects"):
            await answer(server)
        async with provider(server) as asked:
            with pytest.raises(InferenceError, match="redirects"):
                await asked.models()
        assert other.paths == []


async def test_leaving_an_answer_ends_it_there(server: Server) -> None:
    server.handler = server.streams(chunk("x"), forever=chunk("x" * 64))
    async with provider(server) as asked:
        deltas = asked.generate(QUESTION)
        assert (await anext(deltas)).text == "x" and asked.free_slots == 1
        await deltas.aclose()
        assert asked.free_slots == 2
        async with asyncio.timeout(10):
            await server.gone.wait()


async def test_giving_up_before_the_first_word_ends_it_there(server: Server) -> None:
    server.handler = server.streams(hang=True)
    async with provider(server, Limits()) as asked:
        asking = asyncio.ensure_future(anext(asked.generate(QUESTION)))
        await until(lambda: bool(server.asked))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(10):
            await server.gone.wait()


async def test_no_more_requests_than_slots(server: Server) -> None:
    server.handler = server.streams(chunk("x"), hang=True)
    async with provider(server, Limits(slots=2)) as asked:
        first, second = asked.generate(QUESTION), asked.generate(QUESTION)
        for deltas in (first, second):
            await anext(deltas)
        with pytest.raises(Busy, match="2 requests"):
            await anext(asked.generate(QUESTION))
        with pytest.raises(Busy):
            await asked.embed(EmbeddingRequest(("x",)))
        await first.aclose()
        third = asked.generate(QUESTION)
        assert (await anext(third)).text == "x"
        await second.aclose()
        await third.aclose()


async def test_vectors(server: Server) -> None:
    server.handler = server.says(200, {"data": [{"index": i, "embedding": [0.0, 1.0]} for i in range(2)], "usage": {"prompt_tokens": 3}})
    async with provider(server) as asked:
        found = await asked.embed(EmbeddingRequest(("a", "b")))
        assert len(found.vectors) == 2 and found.prompt_tokens == 3
        with pytest.raises(InferenceError, match="not of the form"):
            await asked.embed(EmbeddingRequest(("a",)))
        server.handler = server.says(404, "404 page not found")
        assert "embeddings" in asked.capabilities
        for _ in range(2):
            with pytest.raises(UsageError, match="does not offer embeddings"):
                await asked.embed(EmbeddingRequest(("a",)))
        assert "embeddings" not in asked.capabilities and len(server.asked) == 3


async def test_a_server_that_knows_the_new_name_of_a_field_alone(server: Server) -> None:
    whole = server.handler

    async def modern(request: web.Request) -> web.StreamResponse:
        if "max_tokens" in server.asked[-1]:
            message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            return web.json_response({"error": {"message": message}}, status=400)
        return await whole(request)

    server.handler = modern
    async with provider(server) as asked:
        for _ in range(2):
            assert [d async for d in asked.generate(ChatRequest(QUESTION.messages, Sampling(max_tokens=5)))][-1].finish == "stop"
    assert [("max_tokens" in body, "max_completion_tokens" in body) for body in server.asked] == [
        (True, False),
        (False, True),
        (False, True),
    ]


async def test_row_21_a_name_is_judged_by_what_it_leads_to(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.url.removesuffix("/v1").rpartition(":")[2]
    url = f"http://upstream.example:{port}/v1"

    async def listed(*addresses: str) -> list[str] | None:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port))) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
        async with open_session(url, "loopback", with_key=True) as http:
            return await UpstreamProvider(url, "great-1", KEY, http, QUICK).models()

    assert await listed("127.0.0.1") == ["great-1", "small"]
    assert await listed("10.0.0.1", "127.0.0.1") == ["great-1", "small"]
    for address in ("10.0.0.1", "169.254.169.254", "0.0.0.0"):
        with pytest.raises(Unserved, match="may not be connected to"):
            await listed(address)
    with pytest.raises(UsageError, match="loopback"):
        open_session("http://10.0.0.1/v1", "loopback", with_key=False)


# -- what a node serves through them --------------------------------------------------------------------------------------


@asynccontextmanager
async def upstreams() -> AsyncIterator[tuple[Upstreams, list[None]]]:
    changes: list[None] = []
    made = Upstreams("ed25519:" + "ab" * 32, "loopback", lambda: changes.append(None))
    try:
        yield made, changes
    finally:
        await made.close()


async def test_serving_and_stopping(server: Server) -> None:
    async with upstreams() as (ours, changes):
        served = await ours.serve(server.url.removesuffix("/v1"), "great-1", KEY, 3)
        assert len(changes) == 1 and server.paths == ["/v1/models"]
        [offer] = ours.offers()
        assert (offer.name, offer.serving, offer.free_slots, offer.infohash) == ("great-1", True, 3, None)
        for text in ("great-1", "#" + served.code[:7], served.code, offer.cid, "ipfs://" + offer.cid):
            assert ours.find(text) is served
        assert ours.find("small") is None and ours.find("a/b?") is None
        assert KEY not in repr(served) + repr(ours.local_models())
        again = await ours.serve(server.url, "great-1", None, None)
        assert ours.served() == [again] and server.keys[-1] is None
        with pytest.raises(InferenceError, match="not served here any more"):
            await anext(served.provider.generate(QUESTION))
        await ours.stop(served)
        assert ours.served() == [again]
        await ours.stop(again)
        assert ours.offers() == []


async def test_stopping_breaks_off_what_is_under_way(server: Server) -> None:
    server.handler = server.streams(chunk("x"), hang=True)
    async with upstreams() as (ours, _):
        served = await ours.serve(server.url, "great-1", KEY, None)
        deltas = served.provider.generate(QUESTION)
        assert (await anext(deltas)).text == "x"
        rest = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        await ours.stop(served)
        async with asyncio.timeout(10):
            await server.gone.wait()
            with pytest.raises(InferenceError, match="not served here any more"):
                await rest
        with pytest.raises(InferenceError, match="not served here any more"):
            await anext(served.provider.generate(QUESTION))


async def test_what_is_not_listed_is_not_served(server: Server) -> None:
    async with upstreams() as (ours, changes):
        with pytest.raises(NotFound, match="does not list it, but great-1, small"):
            await ours.serve(server.url, "great-2", KEY, None)
        server.models = server.says(200, {"data": [{"id": f"m{number}"} for number in range(99)]})
        with pytest.raises(NotFound, match=r"m0, .*m9 and 89 more"):
            await ours.serve(server.url, "great-2", KEY, None)
        server.models = server.says(401, {"error": {"message": KEY}})
        with pytest.raises(InferenceError, match="refused the key"):
            await ours.serve(server.url, "great-1", KEY, None)
        server.models = server.says(200, "<h1>Welcome")
        with pytest.raises(InferenceError, match="cannot be read"):
            await ours.serve(server.url, "great-1", KEY, None)
        for url, key in (("http://8.8.8.8", None), ("http://u:p@127.0.0.1", None), ("127.0.0.1:80", None), (server.url, "a\r\nb: c")):
            with pytest.raises(UsageError):
                await ours.serve(url, "great-1", key, None)
        assert ours.served() == [] and changes == [] and server.asked == []
        server.models = server.says(404, "404 page not found")
        await ours.serve(server.url, "vendor/great-2", None, None)
        assert ours.find("vendor/great-2") is ours.find("vendor-great-2") is not None


async def test_two_nodes_with_the_same_upstream_model_back_each_other_up(server: Server, tmp_path: Path) -> None:
    async with running() as other, swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b") as b, swarm_node(tmp_path / "c") as c:
        async with upstreams() as (first, _), upstreams() as (second, _):
            for node, ours, theirs in ((a, first, server), (b, second, other)):
                served = await ours.serve(theirs.url, "great-1", KEY, None)
                node.serves(served.provider, served.offer.cid, "great-1", size=served.offer.size)
                await c.gossip.join(node.gossip.pages.address())
                await until(lambda node=node: c.sees(node, serving=True))  # type: ignore[misc]  # bound now
            server.handler = server.says(500, {"error": {"message": "boom"}})
            other.handler = other.streams(chunk("from the other"), chunk(None, "stop"))
            answers = [await c.answers.open("great-1", QUESTION) for _ in range(2)]
            for answer in answers:
                assert answer.answered_by == b.key
                assert "".join([delta.text async for delta in answer.deltas]) == "from the other"
            server.handler = other.handler = server.says(401, {"error": {"message": f"wrong key {KEY}"}})
            with pytest.raises(Unserved) as caught:
                await c.answers.open(served.code, QUESTION)
            assert KEY not in str(caught.value) and "key" not in str(caught.value) and server.url not in str(caught.value)


# -- another node as the upstream -----------------------------------------------------------------------------------------

ALONE = ("--ipfs-enabled", "false")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, kubo_binary: Path, model_file: Path) -> Iterator[tuple[Node, Node, Node, str]]:
    """`far` has the model, `near` serves it through far's own API, `asker` knows near alone."""
    folder = tmp_path_factory.mktemp("chain")
    far = Node(folder / "far", kubo_binary).up(*ALONE)
    near = asker = None
    try:
        code = far.run("publish", str(model_file))["code"]
        far.run("serve", code, "--context", "2048")
        key = {"FAR_KEY": token(far), "WRONG_KEY": "sk-wrong", "EMPTY_KEY": " "}
        near = Node(folder / "near", kubo_binary, key).up(*ALONE)
        asker = Node(folder / "asker", kubo_binary).up(*ALONE)
        asker.join(near)
        yield far, near, asker, code
    finally:
        for node in (far, near, asker):
            if node is not None:
                node.stop()


def test_another_node_is_an_upstream(chain: tuple[Node, Node, Node, str]) -> None:
    far, near, asker, code = chain
    url = far.status["api"]
    for words, exit_code, why in (
        (("--model", "nonsense"), 3, f"the upstream does not list it, but {code}"),
        (("--model", code, "--key-env", "WRONG_KEY"), 7, "it refused the key"),
        (("--model", code), 7, "it refused the key"),
        (("--model", code, "--key-env", "EMPTY_KEY"), 2, "EMPTY_KEY"),
        (("--model", code, "--key-env", "NO_KEY"), 2, "NO_KEY"),
        (("--key-env", "FAR_KEY"), 2, "--model"),
        (("--model", code, "--context", "512", "--key-env", "FAR_KEY"), 2, "`upstream` and `slots` alone"),
    ):
        key = () if "--key-env" in words or "nonsense" not in words else ("--key-env", "FAR_KEY")
        failed = near.fails("serve", "--upstream", url, *words, *key)
        assert failed.code == exit_code and why in failed.error, failed.stderr
    assert near.fails("serve").code == 2 and near.fails("serve", code, "--upstream", url, "--model", code).code == 2

    served = near.run("serve", "--upstream", url, "--model", code, "--key-env", "FAR_KEY", "--slots", "3")
    mine = served["code"]
    assert mine != code and (served["name"], served["slots"], served["upstream"], served["serving"]) == (code, 3, True, True)
    assert near.run("status")["serving"] == [mine]
    listed_ = until_(lambda: listed(asker, mine), "the announcement")
    assert (listed_["serving"], listed_["upstream"], listed_["local"], listed_["seeders"], listed_["infohash"]) == (
        True,
        True,
        False,
        0,
        None,
    )

    said = asker.run("ask", "What is the capital of France?", f"#{mine}", "--temperature", "0", "--max-tokens", "12")
    direct = far.run("ask", "What is the capital of France?", f"#{code}", "--temperature", "0", "--max-tokens", "12")
    assert (said["text"], said["finish_reason"]) == (direct["text"], direct["finish_reason"])
    assert said["usage"]["completion_tokens"] == direct["usage"]["completion_tokens"] > 0
    assert said["answered_by"] == near.status["node"] and direct["answered_by"] == far.status["node"]

    body = {"messages": [{"role": "user", "content": "Say hi."}], "temperature": 0, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    whole = [call(node, "POST", "/v1/chat/completions", {"model": model, **body}) for node, model in ((asker, mine), (far, code))]
    assert whole[0]["choices"][0]["message"]["content"] == whole[1]["choices"][0]["message"]["content"]
    tokens_ = [[one["token"] for one in answer["choices"][0]["logprobs"]["content"]] for answer in whole]
    assert tokens_[0] == tokens_[1] and len(tokens_[0]) == whole[0]["usage"]["completion_tokens"]
    texts = [
        call(node, "POST", "/v1/completions", {"model": model, "prompt": "One, two, three,", "temperature": 0, "max_tokens": 6})["choices"][
            0
        ]
        for node, model in ((asker, mine), (far, code))
    ]
    assert texts[0] == texts[1] and texts[0]["text"]
    vectors = [
        call(node, "POST", "/v1/embeddings", {"model": model, "input": ["a cat", "a kitten"], "encoding_format": "float"})["data"]
        for node, model in ((asker, mine), (far, code))
    ]
    for mine_, theirs in zip(*vectors, strict=True):
        assert mine_["index"] == theirs["index"] and len(mine_["embedding"]) == len(theirs["embedding"])
        assert all(abs(a - b) < 1e-3 for a, b in zip(mine_["embedding"], theirs["embedding"], strict=True))
    with request(
        asker, "POST", "/v1/chat/completions", {"model": mine, "messages": [{"role": "user", "content": "word " * 4000}]}
    ) as response:
        error = json.loads(response.read())["error"]
        assert (response.status, error["code"]) == (400, "context_length_exceeded")

    for node in (near, asker):
        for words in (("pull", f"#{mine}"), ("pull", served["cid"]), ("rm", mine)):
            if node is near or words[0] == "pull":
                failed = node.fails(*words)
                assert failed.code == 2 and ("there is no file" in failed.error), failed.error
    secret = token(far).encode()
    for path in near.home.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes(), path
    assert secret not in (near.home.parent / "near.log").read_bytes()

    assert near.run("stop", code)["serving"] is False
    assert near.run("status")["serving"] == []
    until_(lambda: listed(asker, mine) is None, "the withdrawal")


def test_leaving_an_answer_reaches_the_far_worker(chain: tuple[Node, Node, Node, str]) -> None:
    far, near, asker, code = chain
    mine = near.run("serve", "--upstream", far.status["api"], "--model", code, "--key-env", "FAR_KEY")["code"]
    until_(lambda: listed(asker, mine), "the announcement")
    before = free_slots(far)
    with request(asker, "POST", "/v1/chat/completions", completion(mine)) as response:
        next(events(response))
        assert free_slots(far) == before - 1
    until_(lambda: free_slots(far) == before, "the end of the far answer")
    far.stop()
    failed = asker.fails("ask", "hello", f"#{mine}")
    assert failed.code in (5, 7) and token(far) not in failed.stderr and far.status["api"] not in failed.stderr
    assert "Traceback" not in (near.home.parent / "near.log").read_text()
