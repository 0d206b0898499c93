"""One download under way: which source draws when, what is counted, and when it is over.

IPFS has a head start. BitTorrent joins when IPFS stalls, fails or is absent, and when IPFS alone would take long: from then
on both draw, and whichever dies, nothing verified is fetched again. While neither brings anything, holders are asked over their peer
API, through a relay where its owner allows it: a third node then carries every byte, so it is the last resort.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from daemon.errors import Busy, Declined, SwarmError, Unavailable, Unserved, VerificationError
from daemon.ipfs.interface import IpfsNode
from daemon.torrent.download import Download
from daemon.transfer.holders import HolderReader, Holders, Turns
from daemon.transfer.sources import PieceSink, RangeSource, RateLimit, unwrap
from daemon.transfer.transfers import Transfer
from registry import ranges
from registry.multiaddrs import Network
from registry.records import Peer

log = logging.getLogger(__name__)

_FIRST_BYTE_S = 2.0  # for IPFS or BitTorrent to bring anything at all
_HEAD_START_S = 3.0  # of IPFS before BitTorrent is thought of
_SHORT_S = 10.0  # what IPFS alone may still take without BitTorrent's help
_PATIENCE = 6  # stall times that a slow IPFS range may be silent before it is given back
_CONNECT_S = 3.0
_HOPELESS_S = 15.0  # that no holder can be dialled, and no relay carries bytes of models, until a pull ends
_HOLDER_AGAIN_S = 3.0  # between two tries to reach holders over their peer API
_HOLDER_WORKERS = 2
_HOLDER_RANGE = 4 << 20  # bytes; what a relay has begun to carry it carries to the end of a range


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds without a byte: after `stall` the next source joins, after `give_up` the pull fails (and can go on later)."""

    stall: float
    give_up: float


@dataclass(frozen=True, slots=True)
class Sources:
    """What every download draws from. `ipfs` gives the node while it answers; `limit` is shared by all downloads.

    `network` says where the addresses that holders name for themselves may lead.
    """

    network: Network
    ipfs: Callable[[], IpfsNode | None]
    ipfs_enabled: bool
    holders: Holders
    limit: RateLimit
    patience: Patience


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file. `holders` gives who is known to have it by now, `peers` (IP, port) those of them on BitTorrent.

    `checked`: the sink finds out wrong pieces, so that anybody may bring them.
    """

    what: str
    size: int  # bytes
    cid: str | None
    holders: Callable[[], Sequence[Peer]]
    peers: Callable[[], Sequence[tuple[str, int]]]
    checked: bool = True


def addresses_to_dial(
    holders: Sequence[Peer], connected: Set[str], network: Network
) -> list[str]:
    """Multiaddrs of `holders` that are not `connected` (peer ids), as far as `network` lets them lead.

    They were announced by strangers: in a public network none may send IPFS into the house.
    """
    named = dict.fromkeys(address for holder in holders for address in holder.address.ipfs)
    allowed = (address for address in named if ranges.allows_multiaddr(network, address))
    return [address for address in allowed if address.rpartition("/p2p/")[2] not in connected]


class Fetch:
    """Fills `sink` with what is missing. `download` is the sink where libtorrent is the writer, None where IPFS alone can help."""

    def __init__(self, sources: Sources, wanted: Wanted, transfer: Transfer, sink: PieceSink, download: Download | None) -> None:
        self._sources = sources
        self._wanted = wanted
        self._transfer = transfer
        self._sink = sink
        self._download = download
        self._join = asyncio.Event()
        self._whole = asyncio.Event()
        self._started = time.monotonic()
        self._last_ipfs = self._last_any = self._last_near = self._started
        self._ipfs_bytes = self._from_peers = 0
        self._claimed: set[int] = set()  # pieces that IPFS or a holder is bringing
        self._ipfs_run: asyncio.Task[None] | None = None
        self._from_holder_now: set[int] = set()  # those of them that a holder is bringing
        # Since when all holders are known to be behind relays that carry no bytes of models.
        self._declined_at: float | None = None

    async def run(self) -> None:
        self._transfer.sources["disk"] = self._here()
        self._count()
        try:
            async with asyncio.TaskGroup() as group:
                draws = (self._draw_from_ipfs(), self._draw_from_holders(), self._watch())
                helpers = [group.create_task(draw) for draw in draws]
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
        await self._whole.wait()

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
            source = RangeSource(
                node,
                cid,
                self._wanted.size,
                self._sink,
                self._sources.limit,
                self._from_ipfs,
                stall_s=_PATIENCE * self._sources.patience.stall,
                claimed=self._claimed,
            )
            before = self._ipfs_bytes
            # Bitswap asks whoever it is connected to, also those that come while it asks: nobody waits for the last of them.
            connecting = asyncio.create_task(self._connect(node))
            try:
                await self._until_given_back(source)
            except (Unserved, Unavailable) as error:
                log.info("IPFS does not deliver %s: %s", cid, error)
                self._join.set()
            finally:
                connecting.cancel()
                await asyncio.gather(connecting, return_exceptions=True)
            pause = 1.0 if self._ipfs_bytes > before else min(2 * pause, 30.0)
            if self._sink.missing():
                await asyncio.sleep(pause)
        if not self._sink.missing():
            self._whole.set()
        self._join.set()

    async def _until_given_back(self, source: RangeSource) -> None:
        """Run the source of IPFS, which ends early when others take over what it does not bring."""
        self._ipfs_run = run = asyncio.create_task(source.run())
        try:
            await asyncio.wait({run})
        finally:
            run.cancel()
            await asyncio.wait({run})
        if not run.cancelled():
            run.result()

    async def _connect(self, node: IpfsNode) -> None:
        """Bring IPFS to the nodes that are known to have the file; without a DHT nothing else would."""
        far = addresses_to_dial(self._wanted.holders(), set(await node.peers()), self._sources.network)
        tries = (node.connect(address, deadline_s=_CONNECT_S) for address in far)
        for result in await asyncio.gather(*tries, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, SwarmError):
                raise result

    def _from_ipfs(self, amount: int) -> None:
        self._ipfs_bytes += amount
        self._transfer.sources["ipfs"] += amount
        self._last_ipfs = self._last_any = self._last_near = time.monotonic()

    @property
    def _near_patience_s(self) -> float:
        """How long IPFS and BitTorrent may be silent; less before their first byte, which somebody waits for."""
        stall = self._sources.patience.stall
        return stall if self._last_near > self._started else min(stall, _FIRST_BYTE_S)

    async def _draw_from_holders(self) -> None:
        """Over the peer API of holders, while neither IPFS nor BitTorrent brings anything."""
        cid = self._wanted.cid
        turns = Turns(self._wanted.holders)
        while cid is not None and self._wanted.checked:
            wait = self._last_near + self._near_patience_s - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
                continue
            try:
                async with self._sources.holders.reader(turns.next()) as reader:
                    self._declined_at = None
                    await self._draw_from_holder(reader, cid, turns)
            except (Unserved, Busy) as error:
                log.info("no holder of %s is reached over its peer API: %s", cid, error)
                if not (isinstance(error, Declined) and turns.everybody):
                    self._declined_at = None
                elif self._declined_at is None:
                    self._declined_at = time.monotonic()
            await asyncio.sleep(_HOLDER_AGAIN_S)

    async def _draw_from_holder(self, reader: HolderReader, cid: str, turns: Turns) -> None:
        if self._ipfs_run is not None:
            self._ipfs_run.cancel()  # it is silent: what it waits for is free again
            await asyncio.wait({self._ipfs_run})
        source = self._range_source(reader, cid)
        self._from_holder_now = source.claims
        try:
            await source.run()
        except Unserved as error:
            log.info("a holder does not deliver %s: %s", cid, error)
            turns.pass_over(reader.node)
        except VerificationError as error:
            log.warning("a holder gives wrong bytes of %s and is asked no more: %s", cid, error)
            turns.strike(reader.node)

    def _range_source(self, reader: HolderReader, cid: str) -> RangeSource:
        patience = self._sources.patience
        return RangeSource(
            reader,
            cid,
            self._wanted.size,
            self._sink,
            self._sources.limit,
            self._from_holder,
            stall_s=2 * patience.stall,
            claimed=self._claimed,
            workers=_HOLDER_WORKERS,
            range_size=_HOLDER_RANGE,
            go_on=lambda: time.monotonic() - self._last_near > self._near_patience_s,
        )

    def _from_holder(self, amount: int) -> None:
        self._transfer.sources["https"] += amount
        self._last_any = time.monotonic()

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
            self._raise_if_hopeless(now)
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

    def _raise_if_hopeless(self, now: float) -> None:
        """Nothing can come where only relays lead to the holders and none of them carries bytes of models."""
        if self._declined_at is None or self._transfer.peers > 0:
            return
        if now - max(self._last_any, self._declined_at) > _HOPELESS_S:
            raise Unserved(
                self._wanted.what,
                "no holder can be dialled, and no relay carries model bytes",
                "a public node that holds it, or swarm.relay_bytes on a relay, would help",
            )

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
            free = (piece for piece in self._sink.missing() if piece not in self._from_holder_now)
            self._sink.include(list(free))

    def _here(self) -> int:
        return self._wanted.size - sum(self._sink.piece_size(piece) for piece in self._sink.missing())

    def _count(self) -> None:
        self._transfer.received = self._here()
        if self._download is None:
            if not self._sink.missing():
                self._whole.set()
            return
        sources = self._transfer.sources
        others = sources["disk"] + sources["ipfs"] + sources["https"]
        sources["bittorrent"] = max(0, self._transfer.received - others)
        self._transfer.peers = self._download.peers
        if self._download.received_from_peers > self._from_peers:
            self._from_peers = self._download.received_from_peers
            self._last_near = time.monotonic()
