"""The BitTorrent DHT (BEP 5) as a meeting place: who announced which port under a key.

    off       this network has no DHT: everything here does nothing
    joining   no node has answered yet; announcing and finding wait
    ready     there are nodes in the routing table

Who is asked for a way in, in this order: the nodes of the last run (libtorrent gets them as it
starts), those that the owner names with `add_nodes`, the bootstrap list. libtorrent is never given
a name to look up: it would hold the whole DHT back until the resolver answers or gives up. What the
DHT says is a hint, from anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import libtorrent as lt

from daemon.errors import Unavailable
from daemon.supervise import Supervisor
from daemon.torrent import dht_state, network
from daemon.torrent.resolving import look_up
from daemon.torrent.search import MAX_FOUND, Peer, Search

__all__ = ["KEY", "MAX_FOUND", "Dht"]

KEY = 20  # bytes
_MAX_HINTS = 64  # nodes named by the owner that are kept for another try
_MAX_ADDRESSES = 8  # of our own, as others say they see them
_ENOUGH = 8  # nodes (one bucket): with fewer, we may be an island, and the list is asked again
_PATIENCE_S = 2.0  # for the nodes of the last run to answer, before the list is asked
_RETRY_S = (5.0, 300.0)  # between two rounds of asking the list: first, longest
_SAVE_S = (30.0, 600.0)  # after which the nodes are written: first, then again and again


class Dht:
    """The DHT of one libtorrent session, which calls `params`, `attach`, `poll`, `on_*` and `close`.

    `bootstrap` is (host, port) pairs; `state` the file in which nodes are remembered, None for no
    such file.
    """

    def __init__(
        self, *, enabled: bool, bootstrap: Sequence[tuple[str, int]], state: Path | None
    ) -> None:
        self.enabled = enabled
        self._bootstrap = tuple(bootstrap)
        self._file = state
        self._remembers = False
        self._session: Any = None
        self._nodes = 0
        self._hints: dict[Peer, None] = {}
        self._looked_up: set[str] = set()  # names that the resolver has not answered for yet
        self._addresses: dict[str, None] = {}
        self._searches: dict[bytes, list[Search]] = {}
        self._rounds = [0, 0]  # of `poll`: begun, reported
        self._active = 0  # lookups that libtorrent reported in this round
        self._has_nodes = asyncio.Event()
        self._has_few = asyncio.Event()
        self._has_few.set()
        self._closing = False
        self._tasks = Supervisor()

    # -- what is known ----------------------------------------------------------------------------

    @property
    def nodes(self) -> int:
        """Nodes in the routing tables, IPv4 and IPv6 together; up to half a second old."""
        return self._nodes

    @property
    def state(self) -> Literal["off", "joining", "ready"]:
        if not self.enabled:
            return "off"
        return "ready" if self._nodes else "joining"

    @property
    def external_addresses(self) -> tuple[str, ...]:
        """Our addresses as peers and DHT nodes say they see them, the latest last: a hint."""
        return tuple(self._addresses)

    def status(self) -> dict[str, Any]:
        return {"enabled": self.enabled, "nodes": self._nodes, "state": self.state}

    # -- meeting ----------------------------------------------------------------------------------

    async def announce(self, key: bytes, port: int) -> None:
        """Have TCP `port` of this node's address found under `key` (20 bytes).

        Waits until the DHT has nodes, however long, and returns when the lookup for those near the
        key has begun. They are told at its end, which nobody confirms: up to 15 s later where one
        of them does not answer. Nodes forget it after about half an hour. Does nothing where
        `enabled` is False. Raises `Unavailable` when the session closes.
        """
        name = _sha1(key)
        if not self.enabled:
            return
        await self._until_nodes()
        self._session.dht_announce(name, port, 0)

    async def find(self, key: bytes, *, deadline_s: float) -> AsyncIterator[Peer]:
        """Who announced itself under `key` (20 bytes): (IP, port) as they come, `MAX_FOUND` at most.

        Waits for the DHT to have nodes first. Ends when all nodes near the key have answered or 15
        s have passed without, at the deadline, and at once where `enabled` is False. libtorrent
        only says how many lookups run: while there are others, ours may last until the deadline.
        Addresses may be anything, private ones too. Raises `Unavailable` when the session closes.
        """
        name = _sha1(key)
        ends = asyncio.get_running_loop().time() + deadline_s
        if not self.enabled or not await self._nodes_by(ends):
            return
        search = Search(self._rounds[0])
        self._searches.setdefault(key, []).append(search)
        try:
            self._session.dht_get_peers(name)
            while (peer := await search.next(ends)) is not None:
                yield peer
            self._raise_if_closing()
        finally:
            self._forget(key, search)

    def add_nodes(self, nodes: Iterable[Peer]) -> None:
        """Ask these too: (IP, UDP port) of nodes that may be good. Names are left out."""
        if not self.enabled:
            return
        for node in network.addresses(nodes):
            self._hints.pop(node, None)
            self._hints[node] = None  # behind the others, and the first is the oldest
            if len(self._hints) > _MAX_HINTS:
                del self._hints[next(iter(self._hints))]
            self._ask(node)

    def _forget(self, key: bytes, search: Search) -> None:
        searches = self._searches[key]
        searches.remove(search)
        if not searches:
            del self._searches[key]

    async def _nodes_by(self, ends: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(ends):
                await self._until_nodes()
        return self._nodes > 0

    async def _until_nodes(self) -> None:
        self._raise_if_closing()
        await self._has_nodes.wait()
        self._raise_if_closing()

    def _raise_if_closing(self) -> None:
        if self._closing:
            raise Unavailable("the BitTorrent DHT", "the session is closing")

    # -- life -------------------------------------------------------------------------------------

    def params(self) -> Any:
        """What libtorrent's session is made from, with the nodes of the last run. Blocks."""
        found, self._remembers = dht_state.read(self._file if self.enabled else None)
        return found

    def attach(self, session: Any) -> None:
        """`session` runs now."""
        self._session = session
        if not self.enabled:
            return
        # Not by the settings that the session is made with: libtorrent 2.1.1 then starts the DHT
        # before it has taken the nodes of the last run, and begins without them.
        session.apply_settings({"enable_dht": True})
        for node in self._hints:
            self._ask(node)
        self._tasks.run("dht: way in", self._join, restart=True)
        if self._file is not None:
            self._tasks.run("dht: remember nodes", self._remember, restart=True)

    async def close(self) -> None:
        """End all who wait, and write the nodes. libtorrent must still run. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._has_nodes.set()  # whoever waits for nodes finds the session closing
        for searches in self._searches.values():
            for search in searches:
                search.end()
        await self._tasks.close()
        session, self._session = self._session, None
        if session is not None and self._nodes and self._file is not None:
            await asyncio.to_thread(dht_state.save, self._file, session)

    async def _join(self) -> None:
        """Ask for a way in while there are few nodes, less and less often."""
        if self._remembers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    await self._has_nodes.wait()
        first, longest = _RETRY_S
        pause = first
        while True:
            await self._has_few.wait()
            self._ask_all()
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest) if self._has_few.is_set() else first

    def _ask_all(self) -> None:
        for node in self._hints:
            self._ask(node)
        for host, port in self._bootstrap:
            if _is_address(host):
                self._ask((host, port))
            elif host not in self._looked_up:
                self._looked_up.add(host)
                look_up(host, port, self._on_looked_up)

    def _on_looked_up(self, host: str, addresses: Sequence[Peer]) -> None:
        self._looked_up.discard(host)
        for node in network.addresses(addresses):
            self._ask(node)

    def _ask(self, node: Peer) -> None:
        if self._session is not None and not self._closing:
            self._session.add_dht_node(node)

    async def _remember(self) -> None:
        assert self._file is not None
        pause, later = _SAVE_S
        while True:
            await asyncio.sleep(pause)
            if self._nodes:
                await asyncio.to_thread(dht_state.save, self._file, self._session)
                pause = later

    # -- what libtorrent reports ------------------------------------------------------------------

    def poll(self) -> None:
        """Ask libtorrent for numbers. Its answers come in the order of the questions."""
        if not self.enabled or self._closing:
            return
        self._rounds[0] += 1
        if self._searches:
            self._session.post_dht_stats()
        self._session.post_session_stats()

    def on_reply(self, key: bytes, peers: Sequence[Peer]) -> None:
        """What one node answered. Announcing asks too, so keys that nobody searches come here."""
        for search in self._searches.get(key, ()):
            search.add(peers)

    def on_lookups(self, types: Sequence[str]) -> None:
        """The kinds of lookups that run, for one of our addresses."""
        self._active += sum(kind.endswith("get_peers") for kind in types)

    def on_nodes(self, nodes: int) -> None:
        """How many nodes there are; the last report of a round."""
        if self._closing:
            return
        self._rounds[1] += 1
        active, self._active = self._active, 0
        if nodes and not self._nodes:
            # The one that answered names others, but libtorrent would look at one of them every 5
            # s. A lookup asks all.
            self._session.dht_get_peers(_sha1(random.randbytes(KEY)))
        self._nodes = nodes
        _set(self._has_nodes, nodes > 0)
        _set(self._has_few, nodes < _ENOUGH)
        if active == 0:
            self._end_searches()

    def _end_searches(self) -> None:
        for searches in self._searches.values():
            for search in searches:
                if search.born < self._rounds[1]:  # this round was asked for after it began
                    search.end()

    def on_external_address(self, address: str) -> None:
        """Somebody sees us at `address`."""
        self._addresses.pop(address, None)
        self._addresses[address] = None
        if len(self._addresses) > _MAX_ADDRESSES:
            del self._addresses[next(iter(self._addresses))]


def _sha1(key: bytes) -> Any:
    if len(key) != KEY:
        raise ValueError(f"a DHT key has {KEY} bytes, not {len(key)}")
    return lt.sha1_hash(key)


def _set(event: asyncio.Event, wanted: bool) -> None:
    if wanted:
        event.set()
    else:
        event.clear()


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
