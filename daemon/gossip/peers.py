"""What is known of the other nodes: their addresses, keys and offers, in memory, and in the ledger over restarts.

- A newer page replaces the page of that number; pages beyond the number that the node has now are dropped.
- Offers live as long as their announcement. The node and its sequence number are kept for a week: its address is a way
  back into the swarm, and the number keeps old announcements from being believed again.
- The table is bounded. When it is full, a newcomer takes the place of a node that has expired, else it is refused: many
  invented nodes cannot push out those that are there. Trusted nodes always find a place and never lose it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from daemon.errors import Busy, Refused
from daemon.ledger import LedgerThread
from registry import announcement as rules
from registry.records import Announcement, Offer, Peer
from registry.routing import Stats
from registry.store import Ledger

Standing = Literal["trusted", "blocked"]

PEERS_LIMIT = 1024  # nodes
OFFERS_LIMIT = 16_384  # over all nodes
REMEMBER_S = 7 * 24 * 3600  # a silent node is forgotten after this
_LATENCY_WEIGHT = 0.3  # of the newest measurement
_QUESTIONS_COUNTED = 32


@dataclass(frozen=True, slots=True)
class _Page:
    expires: int
    offers: tuple[Offer, ...]
    envelope: bytes | None  # None when it comes from the ledger


class PeerTable:
    """`own` is our node key; `standing` says what the operator thinks of a key; `clock` gives unix seconds."""

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
        self._ledger = ledger
        self._own = own
        self._clock = clock
        self._standing = standing
        self._limit = limit
        self._offers_limit = offers_limit
        self._peers: dict[str, Peer] = {}
        self._pages: dict[str, dict[int, _Page]] = {}
        self._stats: dict[str, Stats] = {}

    async def open(self) -> None:
        """Take in what the ledger remembers. Call once."""
        now = int(self._clock())
        await self._ledger.call(Ledger.forget_peers, now - REMEMBER_S)
        for peer in (await self._ledger.call(Ledger.peers))[: self._limit]:
            self._peers[peer.node] = peer
        by_node: dict[str, list[Offer]] = {}
        for offer in await self._ledger.call(Ledger.offers, now):
            by_node.setdefault(offer.node, []).append(offer)
        for node, offers in by_node.items():
            if node in self._peers:
                # Which page they stood on does not matter: the next announcement replaces them all.
                self._pages[node] = {-1: _Page(self._peers[node].expires, tuple(offers), None)}

    async def accept(self, envelope: bytes) -> Announcement:
        """Believe `envelope` if the rules of registry/announcement.py hold, and remember it.

        Raises `Malformed`, `NotVerified`, `Stale`; `Refused` for a blocked node and `Busy` when the table is full.
        """
        now = int(self._clock())
        said = rules.accept(envelope, now=now, known=self._peers, own=self._own)
        standing = self._standing(said.node)
        if standing == "blocked":
            raise Refused("announcement", "the node is blocked here")
        self._make_room(said, standing, now)
        peer = Peer(
            said.node, said.peer_id, said.address, said.sequence, said.expires, said.seal_keys, said.relay
        )
        self._peers[said.node] = peer
        pages = {
            number: page for number, page in self._pages.get(said.node, {}).items() if 0 <= number < said.pages and page.expires > now
        }
        pages[said.page] = _Page(said.expires, said.offers, envelope)
        self._pages[said.node] = pages
        await self._ledger.call(Ledger.save_peer, peer, said.page, said.offers, said.pages)
        return said

    def peer(self, node: str) -> Peer | None:
        """A node that was heard of in the last week, announced now or not."""
        return self._peers.get(node)

    def peers(self) -> list[Peer]:
        """Nodes whose announcement has not expired."""
        now = self._clock()
        return [peer for peer in self._peers.values() if peer.expires > now]

    def remembered(self) -> list[Peer]:
        """Every node of the last week, the latest heard first: ways back into the swarm."""
        return sorted(self._peers.values(), key=lambda peer: peer.expires, reverse=True)

    def offers(self) -> list[Offer]:
        """What the other nodes offer now. A model that stands on two pages of a node is there once."""
        found: dict[tuple[str, str], Offer] = {}
        for pages in self._live_pages().values():
            for page in pages:
                found |= {(offer.node, offer.cid): offer for offer in page.offers}
        return list(found.values())

    def envelopes(self) -> dict[str, list[bytes]]:
        """The signed pages that are in force, by node, each in its order: what may be passed on to others."""
        found: dict[str, list[bytes]] = {}
        for node, pages in self._live_pages().items():
            kept = [page.envelope for page in pages if page.envelope is not None]
            if kept:
                found[node] = kept
        return found

    def stats(self) -> dict[str, Stats]:
        """What asking each node was like since the start, for routing."""
        return dict(self._stats)

    def record(self, node: str, latency_s: float | None, *, ok: bool) -> None:
        """One question to `node`: seconds to its first token (None when there was none), and whether it ended well."""
        if node not in self._peers:
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

    async def prune(self) -> None:
        """Let go of what has expired; called now and then."""
        now = int(self._clock())
        for node, pages in list(self._pages.items()):
            live = {number: page for number, page in pages.items() if page.expires > now}
            if live:
                self._pages[node] = live
            else:
                del self._pages[node]
        for node in [node for node, peer in self._peers.items() if peer.expires < now - REMEMBER_S]:
            self._forget(node)
        await self._ledger.call(Ledger.forget_peers, now - REMEMBER_S)

    def _live_pages(self) -> dict[str, list[_Page]]:
        now = self._clock()
        return {
            node: [page for number, page in sorted(pages.items()) if page.expires > now]
            for node, pages in self._pages.items()
        }

    def _make_room(self, said: Announcement, standing: Standing | None, now: int) -> None:
        """Raises `Busy` when there is no place for what was said."""
        if standing == "trusted":
            return
        others = (page for node, pages in self._pages.items() for number, page in pages.items() if (node, number) != (said.node, said.page))
        held = sum(len(page.offers) for page in others)
        if held + len(said.offers) > self._offers_limit:
            raise Busy("announcement", "more models are announced than this node keeps")
        if said.node in self._peers or len(self._peers) < self._limit:
            return
        expired = (peer for peer in self._peers.values() if peer.expires <= now and self._standing(peer.node) != "trusted")
        oldest = min(expired, key=lambda peer: peer.expires, default=None)
        if oldest is None:
            raise Busy("announcement", "this node knows as many others as it keeps")
        self._forget(oldest.node)

    def _forget(self, node: str) -> None:
        del self._peers[node]
        self._pages.pop(node, None)
        self._stats.pop(node, None)

