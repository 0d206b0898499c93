"""What a file's bytes are called everywhere: one read pass feeds BLAKE3, SHA-256, the CID and both torrent hash trees.

One thread reads and one thread per hash follows through a small ring of buffers, so the pass is as fast as the slowest hash
or the cores allow. The hashes release the GIL while they work.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import queue
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from daemon.errors import NotFound, Unavailable, UsageError, VerificationError
from daemon.torrent.metainfo import TorrentHasher
from daemon.waiting import Stopped, stoppable
from registry.cid import UnixfsHasher
from registry.records import Identity

_BUFFER = 2 << 20  # bytes read at once
_BUFFERS = 8  # together the most memory that one pass holds, whatever the size of the file
_DIGEST_BUFFER = 16 << 20  # bytes; enough for every core to get a share

Feed = Callable[[memoryview], object]


@dataclass(frozen=True, slots=True)
class Identified:
    """All names of a file's bytes, its .torrent, and the CIDs of its leaves in file order and of its inner nodes."""

    identity: Identity
    torrent: bytes
    leaves: list[str]
    nodes: list[str]


async def identify(path: Path, on_bytes: Callable[[int], None] | None = None) -> Identified:
    """Read `path` once and name its bytes. `on_bytes` gets the running total of bytes read, on the loop.

    Raises `NotFound`, `UsageError` (empty, or no regular file), `VerificationError` when the file changes while it is read,
    `Unavailable` when the disk cannot be read. A cancelled call returns when its threads have ended.
    """
    loop = asyncio.get_running_loop()

    def report(total: int) -> None:
        if on_bytes is not None:
            loop.call_soon_threadsafe(on_bytes, total)

    def work(stop: threading.Event) -> Identified:
        with _opened(path) as file:
            return _hash(path, file, report, stop)

    return await stoppable(work)


async def digest(path: Path) -> str:
    """The BLAKE3 alone, by all cores: several times as fast. Raises `NotFound`, `UsageError`, `Unavailable`; cancelled like `identify`."""

    def work(stop: threading.Event) -> str:
        whole = blake3(max_threads=blake3.AUTO)
        # Not mapped: a file that shrinks under a mapping would be the end of the process.
        buffer = memoryview(bytearray(_DIGEST_BUFFER))
        with _opened(path) as file:
            while read := file.readinto(buffer):  # type: ignore[attr-defined]  # typeshed: an unbuffered file has it
                whole.update(buffer[:read])
                if stop.is_set():
                    raise Stopped
        return str(whole.hexdigest())

    return await stoppable(work)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(str(path), "is no file", "name a GGUF file")
        with open(path, "rb", buffering=0) as file:
            yield file
    except FileNotFoundError as error:
        raise NotFound(str(path), "there is no such file", "check the path") from error
    except PermissionError as error:
        raise UsageError(str(path), "may not be read", "check who owns it") from error
    except OSError as error:
        raise Unavailable(str(path), f"cannot be read: {error.strerror}", "check the disk") from error


def _hash(path: Path, file: BinaryIO, report: Callable[[int], None], stop: threading.Event) -> Identified:
    before = os.fstat(file.fileno())
    if before.st_size == 0:
        raise UsageError(str(path), "is empty", "name a GGUF file")
    whole, sha256, cid, torrent = blake3(), hashlib.sha256(), UnixfsHasher(), TorrentHasher(before.st_size)
    total = _feed(file, [whole.update, sha256.update, cid.update, torrent.pieces.update, torrent.blocks.update], report, stop)
    after = os.fstat(file.fileno())
    if not total == before.st_size == after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise VerificationError(str(path), "changed while it was read", "try again when nothing writes to it")
    digest = whole.hexdigest()
    made = torrent.finish(f"{digest}.gguf")
    identity = Identity(before.st_size, digest, sha256.hexdigest(), cid.finish(), made.infohash, made.infohash_v2)
    return Identified(identity, made.torrent, cid.leaves, cid.nodes)


def _feed(file: BinaryIO, feeds: Sequence[Feed], report: Callable[[int], None], stop: threading.Event) -> int:
    """Give all of `file` to every feed, each on a thread of its own; returns the number of bytes.

    `done` gets the number of a buffer each time a feed is through with it, or what made a feed fail.
    """
    buffers = [memoryview(bytearray(_BUFFER)) for _ in range(_BUFFERS)]
    busy = [0] * _BUFFERS  # feeds that still read this buffer
    done: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
    inboxes: list[queue.SimpleQueue[tuple[int, memoryview] | None]] = [queue.SimpleQueue() for _ in feeds]
    threads = [threading.Thread(target=_follow, args=(*pair, done), daemon=True) for pair in zip(feeds, inboxes, strict=True)]
    for thread in threads:
        thread.start()
    total = turn = 0
    try:
        while not stop.is_set():
            while busy[turn]:
                _settle(busy, done.get())
            read = file.readinto(buffers[turn])  # type: ignore[attr-defined]  # typeshed: an unbuffered file has it
            if not read:
                break
            busy[turn] = len(feeds)
            for inbox in inboxes:
                inbox.put((turn, buffers[turn][:read]))
            total += read
            turn = (turn + 1) % _BUFFERS
            report(total)
        while any(busy):
            _settle(busy, done.get())
    finally:
        for inbox in inboxes:
            inbox.put(None)
        for thread in threads:
            thread.join()
    if stop.is_set():
        raise Stopped
    return total


def _settle(busy: list[int], outcome: int | Exception) -> None:
    if isinstance(outcome, Exception):
        raise outcome
    busy[outcome] -= 1


def _follow(feed: Feed, inbox: queue.SimpleQueue[tuple[int, memoryview] | None], done: queue.SimpleQueue[int | Exception]) -> None:
    try:
        while (item := inbox.get()) is not None:
            feed(item[1])
            done.put(item[0])
    except Exception as error:  # handed to the reading thread, which raises it
        done.put(error)
