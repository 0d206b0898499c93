"""One download under way: which source draws when, what is counted, and when it is over.

IPFS has a head start. BitTorrent joins when IPFS stalls, fails or is absent, and when IPFS alone would take long: from then
on both draw, and whichever dies, nothing verified is fetched again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from daemon.errors import SwarmError, Unavailable, Unserved
from daemon.ipfs.interface import IpfsNode
from daemon.torrent.download import Download
from daemon.transfer.sources import IpfsSource, PieceSink, RateLimit, unwrap
from daemon.transfer.transfers import Transfer
from registry.records import Peer

log = logging.getLogger(__name__)

_HEAD_START_S = 3.0  # of IPFS before BitTorrent is thought of
_SHORT_S = 10.0  # what IPFS alone may still take without BitTorrent's help
_PATIENCE = 6  # stall times that a slow IPFS range may be silent before it is given back
_CONNECT_S = 3.0


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds without a byte: after `stall` the next source joins, after `give_up` the pull fails (and can go on later)."""

    stall: float
    give_up: float


@dataclass(frozen=True, slots=True)
class Sources:
    """What every download draws from. `ipfs` gives the node while it answers; `limit` is shared by all downloads."""

    ipfs: Callable[[], IpfsNode | None]
    ipfs_enabled: bool
    limit: RateLimit
    patience: Patience


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file. `holders` gives who is known to have it by now, `peers` (IP, port) those of them on BitTorrent."""

    what: str
    size: int  # bytes
    cid: str | None
    holders: Callable[[], Sequence[Peer]]
    peers: Callable[[], Sequence[tuple[str, int]]]


class Fetch:
    """Fills `sink` with what is missing. `download` is the sink where libtorrent is the writer, None where IPFS alone can help."""

    def __init__(self, sources: Sources, wanted: Wanted, transfer: Transfer, sink: PieceSink, download: Download | None) -> None:
        self._sources = sources
        self._wanted = wanted
        self._transfer = transfer
        self._sink = sink
        self._download = download
        self._join = asyncio.Event()
        self._ipfs_done = asyncio.Event()
        self._started = time.monotonic()
        self._last_ipfs = self._last_any = self._started
        self._ipfs_bytes = 0

    async def run(self) -> None:
        self._transfer.sources["disk"] = self._here()
        self._count()
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [group.create_task(self._draw_from_ipfs()), group.create_task(self._watch())]
                if self._download is not None:
                    helpers.append(group.create_task(self._draw_from_peers(self._download)))
                await self._complete()
                for helper in helpers:
                    helper.cancel()
        except BaseExceptionGroup as errors:
            raise unwrap(errors) from errors
        self._count()

    async def _complete(self) -> None:
        if self._download is not None:
            await self._download.finished()
            return
        # Only IPFS fills a leaf sink, and it does not end before nothing is missing.
        await self._ipfs_done.wait()

    async def _draw_from_ipfs(self) -> None:
        pause = 1.0
        cid = self._wanted.cid
        while cid is not None and self._sink.missing():
            node = self._sources.ipfs()
            if node is None:
                self._join.set()
                if not self._sources.ipfs_enabled:
                    return
                await asyncio.sleep(0.5)
                continue
            source = IpfsSource(
                node,
                cid,
                self._wanted.size,
                self._sink,
                self._sources.limit,
                self._from_ipfs,
                stall_s=_PATIENCE * self._sources.patience.stall,
            )
            before = self._ipfs_bytes
            try:
                await self._connect(node)
                await source.run()
            except (Unserved, Unavailable) as error:
                log.info("IPFS does not deliver %s: %s", cid, error)
                self._join.set()
            pause = 1.0 if self._ipfs_bytes > before else min(2 * pause, 30.0)
            if self._sink.missing():
                await asyncio.sleep(pause)
        self._ipfs_done.set()
        self._join.set()

    async def _connect(self, node: IpfsNode) -> None:
        """Bring IPFS to the nodes that are known to have the file; without a DHT nothing else would."""
        near = set(await node.peers())
        far = [a for holder in self._wanted.holders() for a in holder.address.ipfs if a.rpartition("/p2p/")[2] not in near]
        tries = (node.connect(address, deadline_s=_CONNECT_S) for address in far)
        for result in await asyncio.gather(*tries, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, SwarmError):
                raise result

    def _from_ipfs(self, amount: int) -> None:
        self._ipfs_bytes += amount
        self._transfer.sources["ipfs"] += amount
        self._last_ipfs = self._last_any = time.monotonic()

    async def _draw_from_peers(self, download: Download) -> None:
        await self._join.wait()
        while True:
            download.join_swarm(self._wanted.peers())
            await asyncio.sleep(2.0)

    async def _watch(self) -> None:
        patience = self._sources.patience
        while True:
            await asyncio.sleep(0.25)
            received = self._transfer.received
            self._count()
            now = time.monotonic()
            if self._transfer.received > received:
                self._last_any = now
            if now - self._last_any > patience.give_up:
                raise Unserved(
                    self._wanted.what,
                    f"no source gave a byte for {patience.give_up:.0f} s",
                    "pull it again later: it goes on where it was",
                )
            if not self._join.is_set() and self._help_wanted(now):
                self._join.set()
            if self._join.is_set() and self._download is not None:
                self._end_game()

    def _help_wanted(self, now: float) -> bool:
        """IPFS is gone or silent, or would alone still take long after its head start."""
        if self._sources.ipfs() is None:
            return True
        if now - self._last_ipfs > self._sources.patience.stall:
            return True
        elapsed = now - self._started
        if elapsed < _HEAD_START_S:
            return False
        left = self._wanted.size - self._transfer.received
        return left * elapsed > _SHORT_S * max(self._ipfs_bytes, 1)

    def _end_game(self) -> None:
        """What IPFS has taken on and does not bring may come from BitTorrent too."""
        if self._sources.ipfs() is None or time.monotonic() - self._last_ipfs > self._sources.patience.stall:
            self._sink.include(self._sink.missing())

    def _here(self) -> int:
        return self._wanted.size - sum(self._sink.piece_size(piece) for piece in self._sink.missing())

    def _count(self) -> None:
        self._transfer.received = self._here()
        if self._download is not None:
            sources = self._transfer.sources
            sources["bittorrent"] = max(0, self._transfer.received - sources["disk"] - sources["ipfs"])
            self._transfer.peers = self._download.peers
