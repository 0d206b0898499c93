"""How a node finds out whether others can reach it: what judges say, who came by himself, and what both are worth."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from daemon.errors import Unreachable, Unserved, VerificationError
from daemon.membership import OpenSwarm
from daemon.node import reachability as under_test
from daemon.node.reachability import ASKED, MOST_ASKED, Reachability
from daemon.peerapi import dialback
from daemon.peerapi.dialback import Verdict
from daemon.peerapi.ways import NEVER, Way
from registry.records import Address, Peer

HOME, NEW_HOME = "45.10.0.1", "45.10.0.2"  # our addresses on the internet, as others see them
PRIVATE = "192.168.1.2"
STRANGER = "46.20.0.1"
ME = "ed25519:" + "ab" * 32

Seen = Verdict | Exception


def verdict(*reached: str, address: str | None = HOME, port: int | None = None) -> Verdict:
    return Verdict(address, port, frozenset(reached))


class World:
    """Judges by name, and what each says; `own` are the addresses of this machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.judges: dict[str, Seen] = {}
        self.own = {PRIVATE}
        self.asked: list[str] = []
        self.left_from: int | None = None
        self.changes = 0
        self.on_asked: Callable[[Peer], None] = lambda peer: None
        self.told: list[tuple[str, dict[str, int], str]] = []
        monkeypatch.setattr(under_test, "own_addresses", lambda: frozenset(self.own))
        monkeypatch.setattr(under_test, "global_address", self._global)
        monkeypatch.setattr(dialback, "ask", self._ask)
        ways: Any = self
        self.reachability = Reachability(
            ME,
            ways,
            OpenSwarm(),
            ports=lambda: {"http": 8788},
            judges=lambda: [Peer(name, None, Address(name), 1, 1) for name in self.judges],
            on_change=self._on_change,
        )

    def _global(self) -> str | None:
        return next((one for one in sorted(self.own) if one in (HOME, NEW_HOME)), None)

    def _on_change(self) -> None:
        self.changes += 1

    @asynccontextmanager
    async def to(self, peer: Peer, *, via: str) -> AsyncIterator[Way]:
        """As `Ways.to`."""
        self.asked.append(peer.node)
        self.on_asked(peer)
        said = self.judges[peer.node]
        if isinstance(said, Unreachable):
            raise said
        self.told.append((peer.node, {}, via))
        yield Way("http://judge", node=peer.node)

    async def _ask(self, way: Way, node: str, ports: dict[str, int], *, membership: Any) -> tuple[Verdict, int | None]:
        assert (node, ports) == (ME, {"http": 8788})
        said = self.judges[way.node]
        if isinstance(said, Exception):
            raise said
        return said, self.left_from

    async def look(self, **judges: Seen) -> Reachability:
        """Ask these judges once."""
        self.judges = dict(judges)
        self.asked.clear()
        task = asyncio.create_task(self.reachability.run())
        while not self._over(task):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
        return self.reachability

    def _over(self, task: asyncio.Task[None]) -> bool:
        """Whether it waits for a reason to look again."""
        look: Any = self.reachability._look
        return task.done() or bool(look._waiters)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def standing(reachability: Reachability) -> tuple[str, set[str], tuple[str, ...]]:
    return reachability.state, set(reachability.reached), reachability.external


# -- the states ---------------------------------------------------------------------------------------------------------


async def test_unknown_until_somebody_has_said(world: World) -> None:
    assert standing(world.reachability) == ("unknown", set(), ())
    found = await world.look()
    assert (standing(found), found.nat, world.changes) == (("unknown", set(), ()), "unknown", 0)


async def test_public_when_somebody_outside_reached_us(world: World) -> None:
    found = await world.look(a=verdict("http", "ipfs"))
    assert standing(found) == ("public", {"http", "ipfs"}, (HOME,))


async def test_private_when_those_who_were_asked_could_not(world: World) -> None:
    found = await world.look(a=verdict(), b=verdict())
    assert standing(found) == ("private", set(), (HOME,))


async def test_judges_are_asked_without_a_relay_and_only_so_many(world: World) -> None:
    await world.look(**{f"judge{number}": verdict() for number in range(9)})
    assert world.asked == [f"judge{number}" for number in range(ASKED)]
    assert {via for _, _, via in world.told} == {NEVER}


NOBODY = [Unreachable("peer", "gone"), Unserved("dial-back", "429"), VerificationError("x", "y"), verdict(address=None)]


@pytest.mark.parametrize("nobody", NOBODY)
async def test_whoever_is_gone_lies_or_has_no_opinion_changes_nothing(world: World, nobody: Seen) -> None:
    await world.look(a=verdict("http"))
    found = await world.look(a=nobody, b=nobody)
    assert (standing(found), world.changes) == (("public", {"http"}, (HOME,)), 1)


async def test_those_who_are_gone_do_not_stand_before_all_others(world: World) -> None:
    """Three joined nodes that are gone for ever: the fourth has an opinion."""
    gone = {f"gone{number}": Unreachable("peer", "gone") for number in range(ASKED)}
    found = await world.look(**gone, alive=verdict("http"))
    assert found.state == "public"
    await world.look(**{f"gone{number}": Unreachable("peer", "gone") for number in range(100)})
    assert len(world.asked) == MOST_ASKED


async def test_one_judge_that_fails_does_not_silence_the_others(world: World) -> None:
    found = await world.look(a=Unreachable("peer", "gone"), b=VerificationError("dial-back", "a lie"), c=verdict("http"))
    assert found.state == "public"


async def test_a_bug_of_ours_is_not_swallowed(world: World) -> None:
    with pytest.raises(ZeroDivisionError):
        await world.look(a=ZeroDivisionError(), b=verdict("http"))


async def test_who_is_joined_meanwhile_is_asked_before_the_rest_of_those_who_are_gone(world: World) -> None:
    gone: dict[str, Seen] = {f"gone{number}": Unreachable("peer", "gone") for number in range(MOST_ASKED)}
    joined: dict[str, Seen] = {"joined": verdict("http")}

    def now_joined(peer: Peer) -> None:
        if world.judges is gone:
            world.judges = {**joined, **gone}
            world.reachability.look_again()

    world.on_asked, world.judges = now_joined, gone
    task = asyncio.create_task(world.reachability.run())
    await until(lambda: world.reachability.state == "public")
    task.cancel()
    await asyncio.wait({task})
    assert world.asked[: ASKED + 1] == ["gone0", "gone1", "gone2", "joined"]


# -- judges who do not agree --------------------------------------------------------------------------------------------


async def test_what_most_say_counts(world: World) -> None:
    found = await world.look(a=verdict("http"), b=verdict("http", "ipfs"), c=verdict())
    assert standing(found) == ("public", {"http"}, (HOME,))
    # One liar among honest judges makes nobody public, nor private.
    found = await world.look(a=verdict(), b=verdict(), c=verdict("http", "ipfs", "bittorrent"))
    assert standing(found) == ("private", set(), (HOME,))


async def test_of_a_tie_what_was_before(world: World) -> None:
    found = await world.look(a=verdict("http"))
    found = await world.look(a=verdict("http"), b=verdict())
    assert standing(found) == ("public", {"http"}, (HOME,))
    await world.look(a=verdict(), b=verdict())
    found = await world.look(a=verdict("http"), b=verdict())
    assert standing(found) == ("private", set(), (HOME,))


async def test_what_was_reached_at_one_address_is_not_announced_at_another(world: World) -> None:
    """As with one judge who lies about where we are: of as many, who was joined is believed."""
    found = await world.look(a=verdict("http", "ipfs"), b=verdict("bittorrent", address="6.6.6.6"))
    assert standing(found) == ("public", {"http", "ipfs"}, (HOME,))


async def test_an_address_that_is_no_place_on_the_internet_is_no_opinion(world: World) -> None:
    found = await world.look(a=verdict("http", address="192.168.1.7"), b=verdict("http", address="127.0.0.1"))
    assert standing(found) == ("unknown", set(), ())


async def test_where_nobody_reached_us_we_stay_where_we_were(world: World) -> None:
    await world.look(a=verdict())
    found = await world.look(a=verdict(address="6.6.6.6"), b=verdict())
    assert (standing(found), world.changes) == (("private", set(), (HOME,)), 1)


async def test_the_order_of_those_who_agree_changes_nothing(world: World) -> None:
    await world.look(a=verdict("http"), b=verdict("ipfs"))
    await world.look(b=verdict("ipfs"), a=verdict("http"))
    assert world.changes == 1


# -- addresses change ---------------------------------------------------------------------------------------------------


async def test_what_is_reached_no_more_is_announced_no_more(world: World) -> None:
    """A router that forwards no longer, at the same address."""
    await world.look(a=verdict("http", "ipfs"))
    found = await world.look(a=verdict("ipfs"))
    assert standing(found) == ("public", {"ipfs"}, (HOME,))
    found = await world.look(a=verdict())
    assert (standing(found), world.changes) == (("private", set(), (HOME,)), 3)


async def test_another_address_drops_what_was_proven_for_the_one_before(world: World) -> None:
    await world.look(a=verdict("http", "ipfs"))
    found = await world.look(a=verdict(address=NEW_HOME))
    assert standing(found) == ("private", set(), (NEW_HOME, HOME))
    found = await world.look(a=verdict("ipfs", address=NEW_HOME))
    assert standing(found) == ("public", {"ipfs"}, (NEW_HOME, HOME))
    # Nor does it come back by itself with the old address.
    found = await world.look(a=verdict())
    assert standing(found) == ("private", set(), (HOME, NEW_HOME))


async def test_addresses_of_old_are_forgotten_in_time(world: World) -> None:
    for number in range(10):
        await world.look(a=verdict(address=f"45.10.1.{number}"))
    assert world.reachability.external == tuple(f"45.10.1.{number}" for number in (9, 8, 7, 6))


# -- whoever comes by himself -------------------------------------------------------------------------------------------


async def test_whoever_comes_from_outside_to_an_address_of_ours_is_proof(world: World) -> None:
    world.own.add(HOME)
    world.reachability.came(STRANGER, "http")
    assert standing(world.reachability) == ("public", {"http"}, (HOME,))
    world.reachability.came(STRANGER, "ipfs")
    world.reachability.came("46.20.0.2", "ipfs")
    assert standing(world.reachability) == ("public", {"http", "ipfs"}, (HOME,))
    assert world.changes == 2


async def test_behind_a_nat_it_proves_nothing(world: World) -> None:
    """Through a hole that we punched, for instance: nobody else could come the same way."""
    world.reachability.came(STRANGER, "http")
    assert (world.reachability.state, world.changes) == ("unknown", 0)


@pytest.mark.parametrize("source", ["127.0.0.1", "10.0.0.1", "192.168.1.7", "100.64.0.1", "fd00::1", "::1", HOME, "", "nonsense"])
async def test_a_neighbour_or_ourselves_prove_nothing(world: World, source: str) -> None:
    world.own.add(HOME)
    world.reachability.came(source, "http")
    assert (world.reachability.state, world.changes) == ("unknown", 0)


async def test_it_counts_more_than_what_judges_could_not_do(world: World) -> None:
    world.own.add(HOME)
    world.reachability.came(STRANGER, "http")
    found = await world.look(a=verdict())
    assert standing(found) == ("public", {"http"}, (HOME,))


async def test_it_proves_nothing_of_another_address(world: World) -> None:
    """What was reached at the old address is not announced at the new one, and what comes there now is."""
    await world.look(a=verdict("http", "ipfs"))
    world.own.add(NEW_HOME)
    world.reachability.came(STRANGER, "http")
    assert standing(world.reachability) == ("public", {"http"}, (NEW_HOME, HOME))


async def test_of_several_addresses_the_one_that_others_see_stays(world: World) -> None:
    world.own |= {HOME, NEW_HOME}
    await world.look(a=verdict("http", address=NEW_HOME))
    world.reachability.came(STRANGER, "http")
    world.reachability.came(STRANGER, "ipfs")
    assert standing(world.reachability) == ("public", {"http", "ipfs"}, (NEW_HOME,))


# -- the kind of NAT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "left_from", "nat"),
    [
        ([5000], 5000, "port-preserving"),
        ([5000, 5000], 5000, "port-preserving"),
        ([61234], 5000, "symmetric"),
        ([5000, 61234], 5000, "symmetric"),
        ([None], 5000, "unknown"),
        ([None, 61234], 5000, "symmetric"),
        ([5000], None, "unknown"),
    ],
)
async def test_the_kind_of_nat_is_seen_by_the_ports(world: World, seen: list[int | None], left_from: int | None, nat: str) -> None:
    world.left_from = left_from
    found = await world.look(**{f"judge{n}": verdict(port=port) for n, port in enumerate(seen)})
    assert found.nat == nat


async def test_there_is_no_nat_where_others_see_an_address_of_this_machine(world: World) -> None:
    world.own.add(HOME)
    assert (await world.look(a=verdict(port=61234))).nat == "none"


async def test_what_is_known_of_the_nat_stays_where_nobody_sees_the_port(world: World) -> None:
    world.left_from = 5000
    await world.look(a=verdict(port=61234))
    assert (await world.look(a=verdict(port=None))).nat == "symmetric"


# -- when it asks -------------------------------------------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_it_asks_again_when_there_is_a_reason_to(world: World) -> None:
    world.judges = {"a": verdict()}
    task = asyncio.create_task(world.reachability.run())
    try:
        await until(lambda: world.changes == 1)
        assert world.asked == ["a"]
        world.judges = {"b": verdict("http")}
        # Several reasons at once are one.
        for _ in range(5):
            world.reachability.look_again()
        await until(lambda: world.changes == 2)
        assert world.asked == ["a", "b"]
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_without_a_verdict_it_tries_again_soon(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "_RETRY_S", 0.01)
    world.judges = {"a": Unreachable("peer", "gone")}
    task = asyncio.create_task(world.reachability.run())
    try:
        await until(lambda: len(world.asked) >= 3)
        # One who sees the port, too: while the kind of NAT is not known, the question stays open.
        world.left_from = 7
        world.judges = {"a": verdict("http", port=7)}
        await until(lambda: world.reachability.state == "public")
        asked = len(world.asked)
        await asyncio.sleep(0.05)
        assert len(world.asked) == asked  # a verdict lasts longer
    finally:
        task.cancel()
        await asyncio.wait({task})
