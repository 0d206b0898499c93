"""`pull`: from a reference to a verified model in the store.

IPFS has a head start. BitTorrent joins when IPFS stalls, fails or is absent, and when IPFS alone would take long: from then
on both draw, and whichever dies, nothing verified is fetched again. There is one writer of the file (see sources.py), every
piece is checked before it counts, and nothing enters the store before the digests of the whole - and the signature, where
there is one - hold.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from daemon.engine import gguf
from daemon.errors import SwarmError, Unavailable, Unserved, VerificationError
from daemon.ipfs.interface import IpfsNode
from daemon.torrent import metainfo
from daemon.torrent.download import Download
from daemon.torrent.session import TorrentSession
from daemon.transfer.identify import Identified, identify
from daemon.transfer.library import Library
from daemon.transfer.publish import Publisher, checked_name
from daemon.transfer.resolve import Plan, Resolver, check_torrent
from daemon.transfer.sources import IpfsSource, LeafSink, PieceSink, RateLimit, unwrap
from daemon.transfer.store import Record, Store
from daemon.transfer.transfers import Transfer
from registry.cid import LEAF_SIZE
from registry.records import GgufFacts, Model

log = logging.getLogger(__name__)

_HEAD_START_S = 3.0  # of IPFS before BitTorrent is thought of
_SHORT_S = 10.0  # what IPFS alone may still take without BitTorrent's help
_PATIENCE = 6  # stall times that a slow IPFS range may be silent before it is given back
_METADATA_S = 20.0
_CONNECT_S = 3.0
_FILE = "model.gguf"


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds without a byte: after `stall` the next source joins, after `give_up` the pull fails (and can go on later)."""

    stall: float
    give_up: float


class Puller:
    def __init__(
        self,
        store: Store,
        library: Library,
        resolver: Resolver,
        publisher: Publisher,
        torrents: TorrentSession | None,
        ipfs: Callable[[], IpfsNode | None],
        ipfs_enabled: bool,
        limit: RateLimit,
        patience: Patience,
    ) -> None:
        self._store = store
        self._library = library
        self._resolver = resolver
        self._publisher = publisher
        self._torrents = torrents
        self._ipfs = ipfs
        self._ipfs_enabled = ipfs_enabled
        self._limit = limit
        self._patience = patience
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def pull(self, transfer: Transfer, text: str) -> Model:
        """Raises any `SwarmError`; what has been fetched and verified stays for the next try unless it is wrong."""
        here = [model for model in self._library.matches(text) if model.quarantined is None]
        if len(here) == 1:
            return here[0]
        plan = await self._resolver.resolve(text)
        transfer.name, transfer.size = plan.name, plan.size
        if plan.file is not None:
            return await self._take_in(transfer, plan, plan.file)
        async with self._locks[plan.key]:
            if plan.identity is not None and self._library.sound(plan.identity.blake3):
                return self._library.find(plan.identity.cid)
            plan = await self._with_torrent(plan)
            identified, facts = await self._fetch_and_verify(transfer, plan)
            return await self._enter(transfer, plan, identified, facts)

    # -- taking in --------------------------------------------------------------------------------------------------

    async def _take_in(self, transfer: Transfer, plan: Plan, path: Path) -> Model:
        identified, facts = await self._publisher.take_in(transfer, path)
        if self._library.sound(identified.identity.blake3):
            return self._library.find(identified.identity.cid)
        return await self._enter(transfer, replace(plan, name=checked_name(plan.name)), identified, facts)

    async def _enter(self, transfer: Transfer, plan: Plan, identified: Identified, facts: GgufFacts) -> Model:
        transfer.state = "storing"
        name = plan.name if plan.name not in ("", plan.cid) else facts.name or ""
        if not name.strip():
            name = identified.identity.blake3[:12]
        model = replace(
            self._library.describe(identified, checked_name(name), facts, "pulled"),
            manifest=plan.manifest, signed_by=plan.signed_by, source=plan.source,
        )  # fmt: skip
        if plan.signed_by is None:
            transfer.note("unsigned: nobody vouches for this model beyond its content address")
        if plan.cid is not None and plan.cid != identified.identity.cid:
            transfer.note(f"IPFS lays these bytes out differently there; here their CID is {identified.identity.cid}")
        entered, notes = await self._library.enter(identified, Record(model, plan.envelope))
        for text in notes:
            transfer.note(text)
        transfer.name = entered.name
        return entered

    # -- fetching ---------------------------------------------------------------------------------------------------

    async def _with_torrent(self, plan: Plan) -> Plan:
        """The plan with its .torrent: by its manifest, else from the BitTorrent swarm; without, when only the CID is known."""
        torrent = await self._resolver.published_torrent(plan)
        if torrent is None and self._torrents is not None and (plan.infohash or plan.infohash_v2):
            try:
                torrent = await self._torrents.metadata(
                    plan.infohash, plan.infohash_v2, self._bittorrent_peers(plan), deadline_s=_METADATA_S
                )
            except Unserved:
                if plan.cid is None or self._ipfs() is None:
                    raise
            else:
                check_torrent(plan, torrent)
        if torrent is None:
            return plan
        facts = metainfo.parse(torrent)
        return replace(plan, torrent=torrent, size=facts.size, infohash=facts.infohash, infohash_v2=facts.infohash_v2)

    async def _fetch_and_verify(self, transfer: Transfer, plan: Plan) -> tuple[Identified, GgufFacts]:
        if plan.size is None:
            raise Unserved(plan.ref, "nobody tells how large it is", "join a node that has it")
        transfer.size, transfer.name = plan.size, transfer.name or plan.name
        key = plan.key
        folder = await asyncio.to_thread(self._store.partial, key)
        path = folder / _FILE
        await asyncio.to_thread(self._store.require_space, plan.size - await asyncio.to_thread(_on_disk, path), plan.name or plan.ref)
        transfer.state = "fetching"
        await self._fetch(transfer, plan, path)
        transfer.state = "verifying"
        try:
            identified = await identify(path)
            self._compare(plan, identified)
            header = await asyncio.to_thread(gguf.inspect, path)
        except SwarmError as error:
            # Every byte came and the whole is wrong: another try with these bytes can only fail again.
            await asyncio.to_thread(self._store.discard, key)
            if isinstance(error, VerificationError):
                raise
            raise VerificationError(plan.name or plan.ref, error.why, "check the reference with whoever gave it") from error
        await asyncio.to_thread(self._store.accept, path, identified.identity.blake3)
        await asyncio.to_thread(self._store.discard, key)
        return identified, header.facts

    def _compare(self, plan: Plan, identified: Identified) -> None:
        found = identified.identity
        what = plan.name or plan.ref
        if plan.identity is not None and found != plan.identity:
            raise VerificationError(what, "its bytes are not what the signed manifest promises", "tell its publisher")
        if plan.infohash_v2 not in (None, found.infohash_v2):
            raise VerificationError(
                what, "its bytes are not what its name in the torrent promises", "check the magnet with whoever gave it"
            )
        # A bare CID of another layout was checked block by block; with a torrent beside it both must name the same bytes.
        if plan.torrent is not None and plan.cid not in (None, found.cid):
            raise VerificationError(what, "its torrent and its CID are of different bytes", "check the reference with whoever gave it")

    async def _fetch(self, transfer: Transfer, plan: Plan, path: Path) -> None:
        if plan.torrent is not None and self._torrents is not None:
            download = await self._torrents.download(plan.torrent, path.parent, path.name)
            try:
                await download.checked()
                await _Fetch(self, transfer, plan, download, download).run()
            finally:
                await download.close()
            return
        node = self._ipfs()
        if plan.cid is None or node is None:
            raise Unavailable(
                plan.name or plan.ref, "IPFS is not running and no torrent of it is known", "swarmctl doctor tells what is missing"
            )
        leaves = await node.leaves(plan.cid, deadline_s=self._patience.give_up)
        size = plan.size or 0
        ours = len(leaves) == max(1, -(-size // LEAF_SIZE))
        sink = LeafSink(path, size, leaves if ours else [])
        try:
            await sink.check()
            await _Fetch(self, transfer, plan, sink, None).run()
            if not ours:
                await node.drop_blocks(leaves)
        finally:
            sink.close()

    def _bittorrent_peers(self, plan: Plan) -> list[tuple[str, int]]:
        named = [*plan.bittorrent, *(peer for holder in self._resolver.holders_of(plan) for peer in holder.bittorrent)]
        return [(host.strip("[]"), int(port)) for host, _, port in (peer.rpartition(":") for peer in dict.fromkeys(named))]

    async def _connect(self, node: IpfsNode, plan: Plan) -> None:
        """Bring IPFS to the nodes that are known to have the model; without a DHT nothing else would."""
        near = set(await node.peers())
        far = [a for holder in self._resolver.holders_of(plan) for a in holder.ipfs if a.rpartition("/p2p/")[2] not in near]
        tries = (node.connect(address, deadline_s=_CONNECT_S) for address in far)
        for result in await asyncio.gather(*tries, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, SwarmError):
                raise result


class _Fetch:
    """One download: which source draws when, what is counted, and when it is over."""

    def __init__(self, puller: Puller, transfer: Transfer, plan: Plan, sink: PieceSink, download: Download | None) -> None:
        self._puller = puller
        self._transfer = transfer
        self._plan = plan
        self._sink = sink
        self._download = download
        self._join = asyncio.Event()
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
        while self._sink.missing():
            await asyncio.sleep(0.05)

    async def _draw_from_ipfs(self) -> None:
        pause = 1.0
        cid = self._plan.cid
        while cid is not None and self._sink.missing():
            node = self._puller._ipfs()
            if node is None:
                self._join.set()
                if not self._puller._ipfs_enabled:
                    return
                await asyncio.sleep(0.5)
                continue
            source = IpfsSource(
                node, cid, self._sink, self._puller._limit, self._from_ipfs, stall_s=_PATIENCE * self._puller._patience.stall
            )
            before = self._ipfs_bytes
            try:
                await self._puller._connect(node, self._plan)
                await source.run()
            except (Unserved, Unavailable) as error:
                log.info("IPFS does not deliver %s: %s", cid, error)
                self._join.set()
            pause = 1.0 if self._ipfs_bytes > before else min(2 * pause, 30.0)
            await asyncio.sleep(pause)
        self._join.set()

    def _from_ipfs(self, amount: int) -> None:
        self._ipfs_bytes += amount
        self._transfer.sources["ipfs"] += amount
        self._last_ipfs = self._last_any = time.monotonic()

    async def _draw_from_peers(self, download: Download) -> None:
        # Connected from the start and asked for nothing: when IPFS dies, its place is taken at once.
        download.add_peers(self._puller._bittorrent_peers(self._plan))
        await self._join.wait()
        while True:
            download.join_swarm(self._puller._bittorrent_peers(self._plan))
            await asyncio.sleep(2.0)

    async def _watch(self) -> None:
        patience = self._puller._patience
        while True:
            await asyncio.sleep(0.25)
            received = self._transfer.received
            self._count()
            now = time.monotonic()
            if self._transfer.received > received:
                self._last_any = now
            if now - self._last_any > patience.give_up:
                raise Unserved(
                    self._plan.name or self._plan.ref,
                    f"no source gave a byte for {patience.give_up:.0f} s",
                    "pull it again later: it goes on where it was",
                )
            if not self._join.is_set() and self._help_wanted(now):
                self._join.set()
            if self._join.is_set() and self._download is not None:
                self._end_game()

    def _help_wanted(self, now: float) -> bool:
        """IPFS is gone or silent, or would alone still take long after its head start."""
        if self._puller._ipfs() is None:
            return True
        if now - self._last_ipfs > self._puller._patience.stall:
            return True
        elapsed = now - self._started
        if elapsed < _HEAD_START_S:
            return False
        left = (self._plan.size or 0) - self._transfer.received
        return left * elapsed > _SHORT_S * max(self._ipfs_bytes, 1)

    def _end_game(self) -> None:
        """When IPFS holds the last pieces and is silent, BitTorrent may bring them too."""
        if time.monotonic() - self._last_ipfs > self._puller._patience.stall:
            self._sink.include(self._sink.missing())

    def _here(self) -> int:
        return (self._plan.size or 0) - sum(self._sink.piece_size(piece) for piece in self._sink.missing())

    def _count(self) -> None:
        self._transfer.received = self._here()
        if self._download is not None:
            sources = self._transfer.sources
            sources["bittorrent"] = max(0, self._transfer.received - sources["disk"] - sources["ipfs"])
            self._transfer.peers = self._download.peers


def _on_disk(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
