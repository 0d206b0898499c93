"""One search in the DHT: what is taken of what comes, and when it is over. No libtorrent here."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Sequence

from daemon.torrent import network

MAX_FOUND = 200  # peers per search; a key with more is famous or under attack
_MAX_PER_REPLY = 25  # one lying node shall not be all that is heard
_MAX_PER_ADDRESS = 4  # several nodes live behind one router; hundreds do not

Peer = tuple[str, int]  # IP, port


class Search:
    """Peers as they come, each once. `born`: how many rounds of `Dht.poll` had begun before it."""

    def __init__(self, born: int) -> None:
        self.born = born
        self._waiting: deque[Peer] = deque()
        self._found: set[Peer] = set()
        self._per_address: dict[str, int] = {}
        self._over = False
        self._news = asyncio.Event()

    def add(self, reply: Sequence[Peer]) -> None:
        """What one DHT node answered: a random part of it where it is long.

        Each address has its share before chance decides, so that one host with hundreds of ports pushes nobody out.
        """
        shares: Counter[str] = Counter()
        usable: list[Peer] = []
        for peer in network.addresses(reply):
            shares[peer[0]] += 1
            if shares[peer[0]] <= _MAX_PER_ADDRESS:
                usable.append(peer)
        for peer in random.sample(usable, min(len(usable), _MAX_PER_REPLY)):
            if len(self._found) >= MAX_FOUND:
                self.end()
                return
            self._take(peer)

    def end(self) -> None:
        """Nothing more will come."""
        self._over = True
        self._news.set()

    async def next(self, ends: float) -> Peer | None:
        """The next peer; None when the search is over or the loop's clock reaches `ends`."""
        while not self._waiting:
            if self._over:
                return None
            self._news.clear()
            try:
                async with asyncio.timeout_at(ends):
                    await self._news.wait()
            except TimeoutError:
                return None
        return self._waiting.popleft()

    def _take(self, peer: Peer) -> bool:
        ports = self._per_address.get(peer[0], 0)
        if peer in self._found or ports >= _MAX_PER_ADDRESS:
            return False
        self._per_address[peer[0]] = ports + 1
        self._found.add(peer)
        self._waiting.append(peer)
        self._news.set()
        return True
