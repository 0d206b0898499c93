"""From an infohash to the whole .torrent, piece layers included, without a byte of payload.

libtorrent asks the peers of a magnet for the metadata, and of a v2 torrent for the piece layers.
Some of it has to be helped along: peers that it met under the v1 name alone are never asked for v2
hashes, and now and then it asks nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence

import libtorrent as lt

from daemon.errors import Unavailable, Unserved, VerificationError
from daemon.torrent import metainfo, network
from daemon.torrent.entry import Torrent, Torrents

_ASK_LAYERS_S = (
    0.02,
    0.2,
)  # pause between two looks whether the piece layers have come: first, longest
_LAYERS_S = 2.0  # how long the piece layers may take before the peers are met anew: first, then twice as long each time


class Magnets:
    """The magnets of one session that are being looked into."""

    def __init__(self, torrents: Torrents) -> None:
        self._torrents = torrents

    async def metadata(
        self,
        infohash: str | None,
        infohash_v2: str | None,
        peers: Sequence[tuple[str, int]],
        deadline_s: float,
    ) -> bytes:
        """See `TorrentSession.metadata`."""
        wanted = [name for name in (infohash, infohash_v2) if name]
        for known in (self._torrents.known(name) for name in wanted):
            if known is not None and known.torrent is not None:
                return known.torrent
        askable = network.addresses(peers)
        unserved = Unserved(
            "torrent",
            "no node gave it whole",
            "join a node that has it, or pull it by its code or CID",
        )
        if not askable and not self._torrents.can_discover:
            raise unserved
        try:
            async with asyncio.timeout(deadline_s):
                torrent = await self._ask(infohash, infohash_v2, askable)
        except TimeoutError:
            raise unserved from None
        facts = await asyncio.to_thread(metainfo.parse, torrent)
        if infohash not in (None, facts.infohash) or infohash_v2 not in (None, facts.infohash_v2):
            raise VerificationError(
                "torrent",
                "its v1 and v2 infohash are of different torrents",
                "check the magnet with whoever gave it",
            )
        return torrent

    async def _ask(
        self,
        infohash: str | None,
        infohash_v2: str | None,
        peers: list[tuple[str, int]],
        patience: float = _LAYERS_S,
    ) -> bytes:
        params = lt.parse_magnet_uri(network.magnet(infohash, infohash_v2))
        params.peers = peers
        # Nothing is written in upload mode; a folder that does not exist keeps libtorrent from
        # looking at anybody's files.
        params.save_path = f"/nonexistent/{uuid.uuid4()}"
        entry = Torrent(self._torrents, None, None)
        entry.with_metadata = asyncio.get_running_loop().create_future()
        self._torrents.add(
            entry,
            params,
            lt.torrent_flags.upload_mode,
            [name for name in (infohash, infohash_v2) if name],
        )
        try:
            await entry.with_metadata
            hashes = entry.handle.info_hashes()
            if infohash_v2 or not hashes.has_v2():
                # Now and then libtorrent never asks a peer, most often on a busy machine; the same
                # peer, met anew, is asked.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        return await self._layers(entry)
                patience *= 2
            else:
                # Peers that were met as v1 peers are never asked for v2 hashes: meet them again
                # under both names.
                infohash_v2 = str(hashes.v2)
        finally:
            await self._torrents.remove(entry)
        return await self._ask(infohash, infohash_v2, peers, patience)

    async def _layers(self, entry: Torrent) -> bytes:
        # libtorrent asks peers for the piece layers by itself, but says nothing when they have
        # come.
        pause, longest = _ASK_LAYERS_S
        while True:
            if entry.removed is not None:
                raise Unavailable("BitTorrent", "the session is closing")
            entry.resume_data = asyncio.get_running_loop().create_future()
            entry.handle.save_resume_data(lt.save_resume_flags_t.save_info_dict)
            torrent = await entry.resume_data
            if torrent is not None:
                with contextlib.suppress(
                    metainfo.IncompleteLayers
                ):  # some hashes have come, not yet all
                    await asyncio.to_thread(metainfo.parse, torrent)
                    return torrent
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
