"""`pull`: from a reference to a verified model in the store.

There is one writer of the file (see sources.py), every piece is checked before it counts, and nothing enters the store before
the digests of the whole - and the signature, where there is one - hold. Which source draws when is fetch.py's to decide.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from daemon.engine import gguf
from daemon.errors import Unavailable, Unserved, UsageError, VerificationError
from daemon.ipfs.interface import IpfsNode
from daemon.torrent import metainfo
from daemon.torrent.download import Download
from daemon.torrent.session import TorrentSession
from daemon.transfer.fetch import Fetch, Sources, Wanted
from daemon.transfer.identify import Identified, identify
from daemon.transfer.introductions import Introductions
from daemon.transfer.library import Arrival, Library
from daemon.transfer.publish import Publisher
from daemon.transfer.resolve import Plan, Resolver, check_torrent
from daemon.transfer.sources import LeafSink, unwrap
from daemon.transfer.store import Record, Store
from daemon.transfer.transfers import Transfer
from daemon.waiting import KeyLocks
from registry.cid import LEAF_SIZE
from registry.records import GgufFacts, Model

log = logging.getLogger(__name__)

_METADATA_S = 20.0
_AGAIN_S = 0.5  # between two tries to find out what a file is made of
_FILE = "model.gguf"


class Puller:
    def __init__(
        self,
        store: Store,
        library: Library,
        resolver: Resolver,
        publisher: Publisher,
        torrents: TorrentSession | None,
        sources: Sources,
        introductions: Introductions | None,
    ) -> None:
        self._store = store
        self._library = library
        self._resolver = resolver
        self._publisher = publisher
        self._torrents = torrents
        self._sources = sources
        self._introductions = introductions
        self._fetching = KeyLocks()  # by Plan.key

    async def pull(self, transfer: Transfer, text: str) -> Model:
        """Raises any `SwarmError`; what has been fetched and verified stays for the next try unless it is wrong."""
        here = [model for model in self._library.matches(text) if model.quarantined is None]
        if len(here) == 1:
            return _already(transfer, here[0])
        plan = await self._resolver.resolve(text)
        transfer.name, transfer.size = plan.name, plan.size
        if plan.file is not None:
            return await self._take_in(transfer, plan, plan.file)
        async with self._fetching(plan.key):
            plan = await self._with_torrent(plan)
        # The torrent may have told more names: whoever fetches the same under another one must be waited for too.
        async with self._fetching(plan.key):
            if (known := self._here(plan)) is not None:
                return _already(transfer, known)
            identified, facts, arrive = await self._fetch_and_verify(transfer, plan)
            model = await self._enter(transfer, plan, identified, facts, arrive)
            await asyncio.to_thread(self._store.discard, plan.key)
            return model

    def _here(self, plan: Plan) -> Model | None:
        """The model, if it came in while this pull waited."""
        for model in self._library.models():
            same = model.identity.cid == plan.cid or model.identity.infohash_v2 == plan.infohash_v2
            if same and model.quarantined is None:
                return model
        return None

    # -- taking in --------------------------------------------------------------------------------------------------

    async def _take_in(self, transfer: Transfer, plan: Plan, path: Path) -> Model:
        identified, facts, arrive = await self._publisher.identify(transfer, path)
        return await self._enter(transfer, plan, identified, facts, arrive)

    async def _enter(self, transfer: Transfer, plan: Plan, identified: Identified, facts: GgufFacts, arrive: Arrival) -> Model:
        transfer.state = "storing"
        name = plan.name
        if plan.signed_by is None:
            name = self._library.unsigned_name(identified, plan.name if plan.name != plan.cid else None, facts.name)
        model = replace(
            self._library.describe(identified, name, facts, "pulled"),
            manifest=plan.manifest, signed_by=plan.signed_by, source=plan.source,
        )  # fmt: skip
        if plan.cid is not None and plan.cid != identified.identity.cid:
            transfer.note(f"IPFS lays these bytes out differently there; here their CID is {identified.identity.cid}")
        entered, notes = await self._library.enter(identified, Record(model, plan.envelope), arrive)
        if entered.signed_by is None:
            transfer.note("unsigned: nobody vouches for this model beyond its content address")
            if plan.name not in ("", plan.cid, entered.name):
                transfer.note(f"here it is called {entered.name}: a publisher is known for the other name, or it is no name")
        for text in notes:
            transfer.note(text)
        transfer.name = entered.name
        return entered

    # -- fetching ---------------------------------------------------------------------------------------------------

    async def _with_torrent(self, plan: Plan) -> Plan:
        """The plan with its .torrent: by its manifest, else from the BitTorrent swarm; without, when only the CID is known.

        Where a magnet names the manifest, manifest and .torrent are asked of the BitTorrent swarm at once.
        """
        torrent: bytes | None = None
        if plan.manifest_torrent is not None:
            plan, torrent = await self._manifest_and_metadata(plan)
        if torrent is None:
            torrent = await self._resolver.published_torrent(plan)
        if torrent is None and plan.manifest_torrent is None:
            torrent = await self._metadata(plan)
        if torrent is None:
            return plan
        check_torrent(plan, torrent)
        facts = metainfo.parse(torrent)
        return replace(plan, torrent=torrent, size=facts.size, infohash=facts.infohash, infohash_v2=facts.infohash_v2)

    async def _manifest_and_metadata(self, plan: Plan) -> tuple[Plan, bytes | None]:
        try:
            async with asyncio.TaskGroup() as group:
                signed = group.create_task(self._resolver.named_manifest(plan, self._bittorrent_peers(plan)))
                metadata = group.create_task(self._metadata(plan))
        except BaseExceptionGroup as errors:
            raise unwrap(errors) from errors
        return signed.result(), metadata.result()

    async def _metadata(self, plan: Plan) -> bytes | None:
        """The .torrent from the BitTorrent swarm. None where IPFS can do without. Raises `Unserved`."""
        if self._torrents is None or not (plan.infohash or plan.infohash_v2):
            return None
        try:
            return await self._torrents.metadata(
                plan.infohash, plan.infohash_v2, self._bittorrent_peers(plan), deadline_s=_METADATA_S
            )
        except Unserved:
            # A manifest that is still on its way will tell the CID.
            cid_known = plan.cid is not None or plan.manifest_torrent is not None
            if cid_known and self._sources.ipfs() is not None:
                return None
            raise

    async def _fetch_and_verify(self, transfer: Transfer, plan: Plan) -> tuple[Identified, GgufFacts, Arrival]:
        if plan.size is None:
            raise Unserved(plan.ref, "nobody tells how large it is", "join a node that has it")
        transfer.size, transfer.name = plan.size, transfer.name or plan.name
        key = plan.key
        here = await asyncio.to_thread(_on_disk, self._store.partials / key / _FILE)
        await asyncio.to_thread(self._store.require_space, plan.size - here, plan.name or plan.ref)
        path = await asyncio.to_thread(self._store.partial, key) / _FILE
        try:
            transfer.state = "fetching"
            await self._fetch(transfer, plan, path)
            transfer.state = "verifying"
            identified = await identify(path)
            self._compare(plan, identified)
            header = await asyncio.to_thread(gguf.inspect, path)
        except (VerificationError, UsageError) as error:
            # What came is what its name means, and not what was promised: another try with these bytes can only fail again.
            await asyncio.to_thread(self._store.discard, key)
            if isinstance(error, VerificationError):
                raise
            raise VerificationError(plan.name or plan.ref, error.why, "check the reference with whoever gave it") from error
        return identified, header.facts, partial(self._store.accept, path)

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
            introducing = asyncio.create_task(self._introduce(plan, download))
            try:
                await download.checked()
                await Fetch(self._sources, self._wanted(plan), transfer, download, download).run()
            finally:
                introducing.cancel()
                await asyncio.gather(introducing, return_exceptions=True)
                await download.close()
            return
        if plan.cid is None or self._sources.ipfs() is None:
            raise Unavailable(
                plan.name or plan.ref, "IPFS is not running and no torrent of it is known", "swarmctl doctor tells what is missing"
            )
        node, leaves = await self._leaves(plan.cid)
        size = plan.size or 0
        ours = len(leaves) == max(1, -(-size // LEAF_SIZE))
        sink = LeafSink(path, size, leaves if ours else [])
        await sink.check()
        # Without leaves of ours only IPFS itself checks what comes.
        wanted = replace(self._wanted(plan), checked=ours)
        await Fetch(self._sources, wanted, transfer, sink, None).run()
        if not ours:
            await node.drop_blocks(leaves)

    async def _leaves(self, cid: str) -> tuple[IpfsNode, list[str]]:
        """The leaves of a file, from the IPFS node of now: it may start again while it looks for them."""
        give_up = self._sources.patience.give_up
        deadline = time.monotonic() + give_up
        while True:
            node = self._sources.ipfs()
            try:
                if node is None:
                    raise Unavailable("IPFS", "it is not running", "swarmctl status tells its state")
                return node, await node.leaves(cid, deadline_s=give_up)
            except (Unavailable, Unserved):
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_AGAIN_S)

    async def _introduce(self, plan: Plan, download: Download) -> None:
        """Have holders that cannot be dialled dial us, as long as the download runs."""
        infohash = plan.infohash_v2 or plan.infohash
        if self._introductions is not None and infohash is not None:
            holders = partial(self._resolver.holders_of, plan)
            await self._introductions.keep(infohash, holders, download.add_peers)

    def _wanted(self, plan: Plan) -> Wanted:
        return Wanted(
            what=plan.name or plan.ref, size=plan.size or 0, cid=plan.cid,
            holders=lambda: self._resolver.holders_of(plan), peers=lambda: self._bittorrent_peers(plan),
        )  # fmt: skip

    def _bittorrent_peers(self, plan: Plan) -> list[tuple[str, int]]:
        named = [*plan.bittorrent, *(peer for holder in self._resolver.holders_of(plan) for peer in holder.address.bittorrent)]
        return [(host.strip("[]"), int(port)) for host, _, port in (peer.rpartition(":") for peer in dict.fromkeys(named))]


def _already(transfer: Transfer, model: Model) -> Model:
    """Nothing had to be fetched: every byte was on disk."""
    transfer.name, transfer.size = model.name, model.identity.size
    transfer.received = transfer.sources["disk"] = model.identity.size
    return model


def _on_disk(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
