"""Small objects over BitTorrent, such as a signed manifest: asked for by v1 infohash, and bounded.

What a swarm sends under an infohash is what somebody made under it; whether it is the right object
is for the caller to check (a manifest has a CID). Until the metadata has come and its size is
within the limit no payload is asked for. Bytes touch the disk only in a folder that nobody else can
read, and that is gone afterwards.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import libtorrent as lt

from daemon.errors import Unserved, VerificationError
from daemon.torrent import network
from daemon.torrent.download import disk_error
from daemon.torrent.entry import Torrent, Torrents


class _Fetch:
    """One object on its way, and for how many callers."""

    def __init__(self, torrent: Torrent, task: asyncio.Task[bytes]) -> None:
        self.torrent = torrent
        self.task = task
        self.callers = 0


class SmallObjects:
    """Callers of one infohash share one fetch, which ends when nobody waits for it any more."""

    def __init__(self, torrents: Torrents) -> None:
        self._torrents = torrents
        self._fetches: dict[str, _Fetch] = {}

    async def fetch(
        self, infohash: str, peers: Sequence[tuple[str, int]], *, limit: int, deadline_s: float
    ) -> bytes:
        """See `TorrentSession.fetch_small`."""
        seeded = self._torrents.known(infohash)
        if seeded is not None and seeded.seed is not None:
            return await asyncio.to_thread(_read, seeded.seed.path, limit)
        askable = network.addresses(peers)
        if not askable and not self._torrents.can_discover and infohash not in self._fetches:
            raise _unserved()
        try:
            async with asyncio.timeout(deadline_s):
                data = await self._shared(infohash, askable, limit)
        except TimeoutError:
            raise _unserved() from None
        if len(data) > limit:  # somebody else's limit was larger
            raise _too_large(len(data), limit)
        return data

    async def _shared(self, infohash: str, peers: list[tuple[str, int]], limit: int) -> bytes:
        fetch = self._fetches.get(infohash)
        while (
            fetch is not None and fetch.callers == 0
        ):  # everybody has left it, and it is about to end
            await asyncio.wait([fetch.task])
            fetch = self._fetches.get(infohash)
        if fetch is None:
            fetch = self._begin(infohash, peers, limit)
        elif fetch.torrent.handle is not None:
            fetch.torrent.connect(peers)
        fetch.callers += 1
        try:
            return await asyncio.shield(fetch.task)
        finally:
            fetch.callers -= 1
            if fetch.callers == 0 and not fetch.task.done():
                fetch.task.cancel()
                await asyncio.wait([fetch.task])

    def _begin(self, infohash: str, peers: list[tuple[str, int]], limit: int) -> _Fetch:
        torrent = Torrent(self._torrents, None, None)
        torrent.is_model = False
        torrent.delete_files = True
        task = asyncio.create_task(
            self._run(torrent, infohash, peers, limit), name="fetch a small object"
        )
        fetch = self._fetches[infohash] = _Fetch(torrent, task)
        task.add_done_callback(lambda _: self._fetches.pop(infohash))
        return fetch

    async def _run(
        self, torrent: Torrent, infohash: str, peers: list[tuple[str, int]], limit: int
    ) -> bytes:
        folder = await asyncio.to_thread(_make_folder)
        try:
            return await self._bring(torrent, infohash, peers, limit, folder)
        finally:
            await self._torrents.remove(torrent)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _bring(
        self,
        torrent: Torrent,
        infohash: str,
        peers: list[tuple[str, int]],
        limit: int,
        folder: Path,
    ) -> bytes:
        loop = asyncio.get_running_loop()
        params = lt.parse_magnet_uri(network.magnet(infohash, None))
        params.peers = peers
        params.save_path = str(folder)
        torrent.with_metadata = loop.create_future()
        self._torrents.add(torrent, params, lt.torrent_flags.upload_mode, [infohash])
        await torrent.with_metadata
        pieces = _checked_pieces(torrent.handle.torrent_file(), limit)
        torrent.finished = loop.create_future()
        torrent.handle.unset_flags(lt.torrent_flags.upload_mode)
        await torrent.finished
        for index in range(pieces):
            torrent.reads[index] = loop.create_future()
            torrent.handle.read_piece(index)
        return b"".join(await asyncio.gather(*torrent.reads.values()))


def _checked_pieces(info: Any, limit: int) -> int:
    """How many pieces it has. Raises `VerificationError` unless it is one file of 1 to `limit` bytes."""
    size = int(info.total_size())
    if not 0 < size <= limit:
        raise _too_large(size, limit)
    if int(info.num_files()) != 1:
        raise VerificationError(
            "torrent", "it holds several files where one is expected", "get it from another source"
        )
    return int(info.num_pieces())


def _too_large(size: int, limit: int) -> VerificationError:
    return VerificationError(
        "torrent",
        f"it holds {size} bytes where 1 to {limit} are taken",
        "get it from another source",
    )


def _unserved() -> Unserved:
    return Unserved("torrent", "no node gave it whole", "join a node that has it")


def _make_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="swarmctl-"))  # nobody else can read it
    except OSError as error:
        raise disk_error(error.errno or 0, error.strerror or "") from error


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise disk_error(error.errno or 0, error.strerror or "") from error
    if len(data) > limit:
        raise _too_large(path.stat().st_size, limit)
    return data
