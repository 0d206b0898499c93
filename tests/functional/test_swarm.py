"""Nodes that find each other and answer for each other: real Kubo, real sockets, real ledgers; only the model is a script."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.engine.interface import (
    Candidate,
    ChatRequest,
    CompletionRequest,
    Delta,
    EmbeddingRequest,
    Embeddings,
    Request,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCallDelta,
)
from daemon.errors import Ambiguous, Busy, ContextOverflow, InferenceError, NotFound, Unavailable, Unserved, UsageError, VerificationError
from daemon.gossip import exchange
from daemon.membership import OpenSwarm
from daemon.peerapi.limits import Limits
from daemon.peerapi.ping import Ping
from daemon.peerapi.server import PeerApi
from daemon.peerchat import wire
from daemon.peerchat.provider import PeerProvider
from daemon.peerchat.seal import REQUEST_TYPE
from registry import announcement
from registry.cid import leaf_cid
from registry.codes import code_of_cid, short
from registry.envelope import key_name, sign
from registry.errors import Stale
from registry.records import Address, Announcement, Offer
from tests.functional.swarm_nodes import CID, Node, Script, swarm_node, text_of, until

QUESTION = ChatRequest(({"role": "user", "content": "a very private prompt"},))


# -- finding each other -------------------------------------------------------------------------------------------------


async def test_a_newcomer_lists_a_serving_model_over_pubsub_alone(tmp_path: Path, kubo_binary: Path) -> None:
    async with (
        swarm_node(tmp_path / "a", kubo=kubo_binary, direct=False) as a,
        swarm_node(tmp_path / "b", kubo=kubo_binary, direct=False) as b,
    ):
        a.serves(Script())
        address = a.gossip.pages.address()
        assert address.http == () and address.ipfs
        peer = await b.gossip.join(address)
        assert peer.node == a.key
        await until(lambda: b.sees(a, serving=True) and a.gossip.pubsub.neighbours != frozenset())
        # From now on only pubsub can tell.
        second = leaf_cid(b"another")
        a.serves(Script(), second, "another")
        await until(lambda: any(offer.cid == second for offer in b.table.offers()))


async def test_a_bare_multiaddr_is_enough(tmp_path: Path, kubo_binary: Path) -> None:
    async with (
        swarm_node(tmp_path / "a", kubo=kubo_binary, direct=False) as a,
        swarm_node(tmp_path / "b", kubo=kubo_binary, direct=False) as b,
    ):
        peer = await b.gossip.join(Address("", ipfs=a.gossip.pages.address().ipfs[:1]))
        assert peer.node == a.key


async def test_pubsub_comes_back_when_ipfs_does(tmp_path: Path, kubo_binary: Path) -> None:
    async with (
        swarm_node(tmp_path / "a", kubo=kubo_binary, direct=False) as a,
        swarm_node(tmp_path / "b", kubo=kubo_binary, direct=False) as b,
    ):
        await b.gossip.join(a.gossip.pages.address())
        assert b.kubo is not None and b.ipfs is not None
        await b.kubo.stop()
        await b.gossip.on_ipfs_gone()
        assert b.gossip.pages.address().ipfs == ()
        await b.kubo.start()
        await b.gossip.on_ipfs_ready(b.ipfs)
        a.serves(Script())
        await until(lambda: b.sees(a, serving=True))


async def test_without_ipfs_a_third_node_learns_of_everybody(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b") as b, swarm_node(tmp_path / "c") as c:
        await a.gossip.join(b.gossip.pages.address())
        await c.gossip.join(b.gossip.pages.address())
        a.serves(Script())
        await until(lambda: c.sees(a, serving=True) and b.sees(a, serving=True))
        # The other way round too: a learns of c, that it never joined.
        c.holds()
        await until(lambda: a.sees(c))


async def test_who_joined_hears_every_change_however_many_others_there_are(tmp_path: Path) -> None:
    """The others have left without a word: their peer APIs are closed, and what they announced has not expired yet."""
    async with swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b") as b:
        for number in range(100):
            key = Ed25519PrivateKey.generate()
            node = key_name(key)
            gone = Announcement(node, None, 1, int(time.time()) + 600, Address(node, http=(f"http://127.0.0.2:{1024 + number}",)), (), ())
            await a.gossip.receive(sign(announcement.PAYLOAD_TYPE, announcement.build(gone), key))
        await b.gossip.join(a.gossip.pages.address())
        for change in range(5):
            a.holds(cid=leaf_cid(bytes([change])))
            await until(lambda held=change + 1: len(b.table.offers()) == held)  # type: ignore[misc]  # bound now


async def test_a_node_without_ipfs_and_one_without_a_url_meet_through_a_third(tmp_path: Path, kubo_binary: Path) -> None:
    async with (
        swarm_node(tmp_path / "bridge", kubo=kubo_binary) as bridge,
        swarm_node(tmp_path / "web") as web,
        swarm_node(tmp_path / "p2p", kubo=kubo_binary, direct=False) as p2p,
    ):
        await p2p.gossip.join(replace(bridge.gossip.pages.address(), http=()))
        await web.gossip.join(bridge.gossip.pages.address())
        web.holds()
        p2p.holds()
        await until(lambda: p2p.sees(web) and web.sees(p2p))


async def test_joined_nodes_are_found_again_after_a_restart(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    async with swarm_node(tmp_path / "a") as a:
        async with swarm_node(tmp_path / "b", key=key) as b:
            await b.gossip.join(a.gossip.pages.address())
        async with swarm_node(tmp_path / "b", key=key) as b:
            a.serves(Script())
            await until(lambda: b.sees(a, serving=True))


async def test_a_node_of_the_settings_is_tried_until_it_is_there(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    async with AsyncExitStack() as stack:
        async with swarm_node(tmp_path / "a", key=key) as a:
            url, node = a.url, a.key
        b = await stack.enter_async_context(swarm_node(tmp_path / "b", join=(Address(node, http=(url,)),)))
        assert b.table.peer(node) is None
        await until(lambda: "rejoin" in b.supervisor.state())
        assert b.supervisor.state()["rejoin"].crashes == 0


async def test_joining_names_every_way_that_failed(tmp_path: Path, kubo_binary: Path) -> None:
    async with swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b", kubo=kubo_binary) as b:
        nowhere = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWGRUT6XrZnJkHKn8WZ4W8JAkNNgZcZbVMkQXmxfbSjUaD"
        with pytest.raises(Unserved, match="HTTP: nothing answers there; IPFS: "):
            await b.gossip.join(Address(a.key, ipfs=(nowhere,), http=("http://127.0.0.1:9",)))
        with pytest.raises(Unserved, match="IPFS is not running here"):
            await a.gossip.join(Address(b.key, ipfs=b.gossip.pages.address().ipfs))
        with pytest.raises(VerificationError, match="another node answers"):
            await b.gossip.join(Address("ed25519:" + "07" * 32, http=(a.url,)))
        with pytest.raises(UsageError, match="own"):
            await a.gossip.join(a.gossip.pages.address())


async def test_an_announcement_expires(tmp_path: Path) -> None:
    now = [time.time()]
    async with swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b", clock=lambda: now[0]) as b:
        a.serves(Script())
        await b.gossip.join(a.gossip.pages.address())
        await until(lambda: b.sees(a, serving=True))
        now[0] += 15 * 60
        assert not b.sees(a) and b.table.peers() == []
        assert b.table.peer(a.key) is not None


async def test_more_models_than_one_page_holds(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b") as b:
        for number in range(80):
            a.holds(leaf_cid(b"%d" % number), f"model {number}")
        await b.gossip.join(a.gossip.pages.address())
        await until(lambda: len(b.table.offers()) == 80)
        del a.held[5:]
        a.gossip.changed()
        await until(lambda: len(b.table.offers()) == 5)


async def test_pages_that_are_missing_are_asked_for(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b") as b:
        for number in range(30):
            a.holds(leaf_cid(b"%d" % number), f"model {number}")
        await b.gossip.receive((await a.gossip.pages.news(60, 1 << 52, ()))[0])
        assert b.table.behind()[a.key] and len(b.table.offers()) < 30
        await until(lambda: len(b.table.offers()) == 30 and not b.table.behind())


async def test_pages_of_a_node_that_cannot_be_reached_come_from_another(tmp_path: Path) -> None:
    async with (
        swarm_node(tmp_path / "a", direct=False) as a,
        swarm_node(tmp_path / "b") as b,
        swarm_node(tmp_path / "c") as c,
    ):
        a.holds()
        await b.gossip.join(c.gossip.pages.address())
        for envelope in await a.gossip.own_news(0, ()):
            await c.gossip.receive(envelope)
        await until(lambda: c.sees(a))
        await b.gossip.receive((await a.gossip.pages.news(60, 1 << 52, ()))[0])
        await until(lambda: b.sees(a))


async def test_questions_on_pubsub(tmp_path: Path, kubo_binary: Path) -> None:
    async with (
        swarm_node(tmp_path / "a", kubo=kubo_binary, direct=False, heartbeat_s=2.0) as a,
        swarm_node(tmp_path / "b", kubo=kubo_binary, direct=False) as b,
    ):
        a.holds()
        await b.gossip.join(a.gossip.pages.address())
        await until(lambda: b.sees(a) and a.gossip.pubsub.neighbours != frozenset())
        assert b.ipfs is not None
        topic = OpenSwarm().topic
        for forged in (b'{"want"', b'{"want":5}', b'{"want":{"x":[0]}}', b'{"want":{"' + b"f" * 16 + b'":[0]}}', b'{"want":{}}' * 9):
            await b.ipfs.publish(topic, forged)
        heard: list[int | None] = []

        async def listen() -> None:
            assert b.ipfs is not None
            async for message in b.ipfs.subscribe(topic):
                if not message.data.startswith(b'{"want"'):
                    heard.append(announcement.read(message.data).page)

        listening = asyncio.create_task(listen())
        await until(lambda: heard.count(None) > 1)
        heard.clear()
        await b.gossip.pubsub.ask({a.key: (0, 63)})
        await until(lambda: 0 in heard)
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening
        assert a.supervisor.state()["pubsub"].crashes == 0


async def test_a_silent_node_is_gone_within_40_s(tmp_path: Path) -> None:
    now = [time.time()]
    async with swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b", clock=lambda: now[0]) as b:
        a.serves(Script())
        await b.gossip.join(a.gossip.pages.address())
        await until(lambda: b.sees(a, serving=True))
        now[0] = time.time() + 25  # two beats were lost
        assert b.sees(a, serving=True)
        now[0] = time.time() + 40
        assert not b.sees(a) and b.table.peers() == []


async def test_a_blocked_node_is_not_heard(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b", standing=lambda key: "blocked") as b:
        with pytest.raises(Unserved, match="blocked"):
            await b.gossip.join(a.gossip.pages.address())


async def test_a_node_that_leaves_says_good_bye(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a") as a:
        async with swarm_node(tmp_path / "b") as b:
            await b.gossip.join(a.gossip.pages.address())
            b.serves(Script())
            await until(lambda: a.sees(b, serving=True))
        assert not a.sees(b)


async def test_replays_are_refused_also_after_a_restart(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    async with swarm_node(tmp_path / "a") as a:
        async with swarm_node(tmp_path / "b", key=key) as b:
            a.serves(Script())
            await b.gossip.join(a.gossip.pages.address())
            await until(lambda: b.sees(a, serving=True))
            recorded = b.table.news({}, {})[a.key][0]
        async with swarm_node(tmp_path / "b", key=key) as b:
            assert b.sees(a, serving=True)
            with pytest.raises(Stale):
                await b.gossip.receive(recorded)


async def test_our_sequence_grows_over_a_restart_with_the_clock_set_back(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    sequences = []
    for offset in (0.0, -86400.0):
        async with swarm_node(tmp_path / "a", key=key, clock=lambda offset=offset: time.time() + offset) as a:  # type: ignore[misc]  # bound now
            async with swarm_node(tmp_path / f"b{offset}", clock=lambda offset=offset: time.time() + offset) as b:  # type: ignore[misc]  # as above
                peer = await b.gossip.join(a.gossip.pages.address())
                sequences.append(peer.sequence)
    assert sequences[1] > sequences[0]


async def test_a_clock_that_is_off_by_a_day_is_named(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a", clock=lambda: time.time() + 86400) as a, swarm_node(tmp_path / "b") as b:
        with pytest.raises(Unserved, match="clock"):
            await b.gossip.join(a.gossip.pages.address())


# -- answering ----------------------------------------------------------------------------------------------------------


async def two(stack: AsyncExitStack, folder: Path, kubo: Path | None, script: Script, *, direct: bool = True) -> tuple[Node, Node]:
    """A node that serves, and one that knows it."""
    a = await stack.enter_async_context(swarm_node(folder / "a", kubo=kubo, direct=direct))
    b = await stack.enter_async_context(swarm_node(folder / "b", kubo=kubo, direct=direct))
    a.serves(script)
    await b.gossip.join(a.gossip.pages.address())
    await until(lambda: b.sees(a, serving=True))
    return a, b


async def test_the_answer_comes_over_a_libp2p_stream(tmp_path: Path, kubo_binary: Path) -> None:
    async with AsyncExitStack() as stack:
        script = Script(("the ", "answer ", "\N{SNOWMAN}"))
        a, b = await two(stack, tmp_path, kubo_binary, script, direct=False)
        question = replace(QUESTION, sampling=Sampling(max_tokens=7, seed=3, stop=("x",)))
        answer = await b.answers.open(None, question)
        deltas = [delta async for delta in answer.deltas]
        assert "".join(delta.text for delta in deltas) == "the answer \N{SNOWMAN}"
        assert deltas[-1].finish == "stop" and deltas[-1].usage is not None and deltas[-1].usage.completion_tokens == 3
        assert (answer.answered_by, answer.name) == (a.key, "a model")
        assert script.asked == [question]
        assert b.table.stats()[a.key].successes == 1


async def test_the_answer_comes_over_a_direct_address(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        _, b = await two(stack, tmp_path, None, Script())
        answer = await b.answers.open("a model", QUESTION)
        assert await text_of(answer.deltas) == "the answer"


@pytest.mark.parametrize("over_ipfs", [True, False])
async def test_leaving_an_answer_cancels_it_on_the_far_side(tmp_path: Path, kubo_binary: Path, over_ipfs: bool) -> None:
    async with AsyncExitStack() as stack:
        script = Script(hang_after=1)
        _, b = await two(stack, tmp_path, kubo_binary if over_ipfs else None, script, direct=not over_ipfs)
        answer = await b.answers.open(CID, QUESTION)
        assert (await anext(answer.deltas)).text == "the "
        assert not script.closed.is_set()
        await answer.deltas.aclose()
        async with asyncio.timeout(10):
            await script.closed.wait()


async def test_giving_up_before_the_first_word_cancels_it_on_the_far_side(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        script = Script(hang_after=0)
        _, b = await two(stack, tmp_path, None, script)
        asking = asyncio.create_task(b.answers.open(CID, QUESTION))
        await until(lambda: bool(script.asked))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(10):
            await script.closed.wait()


async def test_a_far_node_killed_in_the_middle_is_an_explicit_error(tmp_path: Path, kubo_binary: Path) -> None:
    async with AsyncExitStack() as stack:
        a, b = await two(stack, tmp_path, kubo_binary, Script(hang_after=1), direct=False)
        answer = await b.answers.open(CID, QUESTION)
        await anext(answer.deltas)
        assert a.kubo is not None and a.kubo.pid is not None
        os.kill(a.kubo.pid, signal.SIGKILL)
        with pytest.raises(InferenceError, match="in the middle"):
            await anext(answer.deltas)
        assert b.table.stats()[a.key].failures == 1


async def test_another_node_is_asked_when_the_first_cannot(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        c = await stack.enter_async_context(swarm_node(tmp_path / "c"))
        a, b = await two(stack, tmp_path, None, Script(fails=Busy("chat", "all slots are taken")))
        a.serves(Script(fails=Busy("chat", "all slots are taken")), seeders=9)
        c.serves(Script(("from c",)))
        await b.gossip.join(c.gossip.pages.address())
        await until(lambda: b.sees(c, serving=True) and any(offer.seeders == 9 for offer in b.table.offers()))
        answer = await b.answers.open(CID, QUESTION)
        assert answer.answered_by == c.key
        assert await text_of(answer.deltas) == "from c"
        assert b.table.stats()[a.key].failures == 1


async def test_a_peer_that_fails_in_the_middle_ends_in_its_error(tmp_path: Path) -> None:
    class Broken(Script):
        async def generate(self, request: Request) -> AsyncIterator[object]:  # type: ignore[override]  # only text matters
            async for delta in super().generate(request):
                yield delta
                raise RuntimeError("/secret/path")

    async with AsyncExitStack() as stack:
        _, b = await two(stack, tmp_path, None, Broken())
        answer = await b.answers.open(CID, QUESTION)
        await anext(answer.deltas)
        with pytest.raises(InferenceError) as caught:
            await anext(answer.deltas)
        assert "secret" not in str(caught.value)


async def test_this_node_is_a_candidate_too(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a") as a:
        a.serves(Script(("here",)))
        answer = await a.answers.open(None, QUESTION)
        assert answer.answered_by == a.key
        assert await text_of(answer.deltas) == "here"


async def test_unknown_ambiguous_and_unserved_are_told_apart(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        a, b = await two(stack, tmp_path, None, Script(fails=Busy("chat", "all slots are taken")))
        with pytest.raises(NotFound):
            await b.answers.open("aaaaaaa", QUESTION)
        with pytest.raises(Unserved, match="all slots are taken"):
            await b.answers.open(CID, QUESTION)
        other = leaf_cid(b"other")
        a.holds(other, "held only")
        await until(lambda: len(b.table.offers()) == 2)
        with pytest.raises(Unserved, match="nobody serves it now"):
            await b.answers.open("held only", QUESTION)
        a.serves(Script(), leaf_cid(b"third"), "held only")
        await until(lambda: len(b.table.offers()) == 3)
        with pytest.raises(Ambiguous):
            await b.answers.open("held only", QUESTION)
        with pytest.raises(UsageError):
            await b.answers.open("https://example.com/x.gguf", QUESTION)


async def test_completions_tools_and_logprobs_come_from_a_peer_as_they_are(tmp_path: Path, kubo_binary: Path) -> None:
    likely, unlikely = Candidate(b"\xe2\x98", -0.25), Candidate(b"no", -7.5)
    said = (
        Delta("\N{SNOWMAN}", logprobs=(TokenLogprob(likely, (likely, unlikely)),)),
        Delta(tool_calls=(ToolCallDelta(0, "call_1", "weather"),)),
        Delta(tool_calls=(ToolCallDelta(0, arguments='{"place":'), ToolCallDelta(1, "call_2", "time", "{}"))),
        # More than one frame holds.
        Delta("long " * 20_000, logprobs=(TokenLogprob(unlikely, (likely,) * 20),) * 100),
    )
    questions: tuple[Request, ...] = (
        CompletionRequest((1, 2, 3), Sampling(temperature=0, logit_bias={7: -100}, logprobs=2)),
        ChatRequest(QUESTION.messages, tools=(Tool("weather", "of a place"),), tool_choice="required", forced_tool="weather"),
        ChatRequest(QUESTION.messages, schema={"type": "object", "properties": {"z": {}, "a": {}}}),
    )
    async with AsyncExitStack() as stack:
        script = Script(said)
        _, b = await two(stack, tmp_path, kubo_binary, script, direct=False)
        for question in questions:
            deltas = [delta async for delta in (await b.answers.open(CID, question)).deltas]
            assert deltas[:3] == list(said[:3])
            assert "".join(delta.text for delta in deltas[3:]) == said[3].text
            assert [one for delta in deltas[3:] for one in delta.logprobs] == list(said[3].logprobs)
            assert deltas[-1].finish == "stop"
        assert script.asked == list(questions)


@pytest.mark.parametrize("over_ipfs", [True, False])
async def test_vectors_come_from_a_peer(tmp_path: Path, kubo_binary: Path, over_ipfs: bool) -> None:
    async with AsyncExitStack() as stack:
        script = Script()
        a, b = await two(stack, tmp_path, kubo_binary if over_ipfs else None, script, direct=not over_ipfs)
        question = EmbeddingRequest((*(f"text {number}" for number in range(500)), (1, 2)))
        embedded = await b.answers.embed("a model", question)
        assert (embedded.answered_by, embedded.name) == (a.key, "a model")
        assert [int.from_bytes(vector[:4], "little") for vector in embedded.embeddings.vectors] == list(range(501))
        assert {len(vector) for vector in embedded.embeddings.vectors} == {4096} and embedded.embeddings.prompt_tokens == 5
        assert script.asked == [question]
        assert b.table.stats()[a.key].successes == 1


async def test_a_question_is_read_beside_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a peer sends may take seconds to read, and nobody else waits for that."""
    threads = []

    def noted(question: bytes) -> tuple[str, Request | EmbeddingRequest]:
        threads.append(threading.get_ident())
        return parse_question(question)

    parse_question = wire.parse_question
    monkeypatch.setattr(wire, "parse_question", noted)
    async with AsyncExitStack() as stack:
        _, b = await two(stack, tmp_path, None, Script())
        answer = await b.answers.open(CID, CompletionRequest((1,) * 700_000))
        assert await text_of(answer.deltas) == "the answer"
    assert len(threads) == 1 and threads[0] != threading.get_ident()


async def test_another_node_makes_the_vectors_when_the_first_cannot(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        c = await stack.enter_async_context(swarm_node(tmp_path / "c"))
        a, b = await two(stack, tmp_path, None, Script())
        a.serves(Script(fails=InferenceError("worker", "it died")), seeders=9)
        c.serves(Script())
        await b.gossip.join(c.gossip.pages.address())
        await until(lambda: b.sees(c, serving=True) and any(offer.seeders == 9 for offer in b.table.offers()))
        assert (await b.answers.embed(CID, EmbeddingRequest(("x",)))).answered_by == c.key
        assert b.table.stats()[a.key].failures == 1


async def test_what_the_asker_must_change_arrives_as_that(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        a, b = await two(stack, tmp_path, None, Script(fails=ContextOverflow("chat", "it has 9000 tokens, the context 4096", "shorten it")))
        with pytest.raises(ContextOverflow, match="9000 tokens"):
            await b.answers.open(CID, QUESTION)
        with pytest.raises(ContextOverflow):
            await b.answers.embed(CID, EmbeddingRequest(("x",)))
        assert a.key not in b.table.stats()


async def test_a_peer_that_answers_another_question_is_not_believed(tmp_path: Path) -> None:
    class Confused(Script):
        async def embed(self, request: EmbeddingRequest) -> Embeddings:
            return Embeddings((b"\0" * 8,), 1)

    async with AsyncExitStack() as stack:
        _, b = await two(stack, tmp_path, None, Confused())
        with pytest.raises(Unserved, match="of another kind than the question"):
            await b.answers.embed(CID, EmbeddingRequest(("one", "two")))


async def test_nobody_at_all(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a") as a:
        with pytest.raises(Unserved, match="nobody serves any"):
            await a.answers.open(None, QUESTION)


# -- the peer API -----------------------------------------------------------------------------------------------------------


async def relayed(near: asyncio.StreamReader, far: asyncio.StreamWriter, seen: bytearray) -> None:
    while data := await near.read(65536):
        seen += data
        far.write(data)
        await far.drain()
    far.close()


async def test_what_lies_between_sees_nothing(tmp_path: Path) -> None:
    """A relay between the two nodes records every byte of both directions."""
    seen = bytearray()
    async with AsyncExitStack() as stack:
        a, b = await two(stack, tmp_path, None, Script(("a ", "confidential ", "reply")))
        host, port = "127.0.0.1", int(a.url.rpartition(":")[2])

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(host, port)
            await asyncio.gather(relayed(reader, far_writer, seen), relayed(far_reader, writer, seen))

        server = await asyncio.start_server(relay, host, 0)
        stack.push_async_callback(server.wait_closed)
        stack.callback(server.close)
        through = f"http://{host}:{server.sockets[0].getsockname()[1]}"
        peer = b.table.peer(a.key)
        assert peer is not None
        peer = replace(peer, address=Address(a.key, http=(through,)))
        provider = PeerProvider(peer, CID, ways=b.ways, http=b.http, clock=time.time)
        assert await text_of(provider.generate(QUESTION)) == "a confidential reply"
    assert b"/swarm/1/chat" in seen
    for word in (b"private", b"prompt", b"confidential", b"reply", CID.encode(), b"messages"):
        assert word not in seen


async def test_a_truncated_answer_is_not_an_answer(tmp_path: Path) -> None:
    """A relay that ends the HTTP body properly, but one frame too early."""

    async def cut(request: aiohttp.web.Request) -> aiohttp.web.Response:
        async with b.http.post(a.url + request.path, data=await request.read(), headers={"Content-Type": REQUEST_TYPE}) as answer:
            whole = await answer.read()
        return aiohttp.web.Response(body=whole[:-40], content_type=answer.content_type)

    async with AsyncExitStack() as stack:
        a, b = await two(stack, tmp_path, None, Script())
        app = aiohttp.web.Application()
        app.router.add_post("/swarm/1/chat", cut)
        app.router.add_route("GET", "/swarm/1/ping", Ping(a.key, OpenSwarm()).routes()[0].handle)
        runner = aiohttp.web.AppRunner(app)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
        peer = b.table.peer(a.key)
        assert peer is not None
        peer = replace(peer, address=Address(a.key, http=(f"http://127.0.0.1:{runner.addresses[0][1]}",)))
        deltas = PeerProvider(peer, CID, ways=b.ways, http=b.http, clock=time.time).generate(QUESTION)
        with pytest.raises(VerificationError, match="cut off"):
            await text_of(deltas)


async def test_a_silent_peer_is_given_up(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with AsyncExitStack() as stack:
        a, b = await two(stack, tmp_path, None, Script())
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        stack.push_async_callback(server.wait_closed)
        stack.callback(server.close)
        peer = b.table.peer(a.key)
        assert peer is not None
        peer = replace(peer, address=Address(a.key, http=(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",)))
        with pytest.raises(Unserved):
            provider = PeerProvider(peer, CID, ways=b.ways, http=b.http, clock=time.time, connect_s=0.3)
            await text_of(provider.generate(QUESTION))


async def test_the_peer_api_gives_objects_and_nothing_else(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a") as a:
        data = b"a manifest"
        a.objects[leaf_cid(data)] = data
        async with a.http.get(f"{a.url}/swarm/1/object/{leaf_cid(data)}") as response:
            assert (response.status, await response.read()) == (200, data)
        for path, status in {
            f"/swarm/1/object/{leaf_cid(b'unknown')}": 404,
            "/swarm/1/object/..%2f..%2fnode.key": 400,
            "/swarm/1/object/x": 400,
            "/api/status": 404,
            "/v1/models": 404,
            "/": 404,
            "/swarm/1/chat": 405,
        }.items():
            async with a.http.get(a.url + path) as response:
                body = await response.json()
                assert (response.status, set(body["error"])) == (status, {"code", "message", "hint"}), path
                assert "Server" not in response.headers
                assert str(tmp_path) not in json.dumps(body)


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("announce", {"Content-Type": "application/json"}, b"{", 400),
        ("announce", {"Content-Type": "application/json"}, b'{"envelopes":[1]}', 400),
        ("announce", {"Content-Type": "application/json"}, b" " * (256 << 10) + b" ", 413),
        ("announce", {"Content-Type": "text/plain"}, b'{"envelopes":[]}', 415),
        ("announce", {"Content-Type": "application/json", "Content-Encoding": "gzip"}, b"x", 415),
        ("announce", {"Content-Type": "application/json", "Origin": "https://evil.example"}, b'{"envelopes":[]}', 403),
        ("chat", {"Content-Type": REQUEST_TYPE}, b"x" * 500, 400),
        ("chat", {"Content-Type": REQUEST_TYPE}, b"x" * ((4 << 20) + 1), 413),
        ("chat", {"Content-Type": "application/json"}, b"{}", 415),
    ],
)
async def test_what_the_peer_api_refuses(tmp_path: Path, path: str, headers: dict[str, str], body: bytes, status: int) -> None:
    async with swarm_node(tmp_path / "a") as a:
        async with a.http.post(f"{a.url}/swarm/1/{path}", data=io.BytesIO(body), headers=headers) as response:
            assert response.status == status
        assert not any(loop.state == "crashed" for loop in a.supervisor.state().values())


async def test_in_a_large_swarm_a_newcomer_gets_first_what_it_looks_for(tmp_path: Path) -> None:
    limit = exchange.BODY_LIMIT
    async with swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b") as b:
        sought = leaf_cid(b"sought")
        others = [leaf_cid(b"%d" % number) for number in range(12)]
        for number in range(120):
            await a.gossip.receive(a_page(*(others if number % 24 else [sought, *others])))
        assert sum(len(words) for node in a.table.news({}, {}).values() for words in node) > 2 * limit
        address = a.gossip.pages.address()
        await b.gossip.meeting.meet(address, codes=(short(code_of_cid(sought)),))
        assert len(b.table.peers()) < 100
        assert len([offer for offer in b.table.offers() if offer.cid == sought]) == 5


def a_page(*cids: str) -> bytes:
    """The page of a node that exists only on it."""
    key = Ed25519PrivateKey.generate()
    node = key_name(key)
    now = time.time()
    offers = tuple(Offer(node, cid, "1" * 40, "2" * 64, cid, "n" * 90, 1000, True) for cid in cids)
    sequence = int(now * 1000)
    said = Announcement(node, None, sequence, int(now) + 60, Address(node), (), offers, 0, (sequence,))
    return sign(announcement.PAYLOAD_TYPE, announcement.build(said), key)


async def test_wrong_envelopes_are_left_out_and_the_others_taken(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b") as b:
        good = (await b.gossip.own_news(0, ()))[0]
        body = json.dumps({"envelopes": ["{}", good.decode().replace("payload", "payIoad"), good.decode(), good.decode()]})
        async with a.http.post(a.url + "/swarm/1/announce", data=body, headers={"Content-Type": "application/json"}) as response:
            assert response.status == 200
        assert [peer.node for peer in a.table.peers()] == [b.key]


async def test_floods_and_too_many_chats_are_answered_by_429(tmp_path: Path) -> None:
    limits = Limits(chats=1, announce_rate=0.001, announce_burst=3)
    async with AsyncExitStack() as stack:
        script = Script(hang_after=1)
        a = await stack.enter_async_context(swarm_node(tmp_path / "a", limits=limits))
        b = await stack.enter_async_context(swarm_node(tmp_path / "b"))
        a.serves(script)
        await b.gossip.join(a.gossip.pages.address())
        await until(lambda: b.sees(a, serving=True))
        answer = await b.answers.open(CID, QUESTION)
        await anext(answer.deltas)
        with pytest.raises(Unserved, match="as many chats as it takes"):
            await b.answers.open(CID, QUESTION)
        await answer.deltas.aclose()
        statuses = set()
        for _ in range(5):
            async with a.http.post(
                a.url + "/swarm/1/announce", data=b'{"envelopes":[]}', headers={"Content-Type": "application/json"}
            ) as response:
                statuses.add(response.status)
        assert 429 in statuses


async def test_a_body_that_never_ends_is_cut_off(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a", limits=Limits(body_s=0.2)) as a:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(a.url.rpartition(":")[2]))
        writer.write(b"POST /swarm/1/announce HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{")
        async with asyncio.timeout(10):
            assert b" 408 " in await reader.readline()
        writer.close()


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with PeerApi([], membership=OpenSwarm(), limits=Limits(header_s=0.2)).listening(["127.0.0.1"], 0) as ports:
        for port in (ports.direct, ports.streams):
            for begin in (b"", b"POST /swarm/1/announce HTTP/1.1\r\nHost: x\r\nX-Slow: "):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(begin)
                async with asyncio.timeout(10):
                    with contextlib.suppress(ConnectionResetError):
                        assert await reader.read() == b""
                writer.close()


async def test_one_source_has_a_ceiling_of_connections() -> None:
    limits = Limits(connections_per_source=2)
    membership = OpenSwarm()
    api = PeerApi(Ping("ed25519:me", membership).routes(), membership=membership, limits=limits)
    async with api.listening(["127.0.0.1"], 0) as ports:

        async def asks(line: bytes) -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection("127.0.0.1", ports.streams)
            writer.write(line + b"GET /swarm/1/ping HTTP/1.1\r\nHost: x\r\n\r\n")
            writers.append(writer)
            return reader

        writers: list[asyncio.StreamWriter] = []
        readers = [await asks(b"12D3KooWFirst\n") for _ in range(2)]
        assert [await reader.readline() for reader in readers] == [b"HTTP/1.1 200 OK\r\n"] * 2
        with contextlib.suppress(ConnectionResetError):
            assert await (await asks(b"12D3KooWFirst\n")).readline() == b""
        # Somebody else has places of its own, and one that is given back can be taken again.
        assert await (await asks(b"12D3KooWSecond\n")).readline() == b"HTTP/1.1 200 OK\r\n"
        writers[0].close()
        await writers[0].wait_closed()
        async with asyncio.timeout(10):
            while await (await asks(b"12D3KooWFirst\n")).readline() != b"HTTP/1.1 200 OK\r\n":
                await asyncio.sleep(0.02)
        for writer in writers:
            writer.close()


async def test_a_port_that_is_taken_is_an_error() -> None:
    async with PeerApi([], membership=OpenSwarm()).listening(["127.0.0.1"], 0) as ports:
        with pytest.raises(Unavailable, match=str(ports.direct)):
            async with PeerApi([], membership=OpenSwarm()).listening(["127.0.0.1"], ports.direct):
                pass


async def test_the_stream_protocol_reaches_the_peer_api_and_nothing_else(tmp_path: Path, kubo_binary: Path) -> None:
    async with AsyncExitStack() as stack:
        a, b = await two(stack, tmp_path, kubo_binary, Script(), direct=False)
        assert b.ipfs is not None and a.ipfs is not None
        async with b.ipfs.dial(OpenSwarm.protocol, (await a.ipfs.identity()).peer_id) as (host, port):
            async with b.http.get(f"http://{host}:{port}/api/status", headers={"Connection": "close"}) as response:
                assert response.status == 404
