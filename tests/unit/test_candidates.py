"""Who is asked, and how long each is waited for: no candidate that is gone holds a question up."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from daemon.answering import answers as under_test
from daemon.answering.answers import CANDIDATES_TRIED, QUICK_S, Answers
from daemon.answering.local import LocalModel
from daemon.engine.interface import ChatRequest, Delta, EmbeddingRequest, Embeddings, Request, Usage
from daemon.errors import Busy, ContextOverflow, InferenceError, ModelLoadError, SwarmError, Unreachable, Unserved, VerificationError
from daemon.peerapi.ways import CONNECT_S
from registry.cid import leaf_cid
from registry.records import Address, Offer, Peer

CHAT = ChatRequest(({"role": "user", "content": "hi"},))
CID = leaf_cid(b"x")
HERE = "here"
GONE = Unreachable("peer", "nothing answers there")
END = Delta("yes", finish="stop", usage=Usage(1, 1))


class World:
    """Nodes by name, best first, and what each does: None answers, "slow" answers whom it is given time, an error fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **nodes: SwarmError | str | None) -> None:
        self.nodes = nodes
        self.unknown: set[str] = set()  # that the table has dropped meanwhile
        self.asked: list[tuple[str, float]] = []
        self.recorded: list[tuple[str, bool]] = []
        self.held: SwarmError | str | None = "nothing is held"
        world = self

        class Asked(Fake):
            def __init__(self, peer: Peer, cid: str, *, connect_s: float, **options: Any) -> None:
                super().__init__(world, peer.node, connect_s, world.nodes[peer.node])

        monkeypatch.setattr(under_test, "PeerProvider", Asked)

    # The part of a `PeerTable` that answers look at.

    def offers(self) -> list[Offer]:
        best = len(self.nodes)
        return [
            Offer(name, CID, None, None, None, "tiny", 9, True, free_slots=1, seeders=best - place)
            for place, name in enumerate(self.nodes)
        ]

    def offers_about(self, wanted: str, local: Sequence[Offer]) -> list[Offer]:
        return self.offers()

    def stats(self) -> dict[str, Any]:
        return {}

    def peer(self, node: str) -> Peer | None:
        return None if node in self.unknown else Peer(node, None, Address(node), 1, 1)

    def record(self, node: str, latency: float | None, *, ok: bool) -> None:
        self.recorded.append((node, ok))

    def answers(self) -> Answers:
        nothing: Any = None
        table: Any = self
        local: list[LocalModel] = []
        if self.held != "nothing is held":
            offer = Offer(HERE, CID, None, None, None, "tiny", 9, False, seeders=1)
            provider: Any = Fake(self, HERE, 0, self.held)
            local.append(LocalModel(offer, provider))
        return Answers(
            table, lambda: local, lambda: [one.offer for one in local], ways=nothing, http=nothing, clock=lambda: 0.0, search=nothing
        )

    async def ask(self) -> str:
        """Who answered."""
        answer = await self.answers().open("tiny", CHAT)
        await answer.deltas.aclose()
        return answer.answered_by


class Fake:
    """A `Provider`."""

    relayed_by = None

    def __init__(self, world: World, node: str, connect_s: float, does: SwarmError | str | None) -> None:
        self._world = world
        self._node = node
        self._connect_s = connect_s
        self._does = does

    def _answer(self) -> None:
        self._world.asked.append((self._node, self._connect_s))
        if isinstance(self._does, SwarmError):
            raise self._does
        if self._does == "slow" and self._connect_s < CONNECT_S:
            raise GONE

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        self._answer()
        yield END

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        self._answer()
        return Embeddings((b"\0" * 4,), 1)


def quickly(*nodes: str) -> list[tuple[str, float]]:
    return [(node, QUICK_S) for node in nodes]


def patiently(*nodes: str) -> list[tuple[str, float]]:
    return [(node, CONNECT_S) for node in nodes]


async def test_one_that_is_gone_costs_a_second_and_the_next_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a=GONE, b=None, c=None)
    assert await world.ask() == "b"
    assert world.asked == quickly("a", "b")
    assert world.recorded == [("a", False)]
    assert QUICK_S <= 1.0


async def test_the_only_candidate_is_given_time_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a="slow")
    assert await world.ask() == "a"
    assert world.asked == patiently("a")


async def test_when_all_are_slow_they_are_asked_again_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a=GONE, b="slow", c="slow")
    assert await world.ask() == "b"
    assert world.asked == quickly("a", "b", "c") + patiently("a", "b")


@pytest.mark.parametrize(
    "error",
    [Busy("slots", "all are taken"), Unserved("peer", "it stopped"), VerificationError("answer", "forged"), InferenceError("m", "x")],
)
async def test_only_who_could_not_be_reached_is_asked_twice(monkeypatch: pytest.MonkeyPatch, error: SwarmError) -> None:
    """Who was asked has the prompt; it said no, and would again."""
    world = World(monkeypatch, a=error, b=GONE)
    with pytest.raises(Unserved) as raised:
        await world.ask()
    assert world.asked == quickly("a", "b") + patiently("b")
    # Each is named with its reason, once.
    assert raised.value.why == f"a: {error.why}; b: {GONE.why}"


async def test_what_is_held_here_is_loaded_only_after_all_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a=GONE, b=GONE)
    world.held = None
    assert await world.ask() == HERE
    assert world.asked == [*quickly("a", "b"), *patiently("a", "b"), (HERE, 0)]


async def test_what_is_held_here_does_not_make_the_only_server_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes longer than any connection."""
    world = World(monkeypatch, a="slow")
    world.held = None
    assert await world.ask() == "a"
    assert world.asked == patiently("a")


async def test_all_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a=GONE, b=Busy("slots", "all are taken"))
    world.held = ModelLoadError("tiny", "its file is gone")
    with pytest.raises(Unserved) as raised:
        await world.ask()
    assert raised.value.why == "a: nothing answers there; b: all are taken; this node: its file is gone"


async def test_who_is_not_known_any_more_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a=None, b=None)
    world.unknown = {"a"}
    assert await world.ask() == "b"
    world.unknown = {"a", "b"}
    with pytest.raises(Unserved, match="not known any more"):
        await world.ask()


async def test_what_the_caller_must_change_is_told_when_nobody_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a=ContextOverflow("prompt", "it is too long", "send less"), b=GONE)
    with pytest.raises(ContextOverflow):
        await world.ask()
    world.nodes["b"] = None  # it has more room
    assert await world.ask() == "b"
    # That says nothing about the first.
    assert ("a", False) not in world.recorded


async def test_so_many_are_tried_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, **{f"node{number}": GONE for number in range(20)})
    with pytest.raises(Unserved):
        await world.ask()
    tried = [f"node{number}" for number in range(CANDIDATES_TRIED)]
    assert world.asked == quickly(*tried) + patiently(*tried)


async def test_vectors_are_asked_for_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, a=GONE, b="slow")
    found = await world.answers().embed("tiny", EmbeddingRequest(("x",)))
    assert found.answered_by == "b"
    assert world.asked == quickly("a", "b") + patiently("a", "b")
    assert replace(found, via=None) == found
