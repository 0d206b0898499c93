"""What the ear keeps of those that it hears."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from daemon.gossip.ear import Ear
from daemon.gossip.peers import SILENT_S, PeerTable
from daemon.ledger import LedgerThread
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
