"""The API over a real socket with services that live in memory, for tests of HTTP and of the command line. They can misbehave.

Run as a program it stands where `daemon.main` would: `api_server.py --home DIR` writes daemon.json and answers until it is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import json
import os
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aiohttp import web

from daemon.api.app import create_app
from daemon.api.limits import Limits
from daemon.api.server import open_api
from daemon.api.services import Services
from daemon.api.sessions import Sessions
from daemon.config import Config
from daemon.engine.interface import (
    Candidate,
    ChatRequest,
    CompletionRequest,
    Delta,
    EmbeddingRequest,
    Embeddings,
    Request,
    Served,
    ServeOptions,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from daemon.errors import Busy, ContextOverflow, InferenceError, NotFound, SwarmError, UsageError
from registry import refs, upstream
from registry.errors import Malformed, NotVerified, Repeated
from registry.records import Address, Announcement, GgufFacts, Identity, Model, Offer, Peer, Trust

TOKEN = "t" * 32
NODE = "ed25519:" + "ab" * 32
OTHER = "ed25519:" + "cd" * 32
RELAY = "ed25519:" + "1a2b3c4d" * 8
EXPIRES = 1_900_000_000
HEARD = 1_800_000_000.5
# What `status` says of the network of a node on loopback that knows nobody.
ALONE: dict[str, Any] = {
    "reachability": "unknown",
    "relays": [],
    "relaying": {"enabled": False, "nodes": 0, "streams": 0, "bytes": 0},
    "dht": {"bittorrent": 0, "ipfs": 0},
    "neighbours": 0,
    "nat": "unknown",
    "external": [],
    "clock": {"off": False, "why": None},
    "peer_api": {"port": 2, "open": False, "url": None},
    "swarm": {"name": "", "closed": False},
}
CID = "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi"
CID2 = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
MODEL = Model(
    identity=Identity(100, "1" * 64, "2" * 64, CID, "3" * 40, "4" * 64),
    name="tiny", facts=GgufFacts("llama"), added="2026-11-21T10:00:00Z", origin="published", signed_by=NODE,
)  # fmt: skip
FULL_CODE = "abc2def" + "a" * 45
EVIL_NAME = "evil\x1b[2J\u202egguf"


@dataclass
class FakeTransfer:
    id: str
    kind: str
    ref: str
    state: str = "resolving"
    name: str = ""
    size: int | None = 100
    received: int = 0
    sources: dict[str, int] = field(default_factory=lambda: {"ipfs": 0, "bittorrent": 0, "https": 0, "disk": 0})
    rate: float = 0.0
    peers: int = 0
    notes: list[str] = field(default_factory=list)
    error: SwarmError | None = None
    model: Model | None = None
    started: str = "2026-11-21T10:00:00Z"
    finished: str | None = None


class FakeLibrary:
    def __init__(self) -> None:
        self.held = [MODEL]

    def models(self) -> list[Model]:
        return list(self.held)

    def find(self, text: str) -> Model:
        try:
            ref = refs.parse_ref(text)
        except Malformed as error:
            raise UsageError(text, str(error), "use a code") from error
        for model in self.held:
            if isinstance(ref, refs.NameRef) and ref.name == model.name:
                return model
            if isinstance(ref, refs.CidRef) and ref.cid == model.identity.cid:
                return model
            if isinstance(ref, refs.CodeRef) and "ir" in ref.code:  # the base32 of 0x44..
                return model
        raise NotFound(text, "no such model here", "swarmctl ls")

    def path(self, model: Model) -> Path:
        return Path("/store") / model.identity.filename

    def trust(self, model: Model) -> Trust:
        return "trusted"

    def manifest_infohash(self, cid: str | None) -> str | None:
        return None if cid is None else "99" * 20

    async def remove(self, model: Model) -> None:
        self.held.remove(model)

    async def check(self, model: Model) -> Model:
        checked = replace(model, quarantined="its bytes changed on disk") if model.name == "rotten" else model
        self.held = [checked if held.identity == model.identity else held for held in self.held]
        return checked


class FakeTransfers:
    """A ref says how its pull goes: `slow` waits until it is cancelled, `broken` fails, `note` notes, anything else is done."""

    def __init__(self, home: Path | None) -> None:
        self.known: dict[str, FakeTransfer] = {}
        self.cancelled: list[str] = []
        self._home = home
        self._ended: dict[str, asyncio.Event] = {}

    def begin(self, kind: str, ref: str, name: str) -> FakeTransfer:
        transfer = FakeTransfer(f"{len(self.known):016x}", kind, ref, name=name)
        self.known[transfer.id] = transfer
        self._ended[transfer.id] = asyncio.Event()
        return transfer

    def pull(self, ref: str) -> FakeTransfer:
        if ref == "nonsense!":
            raise UsageError(ref, "not a reference", "use a code")
        return self.begin("pull", ref, ref)

    def publish(self, path: Path, *, name: str | None, license: str | None, source: str | None) -> FakeTransfer:
        return self.begin("publish", str(path), name or path.stem)

    def all(self) -> list[FakeTransfer]:
        return list(self.known.values())

    def get(self, transfer_id: str) -> FakeTransfer:
        if transfer_id not in self.known:
            raise NotFound(transfer_id, "no such transfer", "")
        return self.known[transfer_id]

    async def cancel(self, transfer_id: str) -> FakeTransfer:
        transfer = self.get(transfer_id)
        transfer.state = "cancelled"
        self.cancelled.append(transfer_id)
        if self._home is not None:
            (self._home / "cancelled").write_text(transfer_id)
        self._ended[transfer_id].set()
        return transfer

    async def watch(self, transfer_id: str) -> AsyncIterator[FakeTransfer]:
        transfer = self.get(transfer_id)
        yield transfer
        transfer.state, transfer.received, transfer.sources["ipfs"] = "fetching", 50, 50
        yield transfer
        if transfer.name == "slow":
            await self._ended[transfer_id].wait()
        elif transfer.name == "broken":
            transfer.state, transfer.error = "failed", UsageError("broken", "it is not a GGUF", "give another")
        else:
            if transfer.name == "note":
                transfer.notes.append("it is unsigned\x1b[2J")
            transfer.state, transfer.received, transfer.model = "done", 100, MODEL
            transfer.sources["bittorrent"] = 50
        yield transfer


class FakeServing:
    def __init__(self) -> None:
        self.running: dict[str, Served] = {}

    async def serve(self, model: Model, options: ServeOptions) -> Served:
        served = Served(options.context or 4096, options.slots or 4, 4, os.getpid())
        self.running[model.identity.blake3] = served
        return served

    async def stop(self, model: Model) -> bool:
        return self.running.pop(model.identity.blake3, None) is not None

    def served(self) -> dict[str, Served]:
        return self.running


@dataclass(frozen=True)
class FakeUpstream:
    offer: Offer
    slots: int

    @property
    def free_slots(self) -> int:
        return self.slots


class FakeUpstreams:
    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str | None]] = []
        self.running: list[FakeUpstream] = []

    async def serve(self, url: str, model: str, key: str | None, slots: int | None) -> FakeUpstream:
        self.asked.append((url, model, key))
        if model == "unlisted":
            raise NotFound(model, "the upstream does not list it", "choose one of its models")
        self.running.append(FakeUpstream(upstream.offer(NODE, model, slots or 4), slots or 4))
        return self.running[-1]

    async def stop(self, served: FakeUpstream) -> None:
        self.running.remove(served)

    def find(self, text: str) -> FakeUpstream | None:
        return next((one for one in self.running if text in (one.offer.name, one.offer.cid)), None)

    def served(self) -> list[FakeUpstream]:
        return self.running


class FakePeers:
    """One node that another carries for."""

    def __init__(self) -> None:
        at, there = "http://127.0.0.1:9", "http://127.0.0.1:10"
        point = f"{RELAY.removeprefix('ed25519:')}@{there}"
        self.rows = [
            Peer(OTHER, None, Address(OTHER, http=(at,), relays=(point,)), 1, EXPIRES),
            Peer(RELAY, None, Address(RELAY, http=(there,)), 1, EXPIRES, relay=True),
        ]
        self.reached = {OTHER: RELAY}

    def offers(self) -> list[Offer]:
        return [
            Offer(OTHER, CID, "3" * 40, "4" * 64, None, "tiny", 100, False, seeders=3, peers=1),
            Offer(OTHER, CID2, None, None, None, EVIL_NAME, 7, True, free_slots=1),
        ]

    def peers(self) -> list[Peer]:
        return list(self.rows)

    def peer(self, node: str) -> Peer | None:
        return next((row for row in self.rows if row.node == node), None)

    def heard(self, node: str) -> float | None:
        return HEARD if node == OTHER else None


class FakeGossip:
    async def join(self, address: Address) -> Peer:
        return Peer(address.node, None, address, 1, 1_900_000_000)

    async def receive(self, envelope: bytes) -> Announcement:
        document = json.loads(envelope)
        if error := {"malformed": Malformed, "forged": NotVerified, "again": Repeated}.get(document["node"]):
            raise error("it is not right")
        return Announcement(document["node"], None, 1, 1_900_000_000, Address(document["node"]), (), ())


@dataclass
class FakeAnswer:
    answered_by: str
    code: str
    name: str
    via: str | None
    deltas: AsyncIterator[Delta]


@dataclass
class FakeEmbedded:
    answered_by: str
    code: str
    name: str
    via: str | None
    embeddings: Embeddings


class FakeAnswers:
    """The last message, or the prompt, says how the answer goes; by default its words come back. With tools they are called."""

    def __init__(self, home: Path | None) -> None:
        self.requests: list[tuple[str | None, Request]] = []
        self.closed = asyncio.Event()
        self.gate = asyncio.Event()  # until it is set, "wait" does
        self._home = home

    async def open(self, model: str | None, request: Request, *, via: str = "auto") -> FakeAnswer:
        """Relayed by the node that `via` names; by none for auto and never."""
        if model == "nobody":
            raise NotFound("nobody", "nobody serves it", "swarmctl models")
        self.requests.append((model, request))
        prompt = _prompt(request)
        if prompt == "busy":
            raise Busy("tiny", "all slots are taken", "try again")
        if prompt == "too long":
            raise ContextOverflow("prompt", "it has 9 tokens, more than 8", "send less")
        relay = None if via in ("auto", "never") else via
        return FakeAnswer(OTHER, FULL_CODE, "tiny", relay, self._deltas(prompt, request))

    async def embed(self, model: str | None, request: EmbeddingRequest) -> FakeEmbedded:
        """The vector of an input is its length and 1, not of length 1."""
        vectors = tuple(struct.pack("<2f", len(one), 1) for one in request.inputs)
        found = Embeddings(vectors, sum(len(one) for one in request.inputs))
        return FakeEmbedded(OTHER, FULL_CODE, "tiny", None, found)

    async def _deltas(self, prompt: str, request: Request) -> AsyncIterator[Delta]:
        try:
            if prompt == "fail at once":
                raise UsageError("prompt", "it does not fit", "send less")
            if prompt == "bug":
                raise RuntimeError("secret of the bug")
            if prompt == "wait":
                await self.gate.wait()
            if isinstance(request, ChatRequest) and request.tools and request.tool_choice != "none":
                for delta in _calls(request):
                    yield delta
                return
            if prompt == "escape":
                yield Delta("a\x1b")
                yield Delta("]52;c;aGk=\x07\nb\u202ec")
            elif prompt == "for ever":
                while True:
                    yield Delta("more ")
                    await asyncio.sleep(0.01)
            elif prompt == "flood":
                while True:
                    yield Delta("x" * 60_000)
            else:
                for word in prompt.split(" "):
                    yield Delta(word + " ", logprobs=_logprobs(word + " ", request.sampling.logprobs))
            if prompt == "fail later":
                raise InferenceError("tiny", "llama.cpp failed", "ask again")
            if prompt != "cut off":
                yield Delta(finish="stop", usage=Usage(3, 5, 2))
        finally:
            if self._home is not None:
                (self._home / "answer-closed").touch()
            self.closed.set()


def _prompt(request: Request) -> str:
    if isinstance(request, CompletionRequest):
        return request.prompt if isinstance(request.prompt, str) else " ".join(map(str, request.prompt))
    prompt: str = request.messages[-1]["content"]
    if prompt == "history":
        return "|".join(f"{message['role']}:{message['content']}" for message in request.messages)
    return prompt


def _calls(request: ChatRequest) -> Iterator[Delta]:
    """Each tool is called, the arguments in pieces; the last message comes before, when it says so."""
    if _prompt(request).startswith("say"):
        yield Delta("I ask.")
    for index, tool in enumerate(request.tools):
        yield Delta(tool_calls=(ToolCallDelta(index, f"call_{index}", tool.name),))
        for piece in ('{"city": ', '"Ghent"}'):
            yield Delta(tool_calls=(ToolCallDelta(index, arguments=piece),))
    yield Delta(finish="tool_calls", usage=Usage(3, 5))


def _logprobs(text: str, count: int | None) -> tuple[TokenLogprob, ...]:
    """One token for each character; a character of several bytes is two tokens."""
    if count is None:
        return ()
    tokens = [piece for letter in text for piece in (letter.encode()[:1], letter.encode()[1:]) if piece]
    return tuple(TokenLogprob(Candidate(token, -0.5), (Candidate(token, -0.5), Candidate(b"?", -1.5))[:count]) for token in tokens)


@dataclass
class FakeKey:
    key: str
    state: str
    name: str


class FakeTrust:
    def __init__(self) -> None:
        self.rows: dict[str, FakeKey] = {}

    def entries(self) -> list[FakeKey]:
        return list(self.rows.values())

    async def set(self, key: str, state: str, name: str = "") -> FakeKey:
        self.rows[key] = FakeKey(key, state, name)
        return self.rows[key]

    async def remove(self, key: str) -> FakeKey:
        if key not in self.rows:
            raise NotFound("key", "it is not known", "swarmctl trust list")
        return self.rows.pop(key)


class World:
    """All services, and the address at which they are served."""

    def __init__(self, home: Path | None = None) -> None:
        self.library, self.serving, self.peers = FakeLibrary(), FakeServing(), FakePeers()
        self.transfers, self.answers, self.trust = FakeTransfers(home), FakeAnswers(home), FakeTrust()
        self.upstreams = FakeUpstreams()
        self.sessions = Sessions(1800, lambda: time.time() + self.passed)
        self.passed = 0.0  # seconds by which time has moved on for sessions
        self.stopped = asyncio.Event()
        self.url = ""
        self.config = Config(home=Path("/"), network="loopback")
        self.standing = copy.deepcopy(ALONE)

    def app(self, limits: Limits | None = None) -> web.Application:
        return create_app(self.services(), TOKEN, self.sessions, limits)

    async def status(self) -> dict[str, Any]:
        ipfs = {"enabled": False, "state": "off", "version": None, "pid": None, "peers": 0, "reason": None}
        dht = {"enabled": False, "nodes": 0, "state": "off"}
        bittorrent = {
            "enabled": True, "state": "ready", "port": 1, "torrents": 0, "peers": 0, "download_rate": 0, "upload_rate": 0, "dht": dht,
        }  # fmt: skip
        return {
            "state": "ready", "node": NODE, "peer_id": None, "addresses": ["swarmctl://" + "ab" * 32], "api": self.url,
            "network": "loopback",
            "version": "0.1.0", "pid": os.getpid(), "started": "2026-11-21T10:00:00Z", "home": "/", "ipfs": ipfs, "bittorrent": bittorrent,
            "models": 1, "engine": [], "serving": [], "transfers": 0, **self.standing,
        }  # fmt: skip

    def own_offers(self) -> list[Offer]:
        return [
            Offer(
                NODE, m.identity.cid, m.identity.infohash, m.identity.infohash_v2, m.manifest, m.name, m.identity.size,
                m.identity.blake3 in self.serving.served(), seeders=1,
            )
            for m in self.library.models()
        ] + [one.offer for one in self.upstreams.running]  # fmt: skip

    def services(self) -> Services:
        return Services(
            config=self.config, reached_via=self.peers.reached.get,
            library=self.library, pull=self.transfers.pull, publish=self.transfers.publish, transfers=self.transfers, serving=self.serving,
            upstreams=self.upstreams, peers=self.peers, own_offers=self.own_offers,
            gossip=FakeGossip(), answers=self.answers, trust=self.trust, status=self.status, stop=self.stopped.set,
        )  # fmt: skip


@contextlib.asynccontextmanager
async def running(world: World, limits: Limits | None = None) -> AsyncIterator[str]:
    """The URL of the API while the context lasts."""
    async with open_api(world.app(limits), "127.0.0.1", 0, last_answers_s=1) as port:
        world.url = f"http://127.0.0.1:{port}"
        yield world.url


async def serve(home: Path, flags: list[str]) -> None:
    """As `daemon.main` does it: token, daemon.json, and gone when asked."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "flags.json").write_text(json.dumps(flags))
    (home / "token").write_text(TOKEN + "\n")
    world = World(home)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, world.stopped.set)
    async with running(world) as url:
        (home / "daemon.json").write_text(json.dumps({"url": url, "pid": os.getpid(), "version": "0.1.0"}))
        await world.stopped.wait()
        (home / "daemon.json").unlink()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path)
    known, flags = parser.parse_known_args()
    if "--torrent-port" in flags:
        print("error: torrent.port: 6881 is in use; choose another with --torrent-port", file=sys.stderr)
        sys.exit(7)
    if "--crash" in flags:
        os.abort()
    asyncio.run(serve(known.home, flags))


if __name__ == "__main__":
    main()
