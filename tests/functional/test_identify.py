"""One read pass over real files: every name it finds is the one that each network's own tool gives."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import threading
import tracemalloc
from pathlib import Path

import libtorrent as lt
import pytest
from blake3 import blake3

from daemon.errors import NotFound, UsageError, VerificationError
from daemon.torrent.metainfo import piece_length
from daemon.transfer import identify as module
from daemon.transfer.identify import identify
from registry.cid import LEAF_SIZE, UnixfsHasher, leaf_cid

BUFFER = module._BUFFER


def write(path: Path, size: int) -> bytes:
    data = random.Random(size).randbytes(size)
    path.write_bytes(data)
    return data


def hold(path: Path, size: int) -> Path:
    """A file of zeros that takes no room on disk and long enough to read that something can happen meanwhile."""
    path.touch()
    os.truncate(path, size)
    return path


@pytest.mark.parametrize("size", [1, 1000, LEAF_SIZE, BUFFER - 1, BUFFER, BUFFER + 1, 9 * BUFFER + 17])
async def test_every_name_is_what_its_own_hash_says(tmp_path: Path, size: int) -> None:
    data = write(tmp_path / "a.gguf", size)
    found = await identify(tmp_path / "a.gguf")
    assert found.identity.size == size
    assert found.identity.blake3 == blake3(data).hexdigest()
    assert found.identity.sha256 == hashlib.sha256(data).hexdigest()
    whole = UnixfsHasher()
    whole.update(data)
    assert (found.identity.cid, found.leaves, found.nodes) == (whole.finish(), whole.leaves, whole.nodes)
    assert found.leaves == [leaf_cid(data[at : at + LEAF_SIZE]) for at in range(0, size, LEAF_SIZE)]


async def test_the_torrent_is_the_one_that_libtorrent_makes(tmp_path: Path) -> None:
    data = write(tmp_path / "any name", 5 * LEAF_SIZE + 99)
    found = await identify(tmp_path / "any name")
    name = f"{blake3(data).hexdigest()}.gguf"
    (tmp_path / "any name").rename(tmp_path / name)
    theirs = lt.create_torrent([lt.create_file_entry(name, len(data))], piece_length(len(data)), lt.create_torrent.no_attributes)
    theirs.set_creation_date(0)
    lt.set_piece_hashes(theirs, str(tmp_path))
    assert found.torrent == lt.bencode(theirs.generate())
    hashes = lt.load_torrent_buffer(found.torrent).ti.info_hashes()
    assert (found.identity.infohash, found.identity.infohash_v2) == (str(hashes.v1), str(hashes.v2))


@pytest.mark.parametrize("size", [1, 3 * LEAF_SIZE + 5])
async def test_the_cid_is_the_one_that_kubo_gives(tmp_path: Path, kubo_binary: Path, size: int) -> None:
    write(tmp_path / "a.gguf", size)
    environment = {"IPFS_PATH": str(tmp_path / "repo"), "PATH": os.environ["PATH"], "HOME": str(tmp_path), "IPFS_TELEMETRY": "off"}

    def kubo(*arguments: str) -> str:
        done = subprocess.run([kubo_binary, *arguments], env=environment, check=True, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    await asyncio.to_thread(kubo, "init", "--profile=test,unixfs-v1-2025")
    theirs = await asyncio.to_thread(kubo, "add", "-Q", "--only-hash", str(tmp_path / "a.gguf"))
    assert (await identify(tmp_path / "a.gguf")).identity.cid == theirs


async def test_progress_is_told_on_the_loop_and_ends_at_the_size(tmp_path: Path) -> None:
    size = 3 * BUFFER + 1
    write(tmp_path / "a.gguf", size)
    told: list[tuple[int, int]] = []
    await identify(tmp_path / "a.gguf", lambda total: told.append((total, threading.get_ident())))
    assert [total for total, _ in told] == [BUFFER, 2 * BUFFER, 3 * BUFFER, size]
    assert {thread for _, thread in told} == {threading.get_ident()}


async def test_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    path = hold(tmp_path / "a.gguf", 64 * BUFFER)
    tracemalloc.start()
    try:
        await identify(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (module._BUFFERS + 2) * BUFFER


async def test_files_that_cannot_be_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("empty", "pipe", "."):
        with pytest.raises(UsageError):
            await identify(tmp_path / name)
    with pytest.raises(NotFound):
        await identify(tmp_path / "missing")


@pytest.mark.parametrize("change", ["grows", "shrinks", "is rewritten"])
async def test_a_file_that_changes_while_it_is_read_has_no_name(tmp_path: Path, change: str) -> None:
    size = 200 * BUFFER
    path = hold(tmp_path / "a.gguf", size)
    told: list[int] = []

    def disturb(total: int) -> None:
        if not told:
            if change == "is rewritten":
                with path.open("r+b") as file:
                    file.write(b"x")
            else:
                os.truncate(path, size + 1 if change == "grows" else BUFFER)
        told.append(total)

    with pytest.raises(VerificationError, match="changed while it was read"):
        await identify(path, disturb)


async def test_cancelling_ends_its_threads(tmp_path: Path) -> None:
    path = hold(tmp_path / "a.gguf", 1000 * BUFFER)
    started = asyncio.Event()
    before = set(threading.enumerate())
    work = asyncio.ensure_future(identify(path, lambda total: started.set()))
    await started.wait()
    assert len(set(threading.enumerate()) - before) > 2
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    # What is left belongs to the loop: the executor keeps its idle threads.
    assert [thread.name for thread in set(threading.enumerate()) - before if not thread.name.startswith("asyncio")] == []


def test_a_hash_that_fails_ends_the_pass(tmp_path: Path) -> None:
    def broken(data: memoryview) -> None:
        raise RuntimeError("broken")

    before = threading.active_count()
    with hold(tmp_path / "a.gguf", 50 * BUFFER).open("rb", buffering=0) as file, pytest.raises(RuntimeError, match="broken"):
        module._feed(file, [hashlib.sha256().update, broken], lambda total: None, threading.Event())
    assert threading.active_count() == before
