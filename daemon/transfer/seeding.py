"""Keeps every model of the store pinned on IPFS and seeded on BitTorrent, from the one file on disk.

Its signed manifest is pinned and seeded beside it, so that either network brings a model that can be verified.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

from daemon.errors import BackendError, SwarmError, VerificationError
from daemon.ipfs.interface import IpfsNode
from daemon.torrent.entry import Seed
from daemon.torrent.session import TorrentSession
from daemon.transfer import manifests
from daemon.transfer.store import Record, Store
from registry.records import Model

log = logging.getLogger(__name__)

_ONE_BLOCK = 1 << 20  # bytes; larger objects are added in place like models


class Seeding:
    def __init__(self, store: Store, torrents: TorrentSession | None, ipfs: Callable[[], IpfsNode | None], ipfs_enabled: bool) -> None:
        self._store = store
        self._torrents = torrents
        self._ipfs = ipfs
        self._ipfs_enabled = ipfs_enabled
        self._manifests: dict[str, Seed] = {}  # of the models that are seeded, by their blake3

    async def hold(self, record: Record, blocks: Sequence[str]) -> list[str]:
        """Seed and pin one model. `blocks` are cached blocks of it that may be dropped, so that the disk holds it once.

        Returns notes for people: a network that is away now is no reason to refuse a model, it follows when it is back.
        """
        notes: list[str] = []
        if record.model.quarantined is not None:
            return notes
        try:
            await self._seed(record)
        except BackendError as error:
            # Most likely somebody downloads the same just now; it is seeded when that ends.
            log.warning("not seeded yet: %s", error)
            notes.append(f"not on BitTorrent yet ({error.why})")
        if self._ipfs_enabled:
            node = self._ipfs()
            try:
                if node is None:
                    raise BackendError("IPFS", "not running")
                await self._pin(node, record, blocks)
            except BackendError as error:
                log.warning("not pinned yet: %s", error)
                notes.append(f"not on IPFS yet ({error.why}); it will be pinned when IPFS is back")
        return notes

    async def release(self, model: Model) -> None:
        """Seed and pin a model no more. What an IPFS that goes away in the middle keeps of it, `forget` removes later."""
        if self._torrents is not None:
            await self._torrents.forget(model.identity.infohash_v2)
            await self._release_manifest(self._torrents, model.identity.blake3)
        node = self._ipfs()
        if node is not None:
            await self.forget(node, pinned_for(model))

    async def forget(self, node: IpfsNode, cids: Iterable[str]) -> None:
        for cid in cids:
            try:
                await node.remove_in_place(cid)
            except SwarmError as error:
                log.warning("cannot unpin %s: %s", cid, error)

    async def seed_all(self, records: Sequence[Record]) -> None:
        """Seed what the store has. Manifests of models that it has no more are removed."""
        kept = {record.model.manifest for record in records if record.model.quarantined is None}
        await asyncio.to_thread(self._store.clean_manifests, {manifests.file_name(cid) for cid in kept if cid})
        for record in records:
            if record.model.quarantined is None:
                try:
                    await self._seed(record)
                except SwarmError as error:  # one damaged .torrent must not keep the others, and the daemon, from starting
                    log.warning("cannot seed %s: %s", record.model.identity.blake3, error)

    async def pin(self, node: IpfsNode, record: Record) -> None:
        """Pin a model that came in while IPFS was away, or that a lost repository forgot."""
        if not pinned_for(record.model) <= await node.pins():
            try:
                await self._pin(node, record, [])
            except SwarmError as error:
                log.warning("cannot pin %s: %s", record.model.identity.cid, error)

    async def _seed(self, record: Record) -> None:
        torrent = await asyncio.to_thread(self._store.read_torrent, record.model.identity.blake3)
        if self._torrents is None:
            return
        if torrent is not None:
            await self._torrents.seed(torrent, self._store.path(record.model.identity.blake3))
        await self._seed_manifest(self._torrents, record)

    async def _seed_manifest(self, torrents: TorrentSession, record: Record) -> None:
        """Seed the manifest that the model has now; one that it had before is forgotten."""
        model, envelope = record.model, record.envelope
        blake3 = model.identity.blake3
        before = self._manifests.get(blake3)
        now = None if envelope is None else manifests.torrent_of(envelope).infohash_v2
        if before is not None and before.infohash_v2 != now:
            await self._release_manifest(torrents, blake3)
        if envelope is not None and model.manifest is not None:
            name = manifests.file_name(model.manifest)
            self._manifests[blake3] = await torrents.seed_bytes(name, envelope.encode(), self._store.torrents)

    async def _release_manifest(self, torrents: TorrentSession, blake3: str) -> None:
        seed = self._manifests.pop(blake3, None)
        if seed is not None:
            await torrents.forget(seed.infohash_v2)
            await asyncio.to_thread(seed.path.unlink, missing_ok=True)

    async def _pin(self, node: IpfsNode, record: Record, blocks: Sequence[str]) -> None:
        model = record.model
        if blocks:
            await node.drop_blocks(blocks)
        added = await node.add_in_place(self._store.path(model.identity.blake3))
        if added != model.identity.cid:
            raise VerificationError(model.name, "IPFS gives its file another CID", "swarmctl fsck tells whether the file changed")
        torrent = await asyncio.to_thread(self._store.read_torrent, model.identity.blake3)
        if torrent is not None and len(torrent) <= _ONE_BLOCK:
            await node.add_bytes(torrent)
        elif torrent is not None:
            await node.add_in_place(self._store.torrents / f"{model.identity.blake3}.torrent")
        if record.envelope is not None:
            await node.add_bytes(record.envelope.encode())


def pinned_for(model: Model) -> set[str]:
    """The CIDs that IPFS keeps for a model."""
    return {cid for cid in (model.identity.cid, model.manifest, model.torrent) if cid is not None}
