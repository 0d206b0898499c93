"""The table of peers: pages, bounds, standing, and what survives a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.buckets import Buckets
from daemon.errors import Busy, Refused
from daemon.gossip.peers import PeerTable, Standing
from daemon.ledger import LedgerThread
from registry import announcement as rules
from registry.cid import leaf_cid
from registry.envelope import key_name, sign
from registry.errors import Stale
from registry.records import Address, Announcement, Offer

NOW = 1_800_000_000
OWN = "ed25519:" + "ab" * 32


class Speaker:
    """Another node, whose clock is ours."""

    def __init__(self, clock: list[int]) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.node = key_name(self.key)
        self._clock = clock
        self._sequence = 0

    def says(self, *cids: str, page: int = 0, pages: int = 1, sequence: int | None = None) -> bytes:
        self._sequence = sequence or self._sequence + 1
        offers = tuple(Offer(self.node, cid, None, None, None, "m", 10, True) for cid in cids)
        said = Announcement(self.node, None, self._sequence, self._clock[0] + 600, Address(self.node), (), offers, page, pages)
        return sign(rules.PAYLOAD_TYPE, rules.build(said), self.key)


@pytest.fixture
def clock() -> list[int]:
    return [NOW]


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[LedgerThread]:
    ledger = await LedgerThread.open(tmp_path / "ledger.db")
    yield ledger
    await ledger.close()


@pytest.fixture
def cids() -> Iterator[list[str]]:
    yield [leaf_cid(b"%d" % number) for number in range(5)]


NOBODY: Mapping[str, Standing] = MappingProxyType({})


def table(
    ledger: LedgerThread, clock: list[int], *, limit: int = 1024, offers_limit: int = 100, standing: Mapping[str, Standing] = NOBODY
) -> PeerTable:
    return PeerTable(ledger, own=OWN, clock=lambda: clock[0], standing=standing.get, limit=limit, offers_limit=offers_limit)


def offered(peers: PeerTable) -> list[str]:
    return [offer.cid for offer in peers.offers()]


async def test_a_newer_page_replaces_its_number_and_pages_that_are_gone_go(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    peers, a = table(ledger, clock), Speaker(clock)
    await peers.accept(a.says(cids[0], page=0, pages=3))
    await peers.accept(a.says(cids[1], page=1, pages=3))
    await peers.accept(a.says(cids[2], page=2, pages=3))
    assert offered(peers) == cids[:3]
    await peers.accept(a.says(cids[3], page=0, pages=2))
    assert offered(peers) == [cids[3], cids[1]]
    assert [len(pages) for pages in peers.envelopes().values()] == [2]
    await peers.accept(a.says())
    assert offered(peers) == []
    assert [peer.node for peer in peers.peers()] == [a.node]


async def test_offers_expire_and_the_node_is_remembered_for_a_week(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    peers, a = table(ledger, clock), Speaker(clock)
    await peers.accept(a.says(cids[0]))
    clock[0] += 600
    assert offered(peers) == [] and peers.peers() == [] and peers.envelopes() == {}
    await peers.prune()
    assert [peer.node for peer in peers.remembered()] == [a.node]
    clock[0] += 8 * 24 * 3600
    await peers.prune()
    assert peers.remembered() == []


async def test_a_restart_keeps_offers_and_sequence_numbers(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    a = Speaker(clock)
    recorded = a.says(cids[0], cids[1])
    await table(ledger, clock).accept(recorded)
    peers = table(ledger, clock)
    await peers.open()
    assert offered(peers) == cids[:2]
    with pytest.raises(Stale):
        await peers.accept(recorded)
    await peers.accept(a.says(cids[2]))
    assert offered(peers) == [cids[2]]


async def test_blocked_nodes_are_refused(ledger: LedgerThread, clock: list[int]) -> None:
    a = Speaker(clock)
    peers = table(ledger, clock, standing={a.node: "blocked"})
    with pytest.raises(Refused):
        await peers.accept(a.says())
    assert peers.remembered() == []


async def test_invented_nodes_cannot_push_out_those_that_are_there(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    trusted = Speaker(clock)
    peers = table(ledger, clock, limit=3, standing={trusted.node: "trusted"})
    first = [Speaker(clock) for _ in range(3)]
    for one in first:
        await peers.accept(one.says(cids[0]))
    with pytest.raises(Busy):
        await peers.accept(Speaker(clock).says())
    # Those that are there may go on talking, and a trusted one always comes in.
    await peers.accept(first[0].says(cids[1]))
    await peers.accept(trusted.says(cids[2]))
    clock[0] += 700
    newcomer = Speaker(clock)
    await peers.accept(newcomer.says())
    assert peers.peer(newcomer.node) is not None and peers.peer(trusted.node) is not None


async def test_the_number_of_offers_is_bounded(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    peers, a, b = table(ledger, clock, offers_limit=3), Speaker(clock), Speaker(clock)
    await peers.accept(a.says(*cids[:3]))
    with pytest.raises(Busy):
        await peers.accept(b.says(cids[0]))
    await peers.accept(a.says(*cids[:2]))
    await peers.accept(b.says(cids[0]))
    assert len(offered(peers)) == 3


async def test_statistics_follow_the_latest_and_belong_to_known_nodes(ledger: LedgerThread, clock: list[int]) -> None:
    peers, a = table(ledger, clock), Speaker(clock)
    peers.record(a.node, 1.0, ok=True)
    assert peers.stats() == {}
    await peers.accept(a.says())
    for latency in (1.0, 2.0):
        peers.record(a.node, latency, ok=True)
    peers.record(a.node, None, ok=False)
    stats = peers.stats()[a.node]
    assert stats.latency_s is not None and 1.0 < stats.latency_s < 2.0
    assert (stats.successes, stats.failures) == (2, 1)
    for _ in range(1000):
        peers.record(a.node, None, ok=False)
    assert peers.stats()[a.node].failures < 64


def test_buckets_refill_and_forget() -> None:
    now = [0.0]
    buckets = Buckets(rate=1.0, burst=2.0, clock=lambda: now[0], limit=2)
    assert [buckets.take("a") for _ in range(3)] == [True, True, False]
    assert buckets.take("b")
    now[0] = 1.0
    assert [buckets.take("a") for _ in range(2)] == [True, False]
    buckets.take("c")
    buckets.take("d")
    assert buckets.take("a")
