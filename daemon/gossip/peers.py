"""What is known of the other nodes: their addresses, keys and offers, in memory, and in the ledger over restarts.

- The newest word of a node says how it is reached and which pages it has. A page lives on when a newer word names it at the
  revision that is held, keeps the time it had when another revision is named, and goes at once when it is not named any more.
- The node and its sequence number are kept for a week: its address is a way back into the swarm, and the number keeps old
  announcements from being believed again.
- The table is bounded, in nodes, offers and bytes, by one rule. Trusted nodes, and those that a person joined, always find a place
  and never lose it. For anybody else, when it is full, the node that expired first makes room; when none has, the one heard
  longest ago of those that never answered a question well - if it has been silent for a while, so that many invented nodes
  cannot push out those that speak. When there is none, the newcomer is refused.
- The ledger mirrors the table, a moment behind. After a crash nothing is believed that was signed before the start: it may have
  been heard in that moment.
"""

from __future__ import annotations

import dataclasses
import heapq
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal

from daemon.errors import Busy, Refused
from daemon.gossip.entries import Entry, Page
from daemon.gossip.mirror import Mirror
from daemon.ledger import LedgerThread
from registry import announcement as rules
from registry.catalogue import Catalogue
from registry.errors import Malformed, NotVerified, Repeated
from registry.records import Announcement, Offer, Peer
from registry.routing import Stats
from registry.store import Ledger, StoredPage

Standing = Literal["trusted", "blocked"]

PEERS_LIMIT = 4096  # nodes
OFFERS_LIMIT = 32_768  # over all nodes
OFFER_BYTES = 1536  # of the pages in their envelopes, for each of these; an honest page has 500 or so
REMEMBER_S = 7 * 24 * 3600  # a silent node is forgotten after this
SILENT_S = 15  # a node that was heard later than this keeps its place; above the shortest heartbeat
_COUNTED_S = 1  # how old the number of live nodes may be
_LATENCY_WEIGHT = 0.3  # of the newest measurement
_QUESTIONS_COUNTED = 32


class PeerTable:
    """`own` is our node key; `standing` says what the operator thinks of a key; `clock` gives unix seconds.

    `on_forget` is told of each node that leaves the table; it is set once.
    """

    def __init__(
        self,
        ledger: LedgerThread,
        *,
        own: str,
        clock: Callable[[], float],
        standing: Callable[[str], Standing | None],
        limit: int = PEERS_LIMIT,
        offers_limit: int = OFFERS_LIMIT,
    ) -> None:
        self.on_forget: Callable[[str], None] = lambda node: None
        self._ledger = ledger
        self._own = own
        self._clock = clock
        self._standing = standing
        self._limit = limit
        self._offers_limit = offers_limit
        self._entries: dict[str, Entry] = {}
        self._known: dict[str, Peer] = {}
        self._names: dict[str, str] = {}  # nodes, by `rules.node_id`
        self._catalogue = Catalogue()
        self._bytes = 0  # of the pages in their envelopes
        self._ends: list[tuple[int, str, int]] = []  # a heap: when a page may have expired
        self._behind: dict[str, tuple[int, ...]] = {}
        self._without_ipfs: dict[str, None] = {}
        self._joined: set[str] = set()
        self._stats: dict[str, Stats] = {}
        self._offers: tuple[int, list[Offer]] = (-1, [])
        self._counted = (float("-inf"), 0)
        self._mirror = Mirror(ledger, self._row)
        self._random = random.Random()

    # -- the ledger ---------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Take in what the ledger remembers. Call once."""
        now = int(self._clock())
        await self._ledger.call(Ledger.forget_peers, now - REMEMBER_S)
        peers, pages = await self._mirror.open(now)
        peers.sort(key=lambda peer: (self._stays(peer.node), peer.expires), reverse=True)
        for peer in peers[: self._limit]:
            self._entries[peer.node] = Entry(peer, None, 0.0)
            self._known[peer.node] = peer
            self._names[rules.node_id(peer.node)] = peer.node
        for peer in peers[self._limit :]:
            self._mirror.note(peer.node)
        for stored in pages:
            self._remember(stored, now)
        for node in self._entries:
            self._note_behind(node)

    async def close(self) -> None:
        """Write down what the ledger does not have yet. Idempotent."""
        await self._mirror.close()

    async def mirror(self) -> None:
        """Bring the ledger up to date, in one transaction."""
        await self._mirror.write()

    async def mirror_forever(self) -> None:
        """Bring the ledger up to date whenever it is behind. Supervised."""
        await self._mirror.write_forever()

    def _row(self, node: str, numbers: Collection[int]) -> tuple[Peer, list[StoredPage]] | None:
        """A node and those of its pages as the ledger keeps them; None when it is not known any more."""
        entry = self._entries.get(node)
        if entry is None:
            return None
        pages = [
            StoredPage(node, number, page.revision, page.expires, page.envelope)
            for number, page in entry.pages.items()
            if number in numbers
        ]
        return entry.peer, pages

    # -- what comes in ------------------------------------------------------------------------------------------------

    def accept(self, envelope: bytes) -> Announcement:
        """Believe `envelope` if the rules of registry/announcement.py hold, and remember it.

        Raises `Malformed`, `NotVerified`, `Stale`; `Refused` for a blocked node and `Busy` when the table is full.
        """
        now = int(self._clock())
        said = rules.accept(
            envelope, now=now, known=self._known, own=self._own, floor=self._mirror.floor
        )
        if self._standing(said.node) == "blocked":
            raise Refused("announcement", "the node is blocked here")
        entry = self._entries.get(said.node)
        newest = entry is None or said.sequence > entry.peer.sequence
        if entry is not None and not newest and self._holds(entry, said):
            raise Repeated(f"page {said.page} of the node came again")
        self._make_room(said, len(envelope), now)
        if newest:
            self._hear(said, envelope, now)
        if said.page is not None:
            self._put(said.node, said.page, said.sequence, said.offers, envelope)
        self._note_behind(said.node)
        self._mirror.note(said.node, said.page)
        return said

    def keep(self, node: str) -> bool:
        """A person joined this node: it always finds a place, until `release`. Whether that is new."""
        new = node not in self._joined
        self._joined.add(node)
        return new

    def release(self, node: str) -> None:
        self._joined.discard(node)

    def record(self, node: str, latency_s: float | None, *, ok: bool) -> None:
        """One question to `node`: seconds to its first token (None when there was none), and whether it ended well."""
        if node not in self._entries:
            return
        old = self._stats.get(node, Stats())
        latency = old.latency_s
        if latency_s is not None:
            latency = latency_s if latency is None else latency + (latency_s - latency) * _LATENCY_WEIGHT
        # Old failures fade, so that a node that recovered is asked again.
        successes, failures = old.successes + ok, old.failures + (not ok)
        if successes + failures > _QUESTIONS_COUNTED:
            successes, failures = successes // 2, failures // 2
        self._stats[node] = Stats(latency, successes, failures)

    def prune(self) -> None:
        """Let go of what has expired; called now and then."""
        now = int(self._clock())
        self._sweep(now)
        for node in [node for node, peer in self._known.items() if peer.expires < now - REMEMBER_S]:
            self._forget(node)

    def silence(self, peer: Peer) -> bool:
        """Nobody finds that node any more: what it said counts no longer, until it says more. Whether anything changed."""
        entry = self._entries.get(peer.node)
        now = int(self._clock())
        if entry is None or entry.peer.sequence != peer.sequence or entry.peer.expires <= now:
            return False
        entry.peer = self._known[peer.node] = dataclasses.replace(entry.peer, expires=now)
        for number in list(entry.pages):
            self._drop(peer.node, number)
        return True

    # -- what is known ------------------------------------------------------------------------------------------------

    def peer(self, node: str) -> Peer | None:
        """A node that was heard of in the last week, announced now or not."""
        return self._known.get(node)

    def peers(self) -> list[Peer]:
        """Nodes whose announcement has not expired."""
        now = self._clock()
        return [peer for peer in self._known.values() if peer.expires > now]

    def heard(self, node: str) -> float | None:
        """When the last new word of a node came (unix seconds); None when none has since the start."""
        entry = self._entries.get(node)
        return None if entry is None or entry.head is None else entry.heard

    def alive(self, node: str) -> bool:
        """Whether the announcement of a node has not expired."""
        peer = self._known.get(node)
        return peer is not None and peer.expires > self._clock()

    def count(self) -> int:
        """How many nodes `peers()` has, or had a moment ago."""
        now = self._clock()
        then, count = self._counted
        if not then <= now < then + _COUNTED_S:
            count = len(self.peers())
            self._counted = (now, count)
        return count

    def without_ipfs(self) -> list[Peer]:
        """Those of `peers()` that pubsub does not reach."""
        return [self._known[node] for node in self._without_ipfs if self.alive(node)]

    def remembered(self) -> list[Peer]:
        """Every node of the last week, the latest heard first: ways back into the swarm."""
        return sorted(self._known.values(), key=lambda peer: peer.expires, reverse=True)

    def offers(self) -> list[Offer]:
        """What the other nodes offer now. A model that stands on two pages of a node is there once."""
        self._sweep(self._clock())
        generation, offers = self._offers
        if generation != self._catalogue.generation:
            offers = self._catalogue.all()
            self._offers = (self._catalogue.generation, offers)
        return list(offers)

    def offers_about(self, wanted: str, local: Iterable[Offer] = ()) -> list[Offer]:
        """Those of `offers()` that matter for a code, CID, magnet or name, see registry/catalogue.py. Raises `Malformed`."""
        self._sweep(self._clock())
        return self._catalogue.about(wanted, local)

    def behind(self) -> dict[str, tuple[int, ...]]:
        """The pages that are missing of live nodes, by node."""
        now = self._clock()
        return {node: pages for node, pages in self._behind.items() if self._known[node].expires > now}

    def is_behind(self, node: str) -> bool:
        """Whether a page of that node is missing."""
        return node in self._behind

    def have(self) -> dict[str, int]:
        """The sequence number of the newest word of each live node, by `rules.node_id`."""
        return {rules.node_id(peer.node): peer.sequence for peer in self.peers()}

    def want(self, most: int, first: str = "") -> dict[str, Sequence[int]]:
        """The pages that are missing of at most that many live nodes, by `rules.node_id`: of the `first`, if some are, and of
        the others as chance decides.
        """
        behind = self.behind()
        nodes = self._random.sample(list(behind), min(most, len(behind)))
        if first in behind:
            nodes = list(dict.fromkeys([first, *nodes]))[:most]
        return {rules.node_id(node): behind[node] for node in nodes}

    def news(
        self,
        have: Mapping[str, int] | None,
        want: Mapping[str, Collection[int]],
        *,
        codes: Iterable[str] = (),
        limit: int | None = None,
    ) -> dict[str, list[bytes]]:
        """The signed words of live nodes, by node, that somebody lacks: who has heard `have` (see there) and asks for `want`.

        Without `have` only the nodes in `want` count. The newest word of a node comes before its pages. Beyond `limit` bytes
        there is no more; the nodes that offer a model with one of the `codes` come first, the others in another order each
        time, so that every one gets its turn.
        """
        now = self._clock()
        found: dict[str, list[bytes]] = {}
        size = 0
        nodes = list(self._entries)
        if have is None:
            nodes = [self._names[name] for name in want if name in self._names]
        sought = [node for code in codes for node, _ in self._catalogue.pages_with(code)]
        for node in dict.fromkeys([*sought, *self._random.sample(nodes, len(nodes))]):
            entry, name = self._entries[node], rules.node_id(node)
            if entry.head is None or entry.peer.expires <= now:
                continue
            wanted = want.get(name, ())
            heard = have.get(name, 0) if have is not None else entry.peer.sequence
            if entry.peer.sequence <= heard and not wanted:
                continue
            words = entry.lacked(entry.head, heard, wanted)
            found[node] = words
            size += sum(map(len, words))
            if limit is not None and size > limit:
                break
        return found

    def pages_with(self, codes: Iterable[str]) -> set[bytes]:
        """The signed pages with an offer of a model that has one of these codes, in full or their first characters."""
        found: set[bytes] = set()
        for code in codes:
            for node, number in self._catalogue.pages_with(code):
                found.add(self._entries[node].pages[number].envelope)
        return found

    def envelopes(self) -> dict[str, list[bytes]]:
        """All that may be passed on to others, by node."""
        return self.news({}, {})

    def stats(self) -> dict[str, Stats]:
        """What asking each node was like since the start, for routing."""
        return dict(self._stats)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _holds(self, entry: Entry, said: Announcement) -> bool:
        page = entry.pages.get(-1 if said.page is None else said.page)
        return page is not None and page.revision == said.sequence

    def _hear(self, said: Announcement, envelope: bytes, now: float) -> None:
        """The newest word of a node."""
        node = said.node
        peer = Peer(
            node, said.peer_id, said.address, said.sequence, said.expires, said.seal_keys,
            said.relay, said.revisions,
        )  # fmt: skip
        entry = self._entries.get(node)
        if entry is None:
            entry = self._entries[node] = Entry(peer, envelope, now)
            self._names[rules.node_id(node)] = node
        entry.peer, entry.head, entry.heard = peer, envelope, now
        self._known[node] = peer
        if peer.peer_id is None:
            self._without_ipfs[node] = None
        else:
            self._without_ipfs.pop(node, None)
        for number in list(entry.pages):
            page = entry.pages[number]
            if number >= len(said.revisions):
                self._drop(node, number)
            elif said.revisions[number] == page.revision:
                page.expires = said.expires
                if page.expires < page.look_at:
                    self._look_again(node, number, page)

    def _put(
        self, node: str, number: int, revision: int, offers: tuple[Offer, ...], envelope: bytes
    ) -> None:
        entry = self._entries[node]
        self._place(node, number, Page(revision, entry.peer.expires, offers, envelope))

    def _drop(self, node: str, number: int) -> None:
        self._bytes -= len(self._entries[node].pages.pop(number).envelope)
        self._catalogue.take((node, number))
        self._mirror.note(node, number)

    def _remember(self, stored: StoredPage, now: int) -> None:
        """A page of the ledger, if it lives."""
        entry = self._entries.get(stored.node)
        if entry is None:
            return
        named = (*entry.peer.revisions, *[0] * rules.MAX_PAGES)[stored.page] == stored.revision
        expires = entry.peer.expires if named else stored.expires
        if expires <= now:
            return
        try:
            offers = rules.read(stored.envelope).offers
        except (Malformed, NotVerified):  # a damaged row is like a page that never came
            return
        page = Page(stored.revision, expires, offers, stored.envelope)
        self._place(stored.node, stored.page, page)

    def _place(self, node: str, number: int, page: Page) -> None:
        pages = self._entries[node].pages
        self._bytes += len(page.envelope)
        if number in pages:
            self._bytes -= len(pages[number].envelope)
        pages[number] = page
        self._catalogue.put((node, number), page.offers)
        self._look_again(node, number, page)

    def _note_behind(self, node: str) -> None:
        missing = self._entries[node].missing()
        if missing:
            self._behind[node] = missing
        else:
            self._behind.pop(node, None)

    def _look_again(self, node: str, number: int, page: Page) -> None:
        page.look_at = page.expires
        heapq.heappush(self._ends, (page.look_at, node, number))

    def _sweep(self, now: float) -> None:
        """Drop the pages that have expired. A beat that prolongs a page leaves its place in the heap alone until then."""
        while self._ends and self._ends[0][0] <= now:
            look_at, node, number = heapq.heappop(self._ends)
            entry = self._entries.get(node)
            page = entry.pages.get(number) if entry is not None else None
            if page is None or page.look_at != look_at:
                continue  # it is gone, or another place in the heap is its own
            if page.expires <= now:
                self._drop(node, number)
                self._note_behind(node)
            else:
                self._look_again(node, number, page)

    def _make_room(self, said: Announcement, size: int, now: float) -> None:
        """Raises `Busy` when there is no place for what was said."""
        if self._stays(said.node):
            return
        self._sweep(now)
        entry = self._entries.get(said.node)
        if entry is None and len(self._entries) >= self._limit:
            self._evict(now, said.node, "this node knows as many others as it keeps")
        if said.page is None:
            return
        old = entry.pages.get(said.page) if entry is not None else None
        offers = len(said.offers) - (len(old.offers) if old is not None else 0)
        size -= len(old.envelope) if old is not None else 0
        while (
            self._catalogue.count + offers > self._offers_limit
            or self._bytes + size > self._offers_limit * OFFER_BYTES
        ) and (offers > 0 or size > 0):
            self._evict(now, said.node, "more models are announced than this node keeps", offering=True)

    def _evict(self, now: float, newcomer: str, why: str, *, offering: bool = False) -> None:
        """Forget the node that makes room. Raises `Busy` when none does."""
        gives = [
            (entry.peer.expires > now, entry.peer.expires if entry.peer.expires <= now else entry.heard, node)
            for node, entry in self._entries.items()
            if node != newcomer and (entry.pages or not offering) and self._gives_way(node, entry, now)
        ]
        if not gives:
            raise Busy("announcement", why)
        self._forget(min(gives)[2])

    def _gives_way(self, node: str, entry: Entry, now: float) -> bool:
        if self._stays(node):
            return False
        if entry.peer.expires <= now:
            return True
        proven = node in self._stats and self._stats[node].successes > 0
        return not proven and now - entry.heard >= SILENT_S

    def _stays(self, node: str) -> bool:
        return node in self._joined or self._standing(node) == "trusted"

    def _forget(self, node: str) -> None:
        for number in list(self._entries[node].pages):
            self._drop(node, number)
        del self._entries[node], self._known[node]
        self._names.pop(rules.node_id(node), None)
        self._stats.pop(node, None)
        self._behind.pop(node, None)
        self._without_ipfs.pop(node, None)
        self._mirror.note(node)
        self.on_forget(node)
