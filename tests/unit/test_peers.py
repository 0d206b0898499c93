"""The table of peers: pages, bounds, standing, and what survives a restart."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.buckets import Buckets
from daemon.errors import Busy, NoSpace, Refused
from daemon.gossip.exchange import chosen
from daemon.gossip.peers import OFFER_BYTES, PeerTable, Standing
from daemon.ledger import LedgerThread
from registry import announcement as rules
from registry.cid import leaf_cid
from registry.codes import code_of_cid, short
from registry.envelope import key_name, sign
from registry.errors import Stale
from registry.records import Address, Announcement, Offer
from registry.store import Ledger

NOW = 1_800_000_000
OWN = "ed25519:" + "ab" * 32


class Speaker:
    """Another node, whose clock is ours. What it says lives for 600 s."""

    def __init__(self, clock: list[int]) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.node = key_name(self.key)
        self.revisions: tuple[int, ...] = ()
        self._clock = clock
        self._sequence = 0

    def beat(self, *, sequence: int | None = None, lives: int = 600, pages: int | None = None) -> bytes:
        """Without offers; `pages` cuts the pages off behind that many."""
        self.revisions = self.revisions[:pages]
        return self._say((), None, sequence, lives)

    def says(self, *cids: str, page: int = 0, sequence: int | None = None, lives: int = 600) -> bytes:
        """A page, which is new or takes the place of the one of that number."""
        offers = tuple(Offer(self.node, cid, None, None, None, "m", 10, True) for cid in cids)
        return self._say(offers, page, sequence, lives)

    def _say(self, offers: tuple[Offer, ...], page: int | None, sequence: int | None, lives: int) -> bytes:
        self._sequence = sequence or self._sequence + 1
        if page is not None:
            before = list(self.revisions) + [1] * (page + 1 - len(self.revisions))
            before[page] = self._sequence
            self.revisions = tuple(before)
        said = Announcement(
            self.node, None, self._sequence, self._clock[0] + lives, Address(self.node), (), offers, page, self.revisions
        )
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
    peers.accept(a.says(cids[0], page=0))
    peers.accept(a.says(cids[1], page=1))
    peers.accept(a.says(cids[2], page=2))
    assert offered(peers) == cids[:3]
    peers.accept(a.says(cids[3], page=0))
    peers.accept(a.beat(pages=2))
    assert offered(peers) == [cids[3], cids[1]]
    assert [len(words) for words in peers.news({}, {}).values()] == [3]
    peers.accept(a.beat(pages=0))
    assert offered(peers) == []
    assert [peer.node for peer in peers.peers()] == [a.node]


async def test_offers_expire_and_the_node_is_remembered_for_a_week(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    peers, a = table(ledger, clock), Speaker(clock)
    peers.accept(a.says(cids[0]))
    clock[0] += 600
    assert offered(peers) == [] and peers.peers() == [] and peers.news({}, {}) == {}
    peers.prune()
    assert [peer.node for peer in peers.remembered()] == [a.node]
    clock[0] += 8 * 24 * 3600
    peers.prune()
    await peers.mirror()
    assert peers.remembered() == [] and await ledger.call(Ledger.peers) == []


async def test_addresses_are_there_after_a_restart(ledger: LedgerThread, clock: list[int]) -> None:
    a, after_a_crash = Speaker(clock), table(ledger, clock)
    address = Address(a.node, bittorrent=("192.0.2.1:6881",), http=("http://192.0.2.1:8788",))
    said = Announcement(a.node, None, NOW * 1000, NOW + 30, address, (), relay=True)
    before = table(ledger, clock)
    await before.open()
    before.accept(sign(rules.PAYLOAD_TYPE, rules.build(said), a.key))
    assert before.heard(a.node) == NOW
    await before.mirror()
    clock[0] += 24 * 3600
    await after_a_crash.open()
    [known] = after_a_crash.remembered()
    assert (known.address, known.relay) == (address, True)
    assert after_a_crash.peers() == [] and after_a_crash.heard(a.node) is None
    await after_a_crash.close()
    after = table(ledger, clock)
    await after.open()
    assert after.remembered() == [known]


async def test_of_too_many_in_the_ledger_the_latest_are_remembered(ledger: LedgerThread, clock: list[int]) -> None:
    before, speakers = table(ledger, clock), [Speaker(clock) for _ in range(6)]
    for speaker in speakers:
        clock[0] += 1
        before.accept(speaker.beat())
    await before.mirror()
    after = table(ledger, clock, limit=3, standing={speakers[0].node: "trusted"})
    await after.open()
    latest = {speakers[0].node, speakers[4].node, speakers[5].node}
    assert {peer.node for peer in after.remembered()} == latest
    await after.close()
    assert {peer.node for peer in await ledger.call(Ledger.peers)} == latest


async def test_the_pages_of_a_code(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    peers, a, b = table(ledger, clock), Speaker(clock), Speaker(clock)
    peers.accept(a.says(cids[0]))
    sought = [a.says(cids[1], cids[2], page=1), b.says(cids[1])]
    for page in sought:
        peers.accept(page)
    full = code_of_cid(cids[1])
    assert peers.pages_with([short(full)]) == peers.pages_with([full, short(code_of_cid(cids[2]))]) == set(sought)
    assert peers.pages_with([short(code_of_cid(cids[4]))]) == set()
    # Whoever looks for it gets the newest word of each node before the page, and both before all others.
    newest = a.beat()
    peers.accept(newest)
    others = [Speaker(clock) for _ in range(9)]
    for other in others:
        peers.accept(other.says(cids[3]))
    said = chosen([b"ours"], peers.news({}, {}), sought=peers.pages_with([full]), shuffle=random.Random())
    assert said[0] == b"ours" and set(said[1:4]) == {newest, *sought}
    assert said.index(newest) < said.index(sought[0])
    assert len(said) == len(set(said)) == 5 + len(others)


# -- beats and pages --------------------------------------------------------------------------------------------------------


async def test_a_beat_prolongs_the_pages_that_it_names(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    peers, a = table(ledger, clock), Speaker(clock)
    peers.accept(a.says(cids[0]))
    for _ in range(5):
        clock[0] += 500
        peers.accept(a.beat())
        assert offered(peers) == cids[:1] and not peers.behind()
    # The signed page has expired long ago; together with the beat that names it, it can still be passed on.
    newcomer = table(ledger, clock)
    for envelope in peers.news({}, {})[a.node]:
        newcomer.accept(envelope)
    assert offered(newcomer) == cids[:1]
    clock[0] += 600
    assert offered(peers) == [] and peers.behind() == {}


async def test_a_replayed_beat_prolongs_nothing(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    peers, a = table(ledger, clock), Speaker(clock)
    peers.accept(a.says(cids[0]))
    recorded = [a.beat(lives=300), a.beat(lives=200)]
    peers.accept(recorded[1])
    for envelope in [*recorded, *recorded]:
        with pytest.raises(Stale):
            peers.accept(envelope)
    clock[0] += 200
    assert offered(peers) == [] and peers.peers() == []
    with pytest.raises(Stale):
        peers.accept(recorded[0])


async def test_a_beat_for_another_revision_leaves_a_page_the_time_it_had(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    peers, a = table(ledger, clock), Speaker(clock)
    old = a.says(cids[0], lives=100)
    peers.accept(old)
    new = a.says(cids[1], lives=100)
    clock[0] += 50
    peers.accept(a.beat(lives=100))
    assert offered(peers) == cids[:1] and peers.behind() == {a.node: (0,)}
    assert peers.want(64) == {rules.node_id(a.node): (0,)}
    with pytest.raises(Stale):
        peers.accept(old)
    # Nor is what is out of date passed on.
    assert [len(words) for words in peers.news({}, {}).values()] == [1]
    clock[0] += 50
    assert offered(peers) == [] and peers.behind() == {a.node: (0,)}
    peers.accept(new)
    assert offered(peers) == cids[1:2] and peers.behind() == {}
    clock[0] += 49
    assert offered(peers) == cids[1:2]
    clock[0] += 1
    assert offered(peers) == []


@pytest.mark.parametrize("order", list(permutations(range(4))))
async def test_in_any_order_the_newest_of_each_page_is_believed(ledger: LedgerThread, clock: list[int], order: tuple[int, ...]) -> None:
    peers, a = table(ledger, clock), Speaker(clock)
    cids = [leaf_cid(b"%d" % number) for number in range(3)]
    words = [a.says(cids[0], page=0), a.says(cids[1], page=1), a.says(cids[2], page=0), a.beat()]
    for place in order:
        with suppress(Stale):
            peers.accept(words[place])
    # What came too early is asked for, and then believed.
    for node, pages in peers.behind().items():
        assert node == a.node
        for page in pages:
            peers.accept(words[(2, 1)[page]])
    assert sorted(offered(peers)) == sorted(cids[1:]) and peers.behind() == {}
    for envelope in words:
        with pytest.raises(Stale):
            peers.accept(envelope)


async def test_a_node_that_names_pages_and_never_gives_them(ledger: LedgerThread, clock: list[int]) -> None:
    peers, a = table(ledger, clock), Speaker(clock)
    a.revisions = tuple(range(1, 65))
    peers.accept(a.beat(sequence=100))
    assert peers.behind() == {a.node: tuple(range(64))}
    assert peers.offers() == [] and len(peers.news({}, {})[a.node]) == 1
    others = [Speaker(clock) for _ in range(5)]
    for other in others:
        other.revisions = (1,)
        peers.accept(other.beat(sequence=100))
    for _ in range(20):
        assert len(peers.want(2)) == 2 and next(iter(peers.want(2, others[3].node))) == rules.node_id(others[3].node)
    clock[0] += 600
    assert peers.behind() == peers.want(64) == {}


async def test_who_says_what_it_has_is_given_the_rest(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    peers, a = table(ledger, clock), Speaker(clock)
    words = [a.says(cids[0], page=0), a.says(cids[1], page=1), a.beat(), a.says(cids[2], page=1), a.beat()]
    for envelope in words:
        peers.accept(envelope)
    name = rules.node_id(a.node)
    assert peers.have() == {name: 5}
    assert peers.news({name: 5}, {}) == {}
    assert peers.news({name: 4}, {}) == {a.node: [words[4]]}
    assert peers.news({name: 3}, {}) == {a.node: [words[4], words[3]]}
    assert peers.news({name: 5}, {name: [0, 7]}) == {a.node: [words[4], words[0]]}
    assert peers.news(None, {name: [1]}) == {a.node: [words[4], words[3]]}
    assert peers.news(None, {}) == peers.news(None, {"f" * 16: [0]}) == {}
    assert peers.news({}, {}) == {a.node: [words[4], words[0], words[3]]}
    assert peers.news({}, {"f" * 16: [0]}) == {a.node: [words[4], words[0], words[3]]}


async def test_what_is_given_is_bounded_and_every_node_gets_its_turn(ledger: LedgerThread, clock: list[int]) -> None:
    peers, speakers = table(ledger, clock), [Speaker(clock) for _ in range(8)]
    sizes = []
    for speaker in speakers:
        word = speaker.beat()
        peers.accept(word)
        sizes.append(len(word))
    seen: set[str] = set()
    for _ in range(200):
        given = peers.news({}, {}, limit=2 * max(sizes))
        assert 2 <= len(given) <= 4
        seen |= given.keys()
    assert seen == {speaker.node for speaker in speakers}


# -- the ledger -------------------------------------------------------------------------------------------------------------


async def test_a_restart_keeps_offers_and_sequence_numbers(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    a, peers = Speaker(clock), table(ledger, clock)
    await peers.open()
    recorded = [a.says(cids[0], cids[1]), a.beat()]
    for envelope in recorded:
        peers.accept(envelope)
    await peers.close()
    peers = table(ledger, clock)
    await peers.open()
    assert offered(peers) == cids[:2] and peers.behind() == {}
    for envelope in recorded:
        with pytest.raises(Stale):
            peers.accept(envelope)
    peers.accept(a.says(cids[2]))
    assert offered(peers) == [cids[2]]


async def test_after_a_crash_nothing_older_than_the_start_is_believed(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    a, b, peers = Speaker(clock), Speaker(clock), table(ledger, clock)
    await peers.open()
    peers.accept(a.says(cids[0], sequence=NOW * 1000 - 2000))
    await peers.mirror()
    # Heard, and not in the ledger yet.
    recorded = [a.says(cids[1], sequence=NOW * 1000 - 1), b.says(cids[2], sequence=NOW * 1000 - 1)]
    for envelope in recorded:
        peers.accept(envelope)
    peers = table(ledger, clock)
    await peers.open()
    assert offered(peers) == cids[:1]
    for envelope in recorded:
        with pytest.raises(Stale, match="last start"):
            peers.accept(envelope)
    clock[0] += 1
    peers.accept(b.beat(sequence=NOW * 1000 + 1))
    peers.accept(recorded[1])  # the page that the new word names
    assert offered(peers) == [cids[0], cids[2]]


async def test_many_beats_are_one_transaction(ledger: LedgerThread, clock: list[int]) -> None:
    calls = []

    class Counting:
        async def call(self, method: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(method)
            return await ledger.call(method, *args, **kwargs)

    peers = table(cast(LedgerThread, Counting()), clock)
    speakers = [Speaker(clock) for _ in range(20)]
    for speaker in speakers * 5:
        peers.accept(speaker.beat())
    assert calls == []
    await peers.mirror()
    await peers.mirror()
    assert calls == [Ledger.save_peers]
    assert {peer.sequence for peer in await ledger.call(Ledger.peers)} == {5}


async def test_what_could_not_be_written_is_written_later(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    class Full:
        async def call(self, method: Any, *args: Any, **kwargs: Any) -> Any:
            if full:
                raise NoSpace("ledger", "the disk is full")
            return await ledger.call(method, *args, **kwargs)

    full = True
    peers, a = table(cast(LedgerThread, Full()), clock), Speaker(clock)
    peers.accept(a.says(cids[0]))
    with pytest.raises(NoSpace):
        await peers.mirror()
    full = False
    await peers.mirror()
    assert [page.node for page in await ledger.call(Ledger.pages)] == [a.node]


# -- bounds -----------------------------------------------------------------------------------------------------------------


async def test_blocked_nodes_are_refused(ledger: LedgerThread, clock: list[int]) -> None:
    a = Speaker(clock)
    peers = table(ledger, clock, standing={a.node: "blocked"})
    with pytest.raises(Refused):
        peers.accept(a.says())
    assert peers.remembered() == []


async def test_invented_nodes_cannot_push_out_those_that_speak(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    trusted, joined = Speaker(clock), Speaker(clock)
    peers = table(ledger, clock, limit=3, standing={trusted.node: "trusted"})
    peers.keep(joined.node)
    first = [Speaker(clock) for _ in range(3)]
    for one in first:
        peers.accept(one.says(cids[0]))
    with pytest.raises(Busy):
        peers.accept(Speaker(clock).says())
    # Those that are there may go on talking; a trusted one always comes in, and one that a person joined.
    peers.accept(first[0].says(cids[1]))
    peers.accept(trusted.says(cids[2]))
    peers.accept(joined.says(cids[2]))
    assert len(peers.peers()) == 5
    clock[0] += 700
    for _ in range(9):
        peers.accept(Speaker(clock).says())
        clock[0] += 700
    assert peers.peer(trusted.node) is not None and peers.peer(joined.node) is not None
    await peers.mirror()
    assert len(await ledger.call(Ledger.peers)) == len(peers.remembered()) == 5


async def test_who_makes_room(ledger: LedgerThread, clock: list[int]) -> None:
    peers = table(ledger, clock, limit=4)
    proven, expired, silent, spoke = (Speaker(clock) for _ in range(4))
    peers.accept(proven.beat())
    peers.accept(expired.beat(lives=10))
    clock[0] += 1
    peers.accept(silent.beat())
    clock[0] += 15
    peers.accept(spoke.beat())
    peers.record(proven.node, 0.1, ok=True)
    for gone in (expired, silent):
        peers.accept(Speaker(clock).beat())
        assert peers.peer(gone.node) is None
    with pytest.raises(Busy):
        peers.accept(Speaker(clock).beat())
    assert peers.peer(proven.node) is not None and peers.peer(spoke.node) is not None
    # Who was pushed out comes back by its next word, when there is room.
    clock[0] += 15
    peers.accept(silent.beat())


async def test_the_number_of_offers_is_bounded(ledger: LedgerThread, clock: list[int], cids: list[str]) -> None:
    peers, a, b = table(ledger, clock, offers_limit=3), Speaker(clock), Speaker(clock)
    peers.accept(a.says(*cids[:3]))
    with pytest.raises(Busy):
        peers.accept(b.says(cids[0]))
    peers.accept(a.says(*cids[:2]))
    peers.accept(b.says(cids[0]))
    assert len(offered(peers)) == 3


async def test_pages_without_offers_are_bounded_by_their_bytes(ledger: LedgerThread, clock: list[int]) -> None:
    peers, a = table(ledger, clock, offers_limit=8), Speaker(clock)
    with pytest.raises(Busy):
        for page in range(64):
            peers.accept(a.says(page=page))
    assert sum(map(len, peers.news({}, {})[a.node])) < 9 * OFFER_BYTES
    await peers.mirror()
    assert len(await ledger.call(Ledger.pages)) < 64
    clock[0] += 600
    assert peers.offers() == []
    await peers.mirror()
    assert await ledger.call(Ledger.pages) == [] and len(await ledger.call(Ledger.peers)) == 1


async def test_statistics_follow_the_latest_and_belong_to_known_nodes(ledger: LedgerThread, clock: list[int]) -> None:
    peers, a = table(ledger, clock), Speaker(clock)
    peers.record(a.node, 1.0, ok=True)
    assert peers.stats() == {}
    peers.accept(a.says())
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
