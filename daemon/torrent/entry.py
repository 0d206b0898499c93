"""One torrent inside libtorrent: its handle, its numbers, and who waits for what of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import libtorrent as lt

from daemon.errors import SwarmError
from daemon.torrent import metainfo, network

CHECKING = lt.torrent_flags.upload_mode | lt.torrent_flags.disable_dht | lt.torrent_flags.disable_lsd | lt.torrent_flags.disable_pex
_WANTED, _UNWANTED = 4, 0  # piece priorities: libtorrent's default, and never
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Swarm:
    """What is known of a torrent's swarm, this node not counted: connected and known peers, bytes per second."""

    peers: int = 0  # connected, seeds included
    seeds: int = 0  # connected
    known_peers: int = 0
    known_seeds: int = 0
    download_rate: int = 0
    upload_rate: int = 0


@dataclass(frozen=True, slots=True)
class Seed:
    """A complete file that is given to whoever asks; it is never written to."""

    infohash: str
    infohash_v2: str
    path: Path


class Listener(Protocol):
    """Who is told of one torrent's events (see `Download`)."""

    def on_checked(self, have: Sequence[bool]) -> None: ...
    def on_piece(self, index: int) -> None: ...
    def on_bad_piece(self, index: int) -> None: ...
    def on_finished(self) -> None: ...
    def on_flushed(self) -> None: ...
    def on_error(self, error: SwarmError) -> None: ...


class Owner(Protocol):
    """What a torrent asks of its session."""

    async def remove(self, torrent: Torrent) -> None: ...
    def announce_soon(self, torrent: Torrent) -> None: ...


class Torrents(Owner, Protocol):
    """What those who add torrents of their own ask of the session."""

    @property
    def can_discover(self) -> bool: ...
    def known(self, infohash: str) -> Torrent | None: ...
    def add(self, torrent: Torrent, params: Any, flags: int, hashes: Iterable[str] = ()) -> None: ...


class Torrent:
    """One torrent inside libtorrent, under all its infohashes."""

    def __init__(self, owner: Owner, facts: metainfo.TorrentFacts | None, torrent: bytes | None) -> None:
        self.facts = facts
        self.torrent = torrent
        self.seed: Seed | None = None
        self.listener: Listener | None = None
        self.swarm = Swarm()
        self.with_metadata: asyncio.Future[None] | None = None
        self.resume_data: asyncio.Future[bytes | None] | None = None
        self.finished: asyncio.Future[None] | None = None
        self.reads: dict[int, asyncio.Future[bytes]] = {}  # by piece
        self.removed: asyncio.Future[None] | None = None
        self.handle: Any = None
        self.is_model = True  # small objects are not counted as torrents
        self.delete_files = False  # when it is removed; for what lies in a temporary folder of ours
        self.announced_at = 0.0  # to the DHT, by the loop's clock
        self._owner = owner

    @property
    def peers(self) -> int:
        return self.swarm.peers

    @property
    def seeds(self) -> int:
        return self.swarm.seeds

    @property
    def rate(self) -> int:
        return self.swarm.download_rate

    def rest(self) -> None:
        # Not upload mode: seeds that meet such a node part at once, and stay away for a while. A paused torrent meets
        # nobody, and takes pieces all the same; only its check needs it to run.
        self.handle.pause()
        self.handle.unset_flags(CHECKING)

    def ask_peers(self, wanted: bool) -> None:
        if wanted:
            self.handle.unset_flags(CHECKING)
            self.handle.resume()
            self._owner.announce_soon(self)
        else:
            self.handle.set_flags(lt.torrent_flags.upload_mode)

    def connect(self, peers: Iterable[tuple[str, int]]) -> None:
        for peer in network.addresses(peers):
            self.handle.connect_peer(peer)

    def is_right(self, index: int, data: bytes) -> bool:
        expected: bytes = self.handle.torrent_file().hash_for_piece(index)
        return hashlib.sha1(data, usedforsecurity=False).digest() == expected

    def add_piece(self, index: int, data: bytes) -> None:
        self.handle.add_piece(index, data, 0)

    def want(self, pieces: Iterable[int], wanted: bool) -> None:
        self.handle.prioritize_pieces([(index, _WANTED if wanted else _UNWANTED) for index in pieces])

    def flush(self) -> None:
        self.handle.flush_cache()

    async def remove(self) -> None:
        await self._owner.remove(self)

    def fail(self, error: SwarmError) -> None:
        if self.listener is not None:
            self.listener.on_error(error)
        for waiting in (self.with_metadata, self.resume_data, self.finished, *self.reads.values()):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)

    def gone(self) -> None:
        resolve(self.removed, None)


def resolve(future: asyncio.Future[_T] | None, value: _T) -> None:
    """Give `value` to who waits, unless there is nobody or they have an answer."""
    if future is not None and not future.done():
        future.set_result(value)
