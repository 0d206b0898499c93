"""Serve, list and ask between real nodes: who answers, over what, and what happens when somebody goes away in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.functional.asking import ENDLESS, call, completion, ended, events, free_slots, is_served, listed, request, token, workers
from tests.functional.nodes import Node, nodes, until
from tests.unit.gguf_files import tiny_gguf

SLOTS = 2
SHORT = ("--max-tokens", "8")


@dataclass(frozen=True)
class Pair:
    """Two nodes that know each other; `a` has published the model that `code` means."""

    a: Node
    b: Node
    model: dict[str, Any]

    @property
    def code(self) -> str:
        return str(self.model["code"])

    def serve(self) -> None:
        """A serves the model, all slots are free, and B knows it. Serving what is served already changes nothing."""
        call(self.a, "POST", "/api/ai/serve", {"modelId": self.code, "slots": SLOTS, "contextSize": 2048, "keepAlive": -1})
        until(lambda: is_served(self.b, self.code) and free_slots(self.a) == SLOTS, "the model being served")


@contextmanager
def made_pair(folder: Path, kubo: Path, model: Path) -> Iterator[Pair]:
    with contextmanager(nodes)(folder, kubo) as node:
        a, b = node("a").up(), node("b").up()
        b.join(a)
        yield Pair(a, b, a.run("publish", str(model)))


@pytest.fixture(scope="module")
def one_pair(tmp_path_factory: pytest.TempPathFactory, kubo_binary: Path, model_file: Path) -> Iterator[Pair]:
    with made_pair(tmp_path_factory.mktemp("serving"), kubo_binary, model_file) as pair:
        yield pair


@pytest.fixture
def pair(one_pair: Pair) -> Pair:
    one_pair.serve()
    return one_pair


@pytest.fixture
def node(tmp_path: Path, kubo_binary: Path) -> Iterator[Callable[[str], Node]]:
    yield from nodes(tmp_path, kubo_binary)


def ask(at: Node, *words: str, prompt: str | None = None) -> tuple[str, str]:
    """What `ask` says on stdout and on stderr."""
    options: dict[str, Any] = {} if prompt is None else {"stdin": subprocess.PIPE}
    asking = at.start("ask", *words, *SHORT, **options)
    stdout, stderr = asking.communicate(prompt, timeout=60)
    assert asking.returncode == 0, stderr
    return stdout, stderr


# -- serve, list, ask ---------------------------------------------------------------------------------------------------


def test_a_model_that_is_served_is_listed_by_others_until_it_is_stopped(pair: Pair) -> None:
    model = {name: pair.model[name] for name in ("name", "size", "code", "cid", "infohash", "infohash_v2", "magnet", "manifest")}
    assert listed(pair.b, pair.code) == {**model, "serving": True, "nodes": 1, "seeders": 1, "peers": 0, "local": False, "upstream": False}
    (worker,) = workers(pair.a)
    assert pair.a.run("stop", pair.code)["serving"] is False
    assert ended(worker)
    until(lambda: not is_served(pair.b, pair.code), "the end of serving")
    known = listed(pair.b, pair.code)
    assert known is not None and known["nodes"] == 1  # it is still held, and can be pulled
    assert pair.b.fails("ask", "hello", pair.code).code == 5
    assert pair.b.fails("ask", "hello").code == 5
    for asker in (pair.a, pair.b):
        assert asker.fails("ask", "hello", "#aaaaaaa").code == 3


def engine(node: Node) -> list[dict[str, Any]]:
    """What `status` says of the models that are served or loaded."""
    found: list[dict[str, Any]] = call(node, "GET", "/api/status")["engine"]
    return found


@pytest.mark.parametrize("which", ["no code", "code", "name", "cid"])
def test_a_model_that_is_only_here_is_loaded_for_its_own_user_and_nobody_else(pair: Pair, which: str) -> None:
    pair.a.run("stop", pair.code)
    until(lambda: not is_served(pair.b, pair.code), "the end of serving")
    words = {"no code": (), "code": ("#" + pair.code,), "name": (pair.model["name"],), "cid": (pair.model["cid"],)}[which]
    assert pair.a.run("ask", "Hello!", *words, *SHORT)["answered_by"] == pair.a.status["node"]
    [loaded] = engine(pair.a)
    assert (loaded["code"], loaded["state"], len(workers(pair.a))) == (pair.code, "loaded", 1)
    assert loaded["memory"] > pair.model["size"] and loaded["tokens_per_second"] > 0 and loaded["expires"]
    assert pair.a.run("status")["serving"] == [] and not is_served(pair.a, pair.code)
    assert [model["id"] for model in call(pair.a, "GET", "/v1/models")["data"]] == [pair.code]
    assert pair.b.fails("ask", "Hello!", pair.code).code == 5


def test_a_model_of_a_blocked_publisher_is_not_loaded(pair: Pair) -> None:
    pair.a.run("stop", pair.code)
    key = pair.a.status["node"]
    pair.a.run("trust", "block", key)
    try:
        refused = pair.a.fails("ask", "Hello!", pair.code)
        assert refused.code == 8 and "blocked" in refused.error
        assert pair.a.fails("ask", "Hello!").code == 5  # and never chosen
        assert pair.a.fails("serve", pair.code).code == 8
        assert workers(pair.a) == []
    finally:
        pair.a.run("trust", "remove", key)


def test_an_idle_model_stays_served_and_is_loaded_by_the_next_question(pair: Pair) -> None:
    pair.a.run("serve", pair.code, "--keep-alive", "0.1s")
    until(lambda: workers(pair.a) == [], "the end of the worker")
    [idle] = engine(pair.a)
    assert (idle["state"], idle["pid"], idle["memory"], idle["expires"]) == ("idle", None, 0, None)
    assert (idle["slots"], idle["free_slots"], idle["context"]) == (SLOTS, SLOTS, 2048) and idle["tokens_per_second"] > 0
    assert is_served(pair.b, pair.code) and free_slots(pair.a) == SLOTS
    assert ask(pair.b, "Hello!")[0].strip()
    table = pair.a.start("status").communicate(timeout=60)[0]
    assert "tokens/s" in table and pair.model["name"] in table


def test_who_names_no_relay_of_the_serving_node_gets_no_answer(pair: Pair) -> None:
    a, b = (one.status["node"].removeprefix("ed25519:")[:8] for one in (pair.a, pair.b))
    assert pair.b.run("ask", "Hello!", pair.code, "--via", "never", *SHORT)["via"] is None
    refused = pair.b.fails("ask", "Hello!", pair.code, "--via", a)
    assert refused.code == 5 and f"node {a} does not carry for it" in refused.error
    refused = pair.a.fails("ask", "Hello!", pair.code, "--via", b)
    assert refused.code == 5 and "swarmctl peers" in refused.error
    assert pair.b.fails("ask", "Hello!", pair.code, "--via", b).code == 3  # it is not its own peer


def test_what_is_served_is_served_after_a_restart_until_it_is_stopped(node: Callable[[str], Node], model_file: Path) -> None:
    a = node("a").up("--ipfs-enabled", "false")
    code = a.run("publish", str(model_file))["code"]
    a.run("serve", code, "--slots", "3", "--context", "512", "--batch", "64", "--keep-alive", "always")
    [before] = engine(a)
    for end in (a.stop, a.kill):
        end()
        a.up("--ipfs-enabled", "false")
        assert a.run("status")["serving"] == [code] and workers(a) == []
        assert engine(a) == [{**before, "state": "idle", "pid": None, "memory": 0}]
    assert a.run("ask", "Hello!", *SHORT)["text"].strip()
    assert [(one["state"], one["slots"], one["context"], one["expires"]) for one in engine(a)] == [("loaded", 3, 512, None)]
    a.run("stop", code)
    a.stop()
    a.up("--ipfs-enabled", "false")
    assert a.run("status")["serving"] == [] and engine(a) == []


@pytest.mark.parametrize("which", ["no code", "code", "name", "cid"])
def test_another_node_answers(pair: Pair, which: str) -> None:
    words = {"no code": (), "code": ("#" + pair.code,), "name": (pair.model["name"],), "cid": (pair.model["cid"],)}[which]
    stdout, stderr = ask(pair.b, "Hello!", *words)
    assert stdout.strip()
    assert stderr == f"{pair.model['name']} (#{pair.code}) on node {pair.a.status['node'].removeprefix('ed25519:')[:8]}\n"


def test_an_answer_as_json(pair: Pair) -> None:
    answer = pair.b.run("ask", ENDLESS, "--temperature", "0", *SHORT)
    assert answer["answered_by"] == pair.a.status["node"] != pair.b.status["node"]
    assert (answer["code"], answer["name"], answer["finish_reason"]) == (pair.code, pair.model["name"], "length")
    assert answer["text"].strip()
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 8
    assert answer["ttft_ms"] > 0 and answer["tokens_per_second"] > 0


@pytest.mark.parametrize("words", [("-",), ()])
def test_a_prompt_from_standard_input(pair: Pair, words: tuple[str, ...]) -> None:
    as_argument, _ = ask(pair.b, "Name three colours.", "--temperature", "0")
    assert ask(pair.b, *words, "--temperature", "0", prompt="Name three colours.")[0] == as_argument


def test_of_two_that_serve_the_rule_chooses_and_without_ipfs_the_peer_api_is_the_way(node: Callable[[str], Node], model_file: Path) -> None:
    one, many, asker = (node(name).up("--ipfs-enabled", "false") for name in ("one", "many", "asker"))
    for server, slots in ((one, "1"), (many, "3")):
        code = server.run("publish", str(model_file))["code"]
        server.run("serve", code, "--slots", slots, "--context", "512")
        asker.join(server)
    until(lambda: (listed(asker, code) or {}).get("nodes") == 2, "both offers")
    # As many seeders, but more free slots.
    assert asker.run("ask", "Hello!", *SHORT)["answered_by"] == many.status["node"]
    many.run("stop", code)
    until(lambda: sum(len(peer["serving"]) for peer in call(asker, "GET", "/api/swarm/peers")) == 1, "the end of one offer")
    assert asker.run("ask", "Hello!", "#" + code, *SHORT)["answered_by"] == one.status["node"]


# -- going away in the middle -------------------------------------------------------------------------------------------


def begin(at: Node, code: str) -> subprocess.Popen[str]:
    """A question whose answer has begun and will go on for long."""
    asking = at.start("ask", ENDLESS, "#" + code, "--temperature", "0")
    assert asking.stdout is not None and asking.stdout.read(1)
    return asking


def test_ctrl_c_ends_the_answer_on_the_far_side(pair: Pair) -> None:
    asking = begin(pair.b, pair.code)
    assert free_slots(pair.a) == SLOTS - 1
    asking.send_signal(signal.SIGINT)
    _, stderr = asking.communicate(timeout=30)
    assert (asking.returncode, stderr.splitlines()[-1]) == (130, "error: swarmctl: interrupted")
    until(lambda: free_slots(pair.a) == SLOTS, "the end of the answer")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/swarm/relay/chat"])
def test_a_client_that_drops_its_stream_ends_the_answer_on_the_far_side(pair: Pair, path: str) -> None:
    asked = completion(pair.code)
    if path.startswith("/api"):
        asked["modelId"] = asked.pop("model")
    with request(pair.b, "POST", path, asked) as response:
        next(events(response))
        until(lambda: free_slots(pair.a) == SLOTS - 1, "the answer")
    until(lambda: free_slots(pair.a) == SLOTS, "the end of the answer")


def check_ends_in_error(asking: subprocess.Popen[str], stream: Iterator[Any]) -> None:
    """A cut answer never looks finished: not to a shell, and not to a client of the API."""
    _, stderr = asking.communicate(timeout=60)
    assert asking.returncode in (5, 7), stderr
    assert stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in stderr
    rest = list(stream)
    assert set(rest[-1]) == {"error"} and rest[-1]["error"]["message"]
    assert "[DONE]" not in rest
    assert all(choice["finish_reason"] is None for event in rest[:-1] for choice in event["choices"])


def test_a_worker_killed_in_the_middle(pair: Pair) -> None:
    with request(pair.a, "POST", "/v1/chat/completions", completion(pair.code)) as response:
        stream = events(response)
        next(stream)
        asking = begin(pair.b, pair.code)
        (worker,) = workers(pair.a)
        worker.kill()
        check_ends_in_error(asking, stream)
    assert pair.a.run("status")["serving"] == [pair.code]
    assert pair.a.run("ask", "Hello!", pair.code, *SHORT)["text"].strip()  # it waits for the next worker
    [again] = engine(pair.a)
    assert (again["state"], again["restarts"]) == ("loaded", 1) and "SIGKILL" in again["reason"]
    pair.serve()
    assert ask(pair.b, "Hello!")[0].strip()


def test_a_node_killed_in_the_middle(tmp_path: Path, kubo_binary: Path, model_file: Path) -> None:
    with made_pair(tmp_path, kubo_binary, model_file) as pair:
        pair.serve()
        children = psutil.Process(pair.a.status["pid"]).children(recursive=True)
        assert len(children) >= 2  # Kubo and the worker
        with request(pair.b, "POST", "/v1/chat/completions", completion(pair.code)) as response:
            stream = events(response)
            next(stream)
            asking = begin(pair.b, pair.code)
            pair.a.kill()
            check_ends_in_error(asking, stream)
        until(lambda: all(ended(child) for child in children), "the end of what A started")
        assert pair.b.fails("ask", "Hello!", pair.code).code == 5


def test_a_model_whose_bytes_changed_is_not_served(node: Callable[[str], Node], tmp_path: Path) -> None:
    a = node("a").up("--ipfs-enabled", "false")
    code = a.run("publish", str(tiny_gguf(tmp_path / "tiny.gguf", 1 << 20)))["code"]
    (blob,) = (a.home / "models").glob("*.gguf")
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(500_000)
        (byte,) = file.read(1)
        file.seek(500_000)
        file.write(bytes([byte ^ 1]))
    assert a.fails("serve", code).code == 8
    assert [model["state"] for model in a.run("ls")] == ["quarantined"]
    assert a.run("models") == []  # and it is not offered to anybody
    assert a.fails("serve", code).code == 8
    assert a.run("status")["serving"] == []


# -- the clients that people have ---------------------------------------------------------------------------------------


def test_the_official_openai_client(pair: Pair) -> None:
    base = pair.b.status["api"] + "/v1"
    hello: Any = {"messages": [{"role": "user", "content": ENDLESS}], "max_tokens": 8, "temperature": 0}
    with openai.OpenAI(base_url=base, api_key=token(pair.b), max_retries=0) as ai:
        assert [model.id for model in ai.models.list()] == [pair.code]
        assert ai.models.retrieve(pair.code).owned_by == "swarmctl"
        whole = ai.chat.completions.create(model=pair.code, **hello)
        assert (whole.model, whole.choices[0].finish_reason) == (pair.code, "length")
        assert whole.usage is not None and whole.usage.completion_tokens == 8
        assert (whole.model_extra or {})["answered_by"] == pair.a.status["node"]
        chunks = list(ai.chat.completions.create(model=pair.code, stream=True, stream_options={"include_usage": True}, **hello))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
        # The second time the prompt is in the KV cache.
        assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == whole.usage.total_tokens
        with pytest.raises(openai.NotFoundError):
            ai.chat.completions.create(model="gpt-4o", **hello)
        with pytest.raises(openai.NotFoundError):
            ai.models.retrieve("gpt-4o")
    with openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as ai, pytest.raises(openai.AuthenticationError):
        ai.models.list()


def test_env_gives_a_shell_what_a_client_needs(pair: Pair) -> None:
    variables = pair.b.run("env")
    assert set(variables) == {"OPENAI_BASE_URL", "OPENAI_API_KEY"}
    text, _ = pair.b.start("env").communicate(timeout=60)
    script = 'eval "$1"; printf "%s\\n%s" "$OPENAI_BASE_URL" "$OPENAI_API_KEY"'
    shell = subprocess.run(["sh", "-c", script, "sh", text], capture_output=True, text=True, check=True)
    base, key = shell.stdout.split("\n")
    assert {"OPENAI_BASE_URL": base, "OPENAI_API_KEY": key} == variables
    with openai.OpenAI(base_url=base, api_key=key) as ai:
        assert [model.id for model in ai.models.list()] == [pair.code]


def test_every_command_prints_one_document_with_the_fields_of_the_contract(pair: Pair) -> None:
    a, b = pair.a, pair.b
    model = {
        "name", "size", "code", "cid", "infohash", "infohash_v2", "magnet", "manifest", "blake3", "sha256", "path", "signed_by", "trust",
        "serving", "seeders", "peers", "local", "state",
    }  # fmt: skip
    assert model <= set(a.run("serve", pair.code, "--slots", str(SLOTS), "--context", "2048"))
    assert model <= set(a.run("ls")[0])
    assert {"name", "size", "code", "cid", "magnet", "serving", "nodes", "seeders", "peers", "local"} <= set(b.run("models")[0])
    (peer,) = b.run("peers")
    assert (peer["node"], peer["peer_id"], peer["serving"]) == (a.status["node"], a.status["peer_id"], [pair.code])
    assert peer["addresses"][0].startswith("swarmctl://")
    status = a.run("status")
    assert {"state", "node", "peer_id", "addresses", "api", "network", "ipfs", "bittorrent"} <= set(status)
    assert (status["state"], status["serving"]) == ("ready", [pair.code])
    assert a.run("key") == {"node": status["node"]}
    assert a.run("version") == {"version": status["version"]}
    assert b.run("trust", "add", status["node"], "--name", "a") == {"key": status["node"], "state": "trusted", "name": "a"}
    assert [entry["key"] for entry in b.run("trust", "list")] == [status["node"]]
    assert b.run("trust", "remove", status["node"])["key"] == status["node"]
    assert a.run("verify", pair.code)["verified"] is True
    assert model <= set(a.run("stop", pair.code))
    doctor = a.start("doctor", "--json")
    document = json.loads(doctor.communicate(timeout=60)[0])
    assert set(document) == {"ok", "checks"}
    assert (doctor.returncode == 0) == document["ok"]
