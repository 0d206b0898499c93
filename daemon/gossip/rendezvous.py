"""Rendezvous: finding others, and being found, with nobody to ask but the DHTs.

A node that others can dial announces the port of its peer API on the BitTorrent DHT, under a key of the swarm and one per code of
the models that it shares; so do the relays of a node that nobody can dial, at its signed request, with their own port. On
IPFS every node gives provider records for a small block of the swarm and one per code. Either network is enough alone.

What a DHT says is a hint and nothing more: whoever is named there is asked for its pages, and nothing counts that is not signed.
The work is bounded, however many lies there are: each address is tried once, a few at a time and drawn by chance, until what was
looked for is heard of. docs/network.md tells who can see what.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from daemon.config import Network
from daemon.errors import SwarmError, Unserved
from daemon.gossip.meeting import Meeting
from daemon.gossip.searching import POOL, Crowd, SharedSearch
from daemon.ipfs.interface import IpfsNode
from daemon.membership import Membership
from daemon.network import url as url_of
from registry import codes, ranges
from registry.cid import leaf_cid
from registry.records import Address, Offer
from registry.refs import CidRef, CodeRef, MagnetRef, parse_ref

_log = logging.getLogger(__name__)

Search = Callable[[str | None, Callable[[], bool]], Awaitable[None]]  # `Rendezvous.search`

SWARM = "swarm"
_BY_CODE = "code:"
MAX_KEYS = 256  # of ours and of those whom we carry for, on each DHT
AGAIN_S = 15 * 60.0  # BitTorrent's DHT forgets after about half an hour
SEARCH_S = 60.0
_BITTORRENT_S = 25.0  # its DHT is entered within 15 s, and asked within 2
_MEET_S = 4.0
_PACE_S = 0.05  # between two announcements
_PROVIDE_S = 20.0
_LOOK_S = 1.0
_RETRY_S = 30.0


class BitTorrentDht(Protocol):
    """What is needed of daemon/torrent/dht.py."""

    enabled: bool

    async def announce(self, key: bytes, port: int) -> None: ...
    def find(self, key: bytes, *, deadline_s: float) -> AsyncIterator[tuple[str, int]]: ...


class Rendezvous:
    """`offers` gives ours, `carried` the codes of the nodes that we carry for, in order of urgency, `port` the port at which others
    reach our peer API (None: they do not), `external` our own addresses. A network without DHTs has neither `dht` nor `ipfs`. Where
    `enabled` is False nothing is announced; looking goes on.
    """

    def __init__(
        self,
        membership: Membership,
        meeting: Meeting,
        *,
        network: Network,
        dht: BitTorrentDht | None,
        ipfs: Callable[[], IpfsNode | None],
        offers: Callable[[], Sequence[Offer]],
        carried: Callable[[], Iterable[str]],
        port: Callable[[], int | None],
        external: Callable[[], Sequence[str]],
        enabled: bool,
    ) -> None:
        self._membership = membership
        self._meeting = meeting
        self._network: Network = network
        self._dht = dht
        self._ipfs = ipfs
        self._offers = offers
        self._carried = carried
        self._port = port
        self._external = external
        self._enabled = enabled
        self._announced: dict[str, float] = {}  # on the BitTorrent DHT: monotonic seconds
        self._announced_at: tuple[object, ...] = ()  # where we were then
        self._provided: dict[str, str] = {}  # on IPFS: CID by what
        self._failed: dict[str, float] = {}
        self._searches: dict[str, SharedSearch] = {}  # that somebody may still join
        self._tasks: set[asyncio.Task[None]] = set()

    # -- being found --------------------------------------------------------------------------------------------------

    def keys(self) -> list[str]:
        """What we are to be found under, the most important first."""
        ours = sorted(self._offers(), key=lambda offer: not offer.serving)
        own = (code for offer in ours for code in codes.codes_of(offer.cid, offer.infohash_v2))
        wanted = [*own, *self._carried()]
        short = (_BY_CODE + codes.short(code) for code in wanted)
        return list(dict.fromkeys([SWARM, *short]))[:MAX_KEYS]

    @property
    def pinned(self) -> frozenset[str]:
        """CIDs of the blocks that IPFS keeps for us, and of those that it is about to."""
        wanted = self.keys() if self._enabled else []
        due = (leaf_cid(self._membership.rendezvous_block(what)) for what in wanted)
        return frozenset([*self._provided.values(), *due])

    async def announce_forever(self) -> None:
        """Supervised. Without rendezvous it ends at once."""
        if not self._enabled:
            return
        while True:
            await self._announce_due()
            await asyncio.sleep(_LOOK_S)

    async def provide_forever(self) -> None:
        """The same on IPFS. Supervised."""
        if not self._enabled:
            return
        while True:
            node = self._ipfs()
            if node is not None:
                await self._provide_due(node)
            await asyncio.sleep(_LOOK_S)

    def forget_provided(self) -> None:
        """IPFS starts anew: what it was told is told again."""
        self._provided.clear()
        self._failed.clear()

    async def _announce_due(self) -> None:
        port = self._port()
        if self._dht is None or port is None:
            return
        keys = self.keys()
        self._forget_announced(port, frozenset(keys))
        for what in keys:
            if what in self._announced:
                continue
            await self._dht.announce(self._membership.rendezvous_key(what), port)
            self._announced[what] = time.monotonic()
            await asyncio.sleep(_PACE_S)

    def _forget_announced(self, port: int, keys: Collection[str]) -> None:
        """What the DHT forgets is announced again; and everything, where we are found at another address or port.

        What is not among `keys` any more is not kept.
        """
        now_at = (port, *self._external()[:1])
        if now_at != self._announced_at:
            self._announced_at = now_at
            self._announced.clear()
        oldest = time.monotonic() - AGAIN_S
        self._announced = {
            what: then for what, then in self._announced.items() if then > oldest and what in keys
        }

    async def _provide_due(self, node: IpfsNode) -> None:
        keys = self.keys()
        for gone in [what for what in self._provided if what not in keys]:
            await node.unprovide(self._provided.pop(gone))
        self._failed = {what: then for what, then in self._failed.items() if what in keys}
        for what in keys:
            due = time.monotonic() > self._failed.get(what, -_RETRY_S) + _RETRY_S
            if what in self._provided or not due:
                continue
            try:
                block = self._membership.rendezvous_block(what)
                self._provided[what] = await node.provide(block, deadline_s=_PROVIDE_S)
                self._failed.pop(what, None)
            except Unserved as error:
                _log.debug("nobody could be told of %s: %s", what, error)
                self._failed[what] = time.monotonic()
                return  # nor of the others, now

    # -- finding ------------------------------------------------------------------------------------------------------

    async def search(self, ref: str | None, found: Callable[[], bool]) -> None:
        """Meet whoever is named under what `ref` means (None, or a name: under the swarm), until `found()` or nobody is left.

        Takes at most `SEARCH_S`. Searches for the same are one, which goes on until each has found what it is after. Where there
        is no DHT it returns at once. Raises `Malformed` for what is no reference.
        """
        what = _what(ref)
        shared = self._searches.get(what)
        if shared is None:
            shared = self._searches[what] = SharedSearch()
            self._run(shared, what)
        await shared.wait(found)

    async def close(self) -> None:
        for running in self._tasks:
            running.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _run(self, shared: SharedSearch, what: str) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            shared.ended(task)

        def nobody_waits() -> None:
            if self._searches.get(what) is shared:
                del self._searches[what]

        shared.task = asyncio.create_task(self._search(what, shared.is_over), name=f"search {what}")
        shared.on_over = nobody_waits
        self._tasks.add(shared.task)
        shared.task.add_done_callback(ended)

    async def _search(self, what: str, found: Callable[[], bool]) -> None:
        crowd = Crowd(partial(self._meet, _codes(what)), found)
        hints: list[Coroutine[Any, Any, None]] = []
        if self._dht is not None and self._dht.enabled:
            hints.append(self._ask_bittorrent(self._dht, what, crowd))
        node = self._ipfs()
        if node is not None:
            hints.append(self._ask_ipfs(node, what, crowd))
        try:
            async with asyncio.timeout(SEARCH_S):
                await crowd.gather(hints)
        except TimeoutError:
            _log.info("the search for %s took too long", what)

    async def _ask_bittorrent(self, dht: BitTorrentDht, what: str, crowd: Crowd) -> None:
        key = self._membership.rendezvous_key(what)
        with suppress(SwarmError):  # the session closes
            async for host, port in dht.find(key, deadline_s=_BITTORRENT_S):
                own = host in self._external() and port == self._port()
                if not own and ranges.allows(self._network, host):
                    crowd.add(Address("", http=(url_of(host, port),)))

    async def _ask_ipfs(self, node: IpfsNode, what: str, crowd: Crowd) -> None:
        cid = leaf_cid(self._membership.rendezvous_block(what))
        with suppress(SwarmError):  # IPFS goes away
            async for one in node.providers(cid, limit=POOL, deadline_s=SEARCH_S):
                allowed = (a for a in one.addresses if ranges.allows_multiaddr(self._network, a))
                # Without an address the DHT may still know one.
                addresses = tuple(allowed) or (f"/p2p/{one.peer_id}",)
                crowd.add(Address("", ipfs=addresses))

    async def _meet(self, codes: Sequence[str], address: Address) -> None:
        await self._meeting.meet(address, codes=codes, deadline_s=_MEET_S)


def _what(ref: str | None) -> str:
    """The name of the key under which holders of what `ref` means are to be found."""
    code: str | None = None
    match parse_ref(ref) if ref is not None else None:
        case CodeRef(code=text):
            code = text
        case CidRef(cid=cid):
            code = codes.code_of_cid(cid)
        case MagnetRef(infohash_v2=str(infohash)):
            code = codes.code_of_infohash_v2(infohash)
    return SWARM if code is None else _BY_CODE + codes.short(code)


def _codes(what: str) -> tuple[str, ...]:
    """The short code in the name of a key; none in that of the swarm."""
    return (what.removeprefix(_BY_CODE),) if what.startswith(_BY_CODE) else ()
