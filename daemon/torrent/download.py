"""One download: which pieces are here, which may come from peers, and when every byte is on disk.

Knows nothing of libtorrent: the session calls `on_*` for what libtorrent reports, and the download commands a `Handle`.
Two sources may feed it at once: peers (after `join_swarm`) and whoever calls `put`. libtorrent is the one writer and
hashes every piece before it counts.
"""

from __future__ import annotations

import asyncio
import errno
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from daemon.errors import BackendError, NoSpace, SwarmError, Unavailable
from daemon.torrent.metainfo import TorrentFacts

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Handle(Protocol):
    """What may be asked of a torrent. Nothing here waits for the network or the disk, but `remove`."""

    @property
    def peers(self) -> int: ...

    @property
    def seeds(self) -> int: ...

    @property
    def rate(self) -> int: ...

    def rest(self) -> None:
        """Meet no peer, neither ask nor answer one, until `ask_peers`."""
        ...

    def ask_peers(self, wanted: bool) -> None: ...

    def connect(self, peers: Iterable[tuple[str, int]]) -> None: ...

    def add_piece(self, index: int, data: bytes) -> None: ...

    def is_right(self, index: int, data: bytes) -> bool:
        """Whether `data` is piece `index`, by its v1 hash. On any thread."""
        ...

    def want(self, pieces: Iterable[int], wanted: bool) -> None: ...

    def flush(self) -> None: ...

    async def remove(self) -> None: ...


class Download:
    """A file on its way. Made by `TorrentSession.download`; `close` it whatever happens.

    No peer is met before `join_swarm`. `checked`, `put` and `finished` raise `NoSpace` when the disk is full
    and `Unavailable` when the file cannot be written or the session closes; the download is then over, and what it wrote
    is found again by the check of the next one.
    """

    def __init__(self, facts: TorrentFacts, handle: Handle, on_progress: Callable[[int], None] | None) -> None:
        self.facts = facts
        self.piece_length = facts.piece_length
        self.pieces = -(-facts.size // facts.piece_length)
        self._handle = handle
        self._on_progress = on_progress
        self._missing: dict[int, None] = dict.fromkeys(range(self.pieces))  # ordered, and quick to take from
        self._verified = 0
        self._from_peers = 0
        self._checked = False
        self._joined = False
        self._peers: list[tuple[str, int]] = []  # named before the swarm was joined
        self._flushes_due = 0  # that libtorrent makes by itself
        self._error: SwarmError | None = None
        self._closed = False
        self._waiting: dict[asyncio.Future[bool], None] = {}
        self._puts: defaultdict[int, list[asyncio.Future[bool]]] = defaultdict(list)
        self._checks: list[asyncio.Future[bool]] = []
        self._ends: list[asyncio.Future[bool]] = []
        self._flushes: list[asyncio.Future[bool]] = []

    # -- what is here -----------------------------------------------------------------------------------------------

    def piece_size(self, index: int) -> int:
        """Bytes of piece `index`; the last one is what is left over."""
        return min(self.piece_length, self.facts.size - index * self.piece_length)

    def have(self) -> list[bool]:
        return [index not in self._missing for index in range(self.pieces)]

    def missing(self) -> list[int]:
        """Pieces that are not verified yet, in file order. All of them until `checked`."""
        return list(self._missing)

    def is_missing(self, index: int) -> bool:
        return index in self._missing

    @property
    def verified(self) -> int:
        """Bytes in pieces that passed their hash, wherever they came from."""
        return self._verified

    @property
    def received_from_peers(self) -> int:
        """Bytes in pieces that passed their hash, were not here at the check and were not put: whole pieces, so it lags
        behind the wire by what is in flight, and a piece that a peer began and `put` completed counts as put."""
        return self._from_peers

    @property
    def peers(self) -> int:
        """Connected BitTorrent peers, seeds included; up to half a second old, as are `seeds` and `rate`."""
        return self._handle.peers

    @property
    def seeds(self) -> int:
        return self._handle.seeds

    @property
    def rate(self) -> int:
        """Payload from peers in bytes per second."""
        return self._handle.rate

    async def checked(self) -> None:
        """Until what lay on disk already has been hashed."""
        if not self._checked:
            await self._wait_in(self._checks)

    async def finished(self) -> None:
        """Until every piece is verified and on disk, so that whoever reads the file now reads all of it."""
        while self._missing or not self._checked:
            await self._wait_in(self._ends)
        # libtorrent tells of the last piece before its bytes can be read back. Of the flushes that are reported, the
        # ones it made by itself may be older than the last piece; one more cannot be.
        for _ in range(self._flushes_due + 1):
            self._handle.flush()
            await self._wait_in(self._flushes)

    # -- feeding ----------------------------------------------------------------------------------------------------

    async def put(self, index: int, data: bytes) -> bool:
        """Give piece `index`. False: its hash is wrong and it stays missing. A piece that is here already is left alone.

        When peers had brought a part of the piece, a wrong block of theirs makes this False too: put it again.
        """
        await self.checked()
        self._raise_if_over()
        if not 0 <= index < self.pieces or len(data) != self.piece_size(index):
            return False
        # libtorrent hashes it again, but by then a wrong piece may lie on disk.
        right = await asyncio.to_thread(self._handle.is_right, index, data)
        self._raise_if_over()
        if index not in self._missing:
            return True
        if not right:
            return False
        passed = self._future()
        self._puts[index].append(passed)
        self._handle.add_piece(index, data)
        return await passed

    def join_swarm(self, peers: Sequence[tuple[str, int]] = ()) -> None:
        """From now on missing pieces are asked of peers too: of those named (IP, port) and of whoever discovery finds.

        Before it no peer is met, so that none gives or takes anything.
        """
        self._joined = True
        # Named first, because resuming a torrent connects at once to whom it knows; later ones wait for the next second.
        self.add_peers(peers)
        if self._running() and self._checked:
            self._handle.ask_peers(True)

    def add_peers(self, peers: Sequence[tuple[str, int]]) -> None:
        """Name more peers; they are kept for `join_swarm` when it has not been called."""
        if self._running() and self._checked and self._joined:
            self._handle.connect([*self._peers, *peers])
            self._peers.clear()
        else:
            self._peers += peers

    def leave_swarm(self) -> None:
        """Ask nothing of peers any more; what they have been asked for may still come."""
        if self._running() and self._checked and self._joined:
            self._handle.ask_peers(False)

    def exclude(self, pieces: Iterable[int]) -> None:
        """Peers shall not be asked for these: another source is bringing them."""
        if self._running():
            self._handle.want(pieces, False)

    def include(self, pieces: Iterable[int]) -> None:
        """Peers may be asked for these (again)."""
        if self._running():
            self._handle.want(pieces, True)

    async def close(self) -> None:
        """Let go of the file without deleting it; afterwards it may be renamed. Idempotent."""
        self._closed = True
        self.on_error(Unavailable("download", "it was closed"))
        await self._handle.remove()

    # -- what libtorrent reports ------------------------------------------------------------------------------------

    def on_checked(self, have: Sequence[bool]) -> None:
        self._checked = True
        for index, here in enumerate(have):
            if here and index in self._missing:
                self._take(index)
        if self._joined:
            self.add_peers([])
            self._handle.ask_peers(True)
        else:
            self._handle.rest()
            self._flushes_due += 1
        _resolve(self._checks)
        self._progress()

    def on_piece(self, index: int) -> None:
        if index in self._missing:
            self._take(index)
            if index not in self._puts and self._checked:
                self._from_peers += self.piece_size(index)
        _resolve(self._puts.pop(index, []))
        self._progress()

    def on_bad_piece(self, index: int) -> None:
        _resolve(self._puts.pop(index, []), False)

    def on_finished(self) -> None:
        # Reported for a complete check too, and there is nothing to flush then.
        if self._checked:
            self._flushes_due += 1

    def on_flushed(self) -> None:
        self._flushes_due = max(0, self._flushes_due - 1)
        _resolve(self._flushes)

    def on_error(self, error: SwarmError) -> None:
        """Everybody who waits gets `error`, and so does who asks later."""
        if self._error is None:
            self._error = error
        waiting, self._waiting = self._waiting, {}
        for future in waiting:
            if not future.done():
                future.set_exception(self._error)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _take(self, index: int) -> None:
        del self._missing[index]
        self._verified += self.piece_size(index)

    def _progress(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._verified)
        if self._checked and not self._missing:
            _resolve(self._ends)

    def _running(self) -> bool:
        return not self._closed and self._error is None

    def _raise_if_over(self) -> None:
        if self._error is not None:
            raise self._error

    def _future(self) -> asyncio.Future[bool]:
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        future.add_done_callback(lambda done: self._waiting.pop(done, None))
        return future

    async def _wait_in(self, queue: list[asyncio.Future[bool]]) -> None:
        self._raise_if_over()
        future = self._future()
        queue.append(future)
        await future


def _resolve(futures: list[asyncio.Future[bool]], value: bool = True) -> None:
    for future in futures:
        if not future.done():
            future.set_result(value)
    futures.clear()


def disk_error(number: int, message: str) -> BackendError:
    """What a failed read or write of libtorrent's is to people. `message` is the system's words, without a path."""
    if number in _FULL:
        return NoSpace("download", "the disk is full", "free some space and pull it again: it goes on where it was")
    return Unavailable("download", f"the file cannot be read or written: {message}", "check the data folder")
