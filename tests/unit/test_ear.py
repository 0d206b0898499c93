"""What the ear keeps of those that it hears."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest

from daemon.gossip.clocks import NODES_KEPT, WINDOW_S, Clocks
from daemon.gossip.ear import REFUSALS, Ear
from daemon.gossip.peers import SILENT_S, PeerTable
from daemon.ledger import LedgerThread
from registry.errors import Misdated, NotVerified
from tests.unit.test_peers import NOW, OWN, Speaker


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[LedgerThread]:
    ledger = await LedgerThread.open(tmp_path / "ledger.db")
    yield ledger
    await ledger.close()


class Listening:
    """An ear of a small table. `clock` is in unix seconds."""

    def __init__(self, ledger: LedgerThread, limit: int = 64) -> None:
        self.clock = [NOW]
        self.greeted = 0
        self.table = PeerTable(
            ledger, own=OWN, clock=lambda: self.clock[0], standing=lambda node: None, limit=limit
        )
        self.ear = Ear(
            self.table, greet=self._greet, pass_on=lambda envelope: None, behind=lambda: None
        )

    def _greet(self) -> None:
        self.greeted += 1


async def test_invented_nodes_do_not_fill_the_ear(ledger: LedgerThread) -> None:
    """R31: as many nodes are kept as the table has, however many say something once."""
    here = Listening(ledger, limit=10)
    for _ in range(100):
        await here.ear.receive(Speaker(here.clock).beat(lives=30))
        here.clock[0] += SILENT_S
    assert here.greeted == 100
    assert len(here.ear.heard) == 10
    assert here.ear.heard == {peer.node for peer in here.table.remembered()}


async def test_who_left_the_table_is_new_when_it_speaks_again(ledger: LedgerThread) -> None:
    here = Listening(ledger, limit=1)
    friend = Speaker(here.clock)
    await here.ear.receive(friend.beat())
    await here.ear.receive(friend.beat())
    assert here.greeted == 1
    here.clock[0] += SILENT_S
    await here.ear.receive(Speaker(here.clock).beat())
    here.clock[0] += SILENT_S
    await here.ear.receive(friend.beat())
    assert here.greeted == 3


DAY_S = 86_400


async def misdated(here: Listening, *envelopes: bytes) -> None:
    for envelope in envelopes:
        with pytest.raises(Misdated):
            await here.ear.receive(envelope)


async def test_our_clock_is_off_when_most_others_have_another_time(ledger: LedgerThread) -> None:
    here = Listening(ledger)
    others = [Speaker(here.clock) for _ in range(3)]
    for ours in (DAY_S, -2 * DAY_S):
        words = [other.beat() for other in others]
        here.clock[0] += ours
        assert not here.ear.clock_is_off
        await misdated(here, *words)
        assert here.ear.clock_is_off
        # It is set right.
        here.clock[0] -= ours
        for other in others:
            await here.ear.receive(other.beat())


async def test_one_node_with_another_time_counts_once(ledger: LedgerThread) -> None:
    here = Listening(ledger)
    other = Speaker(here.clock)
    words = [other.beat() for _ in range(40)]
    here.clock[0] += DAY_S
    await misdated(here, *words)
    assert not here.ear.clock_is_off


async def test_old_words_of_those_that_live_say_nothing(ledger: LedgerThread) -> None:
    """Somebody recorded three nodes yesterday. Said again, they are old words, whether we had heard them then or not."""
    here = Listening(ledger)
    others = [Speaker(here.clock) for _ in range(3)]
    recorded = [other.beat() for other in others]
    here.clock[0] += DAY_S
    await misdated(here, *recorded)
    for other in others:
        await here.ear.receive(other.beat())
    assert not here.ear.clock_is_off
    for envelope in recorded:
        with pytest.raises(REFUSALS):
            await here.ear.receive(envelope)
    assert not here.ear.clock_is_off


async def test_only_what_is_signed_counts(ledger: LedgerThread) -> None:
    here = Listening(ledger)
    words = [json.loads(Speaker(here.clock).beat()) for _ in range(9)]
    here.clock[0] += DAY_S
    for word, other in pairwise(words):
        word["signatures"][0]["sig"] = other["signatures"][0]["sig"]
        with pytest.raises(NotVerified):
            await here.ear.receive(json.dumps(word).encode())
    assert not here.ear.clock_is_off


def test_the_window_of_those_whose_time_counts() -> None:
    now = [0.0]
    clocks = Clocks(lambda node: node == "alive", lambda: now[0])

    def wrong(*nodes: str, long_ago: bool = True) -> None:
        for node in nodes:
            clocks.dated_wrong(Misdated("", node, long_ago=long_ago))

    wrong("a", "b", "alive")
    assert not clocks.ours_is_off
    wrong("alive", long_ago=False)  # nobody can have recorded it
    assert clocks.ours_is_off
    for good in ("c", "d", "e"):
        clocks.dated_right(good)
    assert not clocks.ours_is_off  # as many are right
    wrong("f")
    assert clocks.ours_is_off
    now[0] += WINDOW_S + 1
    assert not clocks.ours_is_off
    for number in range(2 * NODES_KEPT):
        clocks.dated_right(str(number))
    assert len(clocks._last) == NODES_KEPT
