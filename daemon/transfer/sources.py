"""Where the pieces of a download come from, and where they go.

A `PieceSink` is the one writer of the file and checks every piece before it counts. With a .torrent that is libtorrent
(daemon/torrent/session.py: `Download`); for a model known by CID alone it is `LeafSink`, which checks each 1 MiB leaf
against its CID. `RangeSource` feeds either by parallel ranges from whoever reads them: the IPFS node, or a holder's peer API.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from daemon.errors import SwarmError, VerificationError
from daemon.transfer.store import disk_errors
from daemon.waiting import Stopped, stoppable
from registry.cid import LEAF_SIZE, leaf_cid

_RANGE = 16 << 20  # bytes asked for at once; one Bitswap session each
_WORKERS = 4  # more brought nothing on two cores, see docs/transfers.md
_PUTS = 3  # tries of one piece: a block of it that a lying peer had brought before makes the first one fail
_DROP_BATCH = 64  # leaves that may wait before IPFS forgets its cached copy of them


class PieceSink(Protocol):
    @property
    def piece_length(self) -> int: ...

    def piece_size(self, index: int) -> int: ...

    def missing(self) -> list[int]: ...

    def is_missing(self, index: int) -> bool: ...

    async def put(self, index: int, data: bytes) -> bool:
        """Store one piece if it is right. False: the bytes are wrong. Raises `NoSpace` or `Unavailable`."""
        ...

    def exclude(self, pieces: Sequence[int]) -> None:
        """These come from elsewhere just now."""
        ...

    def include(self, pieces: Sequence[int]) -> None:
        """These may come from anywhere again."""
        ...


class RangeReader(Protocol):
    """Gives ranges of a file by its CID; the IPFS node is one."""

    async def leaves(self, cid: str, *, deadline_s: float) -> list[str]:
        """CIDs of the leaves of which the reader keeps copies, in file order; empty where it keeps none."""
        ...

    def read_range(self, cid: str, offset: int, length: int, *, stall_s: float) -> AsyncIterator[bytes]:
        """Bytes `offset` to `offset + length`. Raises `Unserved` when none comes for `stall_s`, `Unavailable`."""
        ...

    async def drop_blocks(self, cids: Sequence[str]) -> None:
        """Forget the copies of these leaves."""
        ...


class LeafSink:
    """A file of leaves that are known by their CIDs. What is right on disk already is kept, whoever wrote it.

    A foreign layout (other chunk sizes than our profile's) has no leaf that could be checked here: pass no leaves, and the
    IPFS node's own check of every block has to do.
    """

    def __init__(self, path: Path, size: int, leaves: Sequence[str]) -> None:
        self._path = path
        self._leaves = leaves
        self._size = size
        self._missing: set[int] = set(range(-(-size // LEAF_SIZE)))

    @property
    def piece_length(self) -> int:
        return LEAF_SIZE

    def piece_size(self, index: int) -> int:
        return min(LEAF_SIZE, self._size - index * LEAF_SIZE)

    async def check(self) -> None:
        """Make the file, or find the leaves that an earlier try has left behind in it."""
        self._missing = await stoppable(self._find_missing)

    def _find_missing(self, stop: threading.Event) -> set[int]:
        missing = set(self._missing)
        with disk_errors("download"), open(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "rb", buffering=0) as file:
            os.ftruncate(file.fileno(), self._size)
            for index, cid in enumerate(self._leaves):
                if stop.is_set():
                    raise Stopped
                if leaf_cid(os.pread(file.fileno(), self.piece_size(index), index * LEAF_SIZE)) == cid:
                    missing.discard(index)
        return missing

    def missing(self) -> list[int]:
        return sorted(self._missing)

    def is_missing(self, index: int) -> bool:
        return index in self._missing

    async def put(self, index: int, data: bytes) -> bool:
        if not await asyncio.to_thread(self._write, index, data):
            return False
        self._missing.discard(index)
        return True

    def _write(self, index: int, data: bytes) -> bool:
        if self._leaves and leaf_cid(data) != self._leaves[index]:
            return False
        # Opened each time: a thread that outlives a cancelled pull must not write to whatever has the number of a closed file.
        with disk_errors("download"), self._path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), data, index * LEAF_SIZE)
        return True

    def exclude(self, pieces: Sequence[int]) -> None:
        """Nobody else writes here."""

    def include(self, pieces: Sequence[int]) -> None:
        """Nobody else writes here."""


class RateLimit:
    """Bytes per second over everything that shares it; 0 means no limit."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._free_at = 0.0

    async def take(self, amount: int) -> None:
        if self.rate <= 0:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + amount / self.rate
        # A tenth of a second of burst keeps the sleeps few.
        if (wait := self._free_at - now - 0.1) > 0:
            await asyncio.sleep(wait)


class RangeSource:
    """Draws the missing pieces of a file through a reader, whose copies of them are dropped as the file grows.

    `on_bytes` is told of each piece that it brought. `claimed` are the pieces that are on their way, shared with other sources of
    the same sink, so that no two bring one. It takes on no more ranges, of at most `range_size` bytes, once `go_on` says no.
    """

    def __init__(
        self,
        reader: RangeReader,
        cid: str,
        size: int,
        sink: PieceSink,
        limit: RateLimit,
        on_bytes: Callable[[int], None],
        *,
        stall_s: float,
        claimed: set[int] | None = None,
        workers: int = _WORKERS,
        range_size: int = _RANGE,
        go_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self._reader = reader
        self._size = size
        self._cid = cid
        self._sink = sink
        self._limit = limit
        self._on_bytes = on_bytes
        self._stall_s = stall_s
        self._workers = workers
        self._range_size = range_size
        self._go_on = go_on
        self._leaves: list[str] = []
        self._claimed: set[int] = set() if claimed is None else claimed
        self.claims: set[int] = set()  # those of it that are ours
        self._to_drop: list[str] = []

    async def run(self) -> None:
        """Until nobody has to bring any piece. Raises `Unserved`, `Unavailable`, `VerificationError` or `NoSpace`."""
        leaves = await self._reader.leaves(self._cid, deadline_s=self._stall_s)
        # Leaves of another layout are dropped when the whole is there.
        self._leaves = leaves if len(leaves) == -(-self._size // LEAF_SIZE) else []
        workers = [asyncio.create_task(self._work()) for _ in range(self._workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        await self._drop(all_of_them=True)

    async def _work(self) -> None:
        while self._go_on() and (pieces := self._next_run()):
            self._claimed.update(pieces)
            self.claims.update(pieces)
            self._sink.exclude(pieces)
            try:
                await self._fetch(pieces)
            finally:
                self._claimed.difference_update(pieces)
                self.claims.difference_update(pieces)
                self._sink.include(pieces)

    def _next_run(self) -> list[int]:
        """The next missing pieces that lie together, at most one range of them."""
        most = max(1, self._range_size // self._sink.piece_length)
        free = (piece for piece in self._sink.missing() if piece not in self._claimed)
        return next(_runs(free, most), [])

    async def _fetch(self, pieces: Sequence[int]) -> None:
        sizes = [self._sink.piece_size(piece) for piece in pieces]
        chunks = self._reader.read_range(self._cid, pieces[0] * self._sink.piece_length, sum(sizes), stall_s=self._stall_s)
        waiting = iter(pieces)
        async for data in _regrouped(self._limited(chunks), sizes):
            await self._store(next(waiting), data)

    async def _limited(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            await self._limit.take(len(chunk))
            yield chunk

    async def _store(self, piece: int, data: bytes) -> None:
        if piece == 0 and not data.startswith(b"GGUF"):
            raise VerificationError(self._cid, "the bytes are not a GGUF model", "check the code or CID with whoever gave it")
        if self._sink.is_missing(piece):  # no other source was quicker
            await self._put(piece, data)
            self._on_bytes(len(data))
        first = piece * self._sink.piece_length // LEAF_SIZE
        self._to_drop += self._leaves[first : first + -(-len(data) // LEAF_SIZE)]
        await self._drop(all_of_them=False)

    async def _put(self, piece: int, data: bytes) -> None:
        for _ in range(_PUTS):
            if await self._sink.put(piece, data):
                return
        raise VerificationError(self._cid, f"piece {piece} is not what was promised", "check the code or CID with whoever gave it")

    async def _drop(self, *, all_of_them: bool) -> None:
        if self._to_drop and (all_of_them or len(self._to_drop) >= _DROP_BATCH):
            batch, self._to_drop = self._to_drop, []
            await self._reader.drop_blocks(batch)


async def _regrouped(chunks: AsyncIterator[bytes], sizes: Sequence[int]) -> AsyncIterator[bytes]:
    """The same bytes cut into `sizes`. A chunk that has the right size already is passed on uncopied."""
    parts: list[bytes] = []
    waiting = iter(sizes)
    left = next(waiting)
    async for chunk in chunks:
        at = 0
        while len(chunk) - at >= left:
            parts.append(chunk[at : at + left])
            at += left
            yield parts[0] if len(parts) == 1 else b"".join(parts)
            parts, left = [], next(waiting, 0)
            if not left:
                return
        if at < len(chunk):
            parts.append(chunk[at:])
            left -= len(chunk) - at


def _runs(pieces: Iterator[int], most: int) -> Iterator[list[int]]:
    run: list[int] = []
    for piece in pieces:
        if run and (piece != run[-1] + 1 or len(run) == most):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def unwrap(group: BaseExceptionGroup) -> BaseException:
    """The one error of a task group that people should hear of: ours before anybody else's."""
    flat: list[BaseException] = []
    todo: list[BaseException] = [group]
    while todo:
        error = todo.pop()
        if isinstance(error, BaseExceptionGroup):
            todo += error.exceptions
        else:
            flat.append(error)
    return next((error for error in flat if isinstance(error, SwarmError)), flat[0])
