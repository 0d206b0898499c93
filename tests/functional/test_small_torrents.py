"""Small objects over BitTorrent, on real libtorrent over loopback: given whole, bounded, and without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import libtorrent as lt
import pytest

from daemon.errors import Unavailable, Unserved, UsageError, VerificationError
from daemon.torrent.metainfo import BLOCK, MAX_SMALL, TorrentHasher, small_torrent
from daemon.torrent.session import TorrentSession

NAME = "bafkreigh2akiscaildc.json"
LIMIT = MAX_SMALL
Address = tuple[str, int]


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made; every test ends with none left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@contextlib.asynccontextmanager
async def node() -> AsyncIterator[TorrentSession]:
    session = TorrentSession("loopback", 0)
    await session.start()
    try:
        yield session
    finally:
        await session.close()


@contextlib.asynccontextmanager
async def giver(folder: Path, data: bytes) -> AsyncIterator[tuple[str, Address]]:
    async with node() as session:
        seed = await session.seed_bytes(NAME, data, folder)
        yield seed.infohash, ("127.0.0.1", session.port)


@pytest.mark.parametrize("size", [1, 2000, BLOCK, BLOCK + 1, 3 * BLOCK, MAX_SMALL])
async def test_a_small_object_comes_from_a_peer_by_its_infohash(
    size: int, tmp_path: Path, temporary: Path
) -> None:
    data = content(size)
    async with giver(tmp_path, data) as (infohash, peer), node() as session:
        assert infohash == small_torrent(NAME, data).infohash
        assert await session.fetch_small(infohash, [peer], limit=LIMIT, deadline_s=60) == data
        assert session.status()["torrents"] == 0 and session.known(infohash) is None
        assert list(temporary.iterdir()) == []


async def test_a_giver_that_is_told_of_an_asker_dials_it(tmp_path: Path) -> None:
    async with node() as giving, node() as session:
        seed = await giving.seed_bytes(NAME, b"{}", tmp_path)
        nobody = ("127.0.0.1", 9)
        fetch = asyncio.ensure_future(
            session.fetch_small(seed.infohash, [nobody], limit=LIMIT, deadline_s=60)
        )
        while not fetch.done():
            giving.meet(seed.infohash, [("127.0.0.1", session.port)])
            await asyncio.wait([fetch], timeout=0.2)
        assert await fetch == b"{}"


async def test_seeds_of_small_objects_are_no_models(tmp_path: Path) -> None:
    async with node() as session:
        seed = await session.seed_bytes(NAME, b"{}", tmp_path)
        assert session.status()["torrents"] == 0
        assert (tmp_path / NAME).read_bytes() == b"{}"
        assert await session.seed_bytes(NAME, b"{}", tmp_path) is seed
        assert await session.fetch_small(seed.infohash, limit=2, deadline_s=60) == b"{}"
        with pytest.raises(VerificationError):
            await session.fetch_small(seed.infohash, limit=1, deadline_s=60)


async def test_a_file_that_was_damaged_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"garbage")
    async with giver(tmp_path, b"{}") as (infohash, peer), node() as session:
        assert await session.fetch_small(infohash, [peer], limit=LIMIT, deadline_s=60) == b"{}"


async def test_callers_of_one_object_share_one_fetch(tmp_path: Path) -> None:
    data = content(MAX_SMALL)
    async with giver(tmp_path, data) as (infohash, peer), node() as session:
        fetches = [
            session.fetch_small(infohash, [peer], limit=LIMIT, deadline_s=60) for _ in range(10)
        ]
        assert await asyncio.gather(*fetches) == [data] * 10


async def test_a_caller_who_leaves_ends_nothing_for_the_others(
    tmp_path: Path, temporary: Path
) -> None:
    data = content(2000)
    async with node() as session:
        infohash = small_torrent(NAME, data).infohash
        nobody = ("127.0.0.1", 9)
        impatient = asyncio.ensure_future(
            session.fetch_small(infohash, [nobody], limit=LIMIT, deadline_s=3600)
        )
        patient = asyncio.ensure_future(
            session.fetch_small(infohash, [nobody], limit=LIMIT, deadline_s=3600)
        )
        await asyncio.sleep(0.2)
        impatient.cancel()
        await asyncio.wait([impatient])
        assert impatient.cancelled() and not patient.done()
        async with giver(tmp_path, data) as (_, peer):
            assert await session.fetch_small(infohash, [peer], limit=LIMIT, deadline_s=60) == data
            assert await patient == data
        assert list(temporary.iterdir()) == []


async def test_a_fetch_that_all_have_left_can_be_begun_again_at_once(tmp_path: Path) -> None:
    data = content(2000)
    async with giver(tmp_path, data) as (infohash, peer), node() as session:
        for _ in range(3):
            leaving = asyncio.ensure_future(
                session.fetch_small(infohash, [("127.0.0.1", 9)], limit=LIMIT, deadline_s=3600)
            )
            await asyncio.sleep(0.05)
            leaving.cancel()
            again = session.fetch_small(infohash, [peer], limit=LIMIT, deadline_s=60)
            assert await again == data
            await asyncio.wait([leaving])


async def test_nobody_gives_it(temporary: Path) -> None:
    infohash = small_torrent(NAME, b"{}").infohash
    async with node() as session, node() as ignorant:
        with pytest.raises(Unserved):
            await session.fetch_small(
                infohash, [("127.0.0.1", ignorant.port)], limit=LIMIT, deadline_s=0.5
            )
        with pytest.raises(Unserved):
            await session.fetch_small(infohash, [("name.example", 5)], limit=LIMIT, deadline_s=3600)
        assert session.known(infohash) is None
        assert list(temporary.iterdir()) == []


async def test_what_is_larger_than_the_limit_is_refused_before_any_of_it_comes(
    tmp_path: Path, temporary: Path
) -> None:
    data = content(MAX_SMALL)
    async with giver(tmp_path, data) as (infohash, peer), node() as session:
        with pytest.raises(VerificationError, match=f"{MAX_SMALL} bytes"):
            await session.fetch_small(infohash, [peer], limit=MAX_SMALL - 1, deadline_s=60)
        assert list(temporary.rglob("*")) == []


async def test_a_torrent_of_a_large_file_is_refused(tmp_path: Path, temporary: Path) -> None:
    data = content(3 << 20)
    hasher = TorrentHasher(len(data))
    hasher.update(data)
    made = hasher.finish("large.gguf")
    (tmp_path / "large").write_bytes(data)
    async with node() as session, node() as seeding:
        await seeding.seed(made.torrent, tmp_path / "large")
        with pytest.raises(VerificationError, match="bytes"):
            await session.fetch_small(
                made.infohash, [("127.0.0.1", seeding.port)], limit=LIMIT, deadline_s=60
            )
        assert list(temporary.rglob("*")) == []


async def test_a_torrent_of_several_files_is_refused(tmp_path: Path, temporary: Path) -> None:
    """Made and given by plain libtorrent, as somebody hostile would."""
    folder = tmp_path / "evil"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(b"x" * 100)
    files = [lt.create_file_entry(f"evil/{name}", 100) for name in ("a", "b")]
    made = lt.create_torrent(files, BLOCK)
    lt.set_piece_hashes(made, str(tmp_path))
    params = lt.load_torrent_buffer(lt.bencode(made.generate()))
    params.save_path = str(tmp_path)
    params.flags = lt.torrent_flags.seed_mode
    quiet = {"enable_dht": False, "enable_lsd": False, "enable_upnp": False, "enable_natpmp": False}
    hostile = lt.session({"listen_interfaces": "127.0.0.1:0", **quiet})
    handle = hostile.add_torrent(params)
    async with node() as session:
        with pytest.raises(VerificationError, match="several files"):
            await session.fetch_small(
                str(handle.info_hashes().v1),
                [("127.0.0.1", hostile.listen_port())],
                limit=LIMIT,
                deadline_s=60,
            )
        assert list(temporary.rglob("*")) == []


async def test_closing_ends_a_fetch_and_leaves_no_folder(temporary: Path) -> None:
    infohash = small_torrent(NAME, b"{}").infohash
    async with node() as session:
        fetch = asyncio.ensure_future(
            session.fetch_small(infohash, [("127.0.0.1", 9)], limit=LIMIT, deadline_s=3600)
        )
        await asyncio.sleep(0.1)
        assert len(list(temporary.iterdir())) == 1
        await session.close()
        with pytest.raises(Unavailable):
            await fetch
        with pytest.raises(Unavailable):
            await session.fetch_small(infohash, [("127.0.0.1", 9)], limit=LIMIT, deadline_s=3600)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("name", "size"), [("../evil", 1), (NAME, 0), (NAME, MAX_SMALL + 1)])
async def test_what_is_no_small_object_is_neither_written_nor_given(
    name: str, size: int, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    async with node() as session:
        with pytest.raises((UsageError, VerificationError)):
            await session.seed_bytes(name, bytes(size), store)
    assert not store.exists() and not (tmp_path / "evil").exists()


async def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"no folder")
    async with node() as session:
        with pytest.raises(Unavailable) as refused:
            await session.seed_bytes(NAME, b"{}", tmp_path / "store")
    assert str(tmp_path) not in str(refused.value)
