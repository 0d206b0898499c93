"""The BitTorrent session on real libtorrent over loopback: two nodes, lying nodes, full disks, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import libtorrent as lt
import pytest

from daemon.errors import NoSpace, Unavailable, Unserved, VerificationError
from daemon.torrent import network
from daemon.torrent.metainfo import (
    BLOCK,
    MAX_SMALL,
    MIN_PIECE,
    Metainfo,
    TorrentHasher,
    parse,
    piece_length,
    small_torrent,
)
from daemon.torrent.session import TorrentSession

SIZE = 6 * MIN_PIECE + 4321
PIECES = 7


def content(size: int = SIZE) -> bytes:
    return random.Random(size).randbytes(size)


def torrent_of(data: bytes, name: str = "ab" * 32 + ".gguf") -> Metainfo:
    hasher = TorrentHasher(len(data))
    hasher.update(data)
    return hasher.finish(name)


def piece(data: bytes, index: int) -> bytes:
    return data[index * MIN_PIECE : (index + 1) * MIN_PIECE]


@contextlib.asynccontextmanager
async def node(**limits: int) -> AsyncIterator[TorrentSession]:
    session = TorrentSession("loopback", 0, **limits)
    await session.start()
    try:
        yield session
    finally:
        await session.close()


@contextlib.asynccontextmanager
async def seeder(made: Metainfo, path: Path, data: bytes, **limits: int) -> AsyncIterator[tuple[str, int]]:
    await asyncio.to_thread(path.write_bytes, data)
    async with node(**limits) as session:
        await session.seed(made.torrent, path)
        yield ("127.0.0.1", session.port)


async def until(true: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


# -- the torrents are libtorrent's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, 3 * BLOCK, MIN_PIECE, MIN_PIECE + 1, SIZE])
def test_the_info_dict_is_the_one_that_libtorrent_makes(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.gguf").write_bytes(content(size))
    theirs = lt.create_torrent([lt.create_file_entry("a.gguf", size)], piece_length(size), lt.create_torrent.no_attributes)
    theirs.set_creation_date(0)
    lt.set_piece_hashes(theirs, str(tmp_path))
    assert torrent_of(content(size), "a.gguf").torrent == lt.bencode(theirs.generate())


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, MAX_SMALL])
def test_a_small_torrent_is_the_one_that_libtorrent_makes(tmp_path: Path, size: int) -> None:
    (tmp_path / "cid.json").write_bytes(content(size))
    files = [lt.create_file_entry("cid.json", size)]
    theirs = lt.create_torrent(files, BLOCK, lt.create_torrent.no_attributes)
    theirs.set_creation_date(0)
    lt.set_piece_hashes(theirs, str(tmp_path))
    assert small_torrent("cid.json", content(size)).torrent == lt.bencode(theirs.generate())


def test_libtorrent_reads_the_same_facts() -> None:
    made = torrent_of(content())
    hashes = lt.load_torrent_buffer(made.torrent).ti.info_hashes()
    facts = parse(made.torrent)
    assert (str(hashes.v1), str(hashes.v2)) == (facts.infohash, facts.infohash_v2) == (made.infohash, made.infohash_v2)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["public", "lan", "loopback"])
def test_every_setting_is_one_that_libtorrent_knows(kind: network.Network) -> None:
    """libtorrent swallows misspelt keys and wrong types. Nothing is started here: `public` would talk to the world."""
    wanted = network.settings(kind, 0, download_rate=1000, upload_rate=2000)
    known = lt.default_settings()
    assert {key: type(value) for key, value in wanted.items()} == {key: type(known[key]) for key in wanted}


@pytest.mark.parametrize(
    ("kind", "closed", "open_"),
    [
        ("loopback", ("10.0.0.1", "::1", "8.8.8.8"), ("127.0.0.1",)),
        ("lan", ("8.8.8.8", "2001:db8::1"), ("127.0.0.1", "10.0.0.1", "192.168.7.7")),
        # Anybody can name a private address on the DHT: only our own LAN is spoken to.
        ("public", ("10.0.0.1", "192.168.8.1", "127.0.0.1", "169.254.169.254", "fc00::1"), ("8.8.8.8", "192.168.7.7")),
    ],
)
def test_whom_a_session_speaks_to(kind: network.Network, closed: tuple[str, ...], open_: tuple[str, ...]) -> None:
    filter_ = lt.ip_filter()
    for first, last, may in network.rules(kind, ["192.168.7.0/24"] if kind == "public" else []):
        filter_.add_rule(first, last, 0 if may else 1)
    assert [filter_.access(address) for address in closed] == [1] * len(closed)
    assert [filter_.access(address) for address in open_] == [0] * len(open_)


def test_only_public_asks_the_world() -> None:
    for kind in ("lan", "loopback"):
        settings = network.settings(kind, 0, download_rate=0, upload_rate=0)  # type: ignore[arg-type]  # a literal in a loop
        assert not settings["dht_bootstrap_nodes"] and not settings["enable_dht"] and not settings["enable_upnp"]


def test_host_names_of_strangers_are_not_looked_up() -> None:
    peers = [("evil.example", 1), ("127.0.0.1", 0), ("127.0.0.1", 70000), ("0.0.0.0", 5), ("127.0.0.1", 5), ("::1", 6), ("127.0.0.1", 5)]
    assert network.addresses(peers) == [("127.0.0.1", 5), ("::1", 6)]


async def test_a_loopback_node_listens_on_loopback_alone() -> None:
    async with node() as session:
        with socket.create_connection(("127.0.0.1", session.port), timeout=5):
            pass
        listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
        assert [address for address in listening if address.endswith(f":{session.port:04X}")] == [f"0100007F:{session.port:04X}"]
        assert session._session.get_settings()["alert_queue_size"] == 100_000


async def test_a_port_in_use_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async with node() as first:
        second = TorrentSession("loopback", first.port)
        await second.start()
        try:
            assert second.port not in (0, first.port)
            assert "in use" in caplog.text
        finally:
            await second.close()


# -- downloading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, BLOCK + 1, MIN_PIECE, MIN_PIECE + 1, SIZE])
async def test_a_file_comes_from_a_peer_by_magnet_alone(tmp_path: Path, size: int) -> None:
    data, made = content(size), torrent_of(content(size))
    progress: list[int] = []
    async with seeder(made, tmp_path / "seed", data) as peer, node() as session:
        torrent = await session.metadata(made.infohash, made.infohash_v2, [peer], 60)
        assert torrent == made.torrent
        download = await session.download(torrent, tmp_path, "model.gguf", on_progress=progress.append)
        await download.checked()
        download.join_swarm([peer])
        await download.finished()
        assert (tmp_path / "model.gguf").read_bytes() == data
        assert download.missing() == [] and all(download.have())
        assert download.verified == download.received_from_peers == progress[-1] == size
        await download.close()
        (tmp_path / "model.gguf").rename(tmp_path / "renamed")
        assert session.status()["torrents"] == 0


@pytest.mark.parametrize("by", ["v1", "v2"])
async def test_metadata_by_either_infohash_alone_writes_nothing(tmp_path: Path, by: str) -> None:
    made = torrent_of(content())
    async with seeder(made, tmp_path / "seed", content()) as peer, node() as session:
        torrent = await session.metadata(made.infohash if by == "v1" else None, made.infohash_v2 if by == "v2" else None, [peer], 60)
        assert torrent == made.torrent
    assert not Path("/nonexistent").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["seed"]


async def test_piece_layers_that_come_in_several_messages(tmp_path: Path) -> None:
    """A peer gives at most 512 hashes at once, and libtorrent shows what has come so far as if it were all."""
    hasher = TorrentHasher(514 * MIN_PIECE)
    for _ in range(514):
        hasher.update(bytes(MIN_PIECE))
    made = hasher.finish("zeros.gguf")
    (tmp_path / "seed").touch()
    os.truncate(tmp_path / "seed", 514 * MIN_PIECE)
    async with node() as giver, node() as session:
        await giver.seed(made.torrent, tmp_path / "seed")
        assert await session.metadata(made.infohash, made.infohash_v2, [("127.0.0.1", giver.port)], 60) == made.torrent


async def test_metadata_that_nobody_gives() -> None:
    made = torrent_of(content())
    async with node() as session, node() as ignorant:
        with pytest.raises(Unserved):
            await session.metadata(made.infohash, made.infohash_v2, [("127.0.0.1", ignorant.port)], 0.5)
        with pytest.raises(Unserved):
            await session.metadata(made.infohash, None, [], 600)
        assert session.status()["torrents"] == 0


async def test_a_seeder_that_is_told_of_an_asker_dials_it(tmp_path: Path) -> None:
    """The asker knows nobody: its address went to the seeder by another way."""
    data, made = content(), torrent_of(content())
    await asyncio.to_thread((tmp_path / "seed").write_bytes, data)
    async with node() as session, node() as seeding:
        await seeding.seed(made.torrent, tmp_path / "seed")
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        await download.checked()
        download.join_swarm()
        seeding.meet("00" * 20, [("127.0.0.1", session.port)])
        seeding.meet(made.infohash, [("127.0.0.1", session.port), ("name.example", 1)])
        await download.finished()
        assert await asyncio.to_thread((tmp_path / "model.gguf").read_bytes) == data
        await download.close()


async def test_metadata_of_two_different_torrents(tmp_path: Path) -> None:
    made, other = torrent_of(content()), torrent_of(content(SIZE + 1))
    async with seeder(made, tmp_path / "seed", content()) as peer, node() as session:
        with pytest.raises((VerificationError, Unserved)):
            await session.metadata(made.infohash, other.infohash_v2, [peer], 3)


async def test_no_peer_is_met_before_joining(tmp_path: Path) -> None:
    data, made = content(), torrent_of(content())
    (tmp_path / "seed").write_bytes(data)
    async with node() as giver, node() as session:
        await giver.seed(made.torrent, tmp_path / "seed")
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        await download.checked()
        download.add_peers([("127.0.0.1", giver.port)])
        giver._torrents[made.infohash_v2].connect([("127.0.0.1", session.port)])
        for index in range(3):
            assert await download.put(index, piece(data, index))
        # The seed's call comes within a second, and finds nobody.
        await asyncio.sleep(1.2)
        assert download.missing() == [3, 4, 5, 6] and download.received_from_peers == 0 and download.peers == 0
        download.join_swarm()
        await download.finished()
        assert download.received_from_peers == SIZE - 3 * MIN_PIECE
        assert (tmp_path / "model.gguf").read_bytes() == data


async def test_joining_before_the_check_is_done(tmp_path: Path) -> None:
    data, made = content(), torrent_of(content())
    (tmp_path / "model.gguf").write_bytes(data[:MIN_PIECE])
    async with seeder(made, tmp_path / "seed", data) as peer, node() as session:
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        download.join_swarm([peer])
        await download.finished()
        assert download.received_from_peers == SIZE - MIN_PIECE
        assert (tmp_path / "model.gguf").read_bytes() == data


async def test_all_pieces_put_without_any_peer(tmp_path: Path) -> None:
    data, made = content(), torrent_of(content())
    async with node() as session:
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        results = await asyncio.gather(*(download.put(index, piece(data, index)) for index in reversed(range(PIECES))))
        await download.finished()
        assert results == [True] * PIECES and download.received_from_peers == 0
        assert (tmp_path / "model.gguf").read_bytes() == data
        assert [download.piece_size(index) for index in (0, 6)] == [MIN_PIECE, 4321]


async def test_a_wrong_piece_stays_missing_and_the_right_one_is_taken_after_it(tmp_path: Path) -> None:
    data, made = content(), torrent_of(content())
    async with node() as session:
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        assert not await download.put(2, bytes(MIN_PIECE))
        assert not await download.put(2, piece(data, 2)[:-1])
        assert not await download.put(7, piece(data, 2))
        assert not await download.put(-1, piece(data, 6))
        assert download.missing() == list(range(PIECES))
        assert await download.put(2, piece(data, 2))
        assert await download.put(2, bytes(MIN_PIECE)), "what is here is left alone"
        assert download.have() == [index == 2 for index in range(PIECES)]
        await download.close()
        with pytest.raises(Unavailable):
            await download.put(3, piece(data, 3))
        await download.close()
    assert piece((tmp_path / "model.gguf").read_bytes(), 2) == piece(data, 2)


async def test_peers_leave_out_what_another_source_brings(tmp_path: Path) -> None:
    data, made = content(), torrent_of(content())
    async with seeder(made, tmp_path / "seed", data) as peer, node() as session:
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        await download.checked()
        download.exclude(range(0, PIECES, 2))
        download.join_swarm([peer])
        await until(lambda: download.missing() == [0, 2, 4, 6])
        assert await download.put(0, piece(data, 0))
        assert download.missing() == [2, 4, 6], "excluded pieces do not come, although nothing else is left to do"
        download.include([2, 4, 6])
        await download.finished()
        assert download.received_from_peers == SIZE - MIN_PIECE
        assert (tmp_path / "model.gguf").read_bytes() == data


async def test_leaving_and_joining_again_needs_no_new_connection(tmp_path: Path) -> None:
    data, made = content(), torrent_of(content())
    async with seeder(made, tmp_path / "seed", data, upload_rate=6 * MIN_PIECE) as peer, node() as session:
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        await download.checked()
        download.join_swarm([peer])
        await until(lambda: len(download.missing()) < PIECES)
        download.leave_swarm()
        assert download.missing()
        download.join_swarm()
        await download.finished()
        assert (tmp_path / "model.gguf").read_bytes() == data


@pytest.mark.parametrize("left", ["half", "damaged", "empty", "longer"])
async def test_what_an_earlier_try_left_is_hashed_and_used(tmp_path: Path, left: str) -> None:
    data, made = content(), torrent_of(content())
    damaged = bytearray(data)
    damaged[MIN_PIECE + 5] ^= 1
    (tmp_path / "model.gguf").write_bytes(
        {"half": data[: 3 * MIN_PIECE + 9], "damaged": bytes(damaged), "empty": b"", "longer": data + b"more"}[left]
    )
    missing = {"half": [3, 4, 5, 6], "damaged": [1], "empty": list(range(PIECES)), "longer": []}[left]
    async with node() as session:
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        await download.checked()
        assert download.missing() == missing
        for index in missing:
            assert await download.put(index, piece(data, index))
        await download.finished()
        assert download.received_from_peers == 0
    assert (tmp_path / "model.gguf").read_bytes() == data


async def test_what_is_verified_survives_a_close_in_the_middle(tmp_path: Path) -> None:
    data, made = content(), torrent_of(content())
    async with node() as session:
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        for index in (0, 3, 6):
            assert await download.put(index, piece(data, index))
        await download.close()
        again = await session.download(made.torrent, tmp_path, "model.gguf")
        await again.checked()
        assert again.missing() == [1, 2, 4, 5]


async def test_a_download_passes_on_what_it_has(tmp_path: Path) -> None:
    """Two halves of the file on two nodes, and no seed: each gets the other half."""
    data, made = content(), torrent_of(content())
    async with node() as one, node() as two:
        first, second = [await s.download(made.torrent, tmp_path, f"{s.port}.gguf") for s in (one, two)]
        for index in range(PIECES):
            assert await (first if index % 2 else second).put(index, piece(data, index))
        first.join_swarm()
        second.join_swarm([("127.0.0.1", one.port)])
        await asyncio.gather(first.finished(), second.finished())
        assert (tmp_path / f"{one.port}.gguf").read_bytes() == (tmp_path / f"{two.port}.gguf").read_bytes() == data


async def test_pieces_put_and_pieces_from_peers_at_the_same_time(tmp_path: Path) -> None:
    data = content(40 * MIN_PIECE + 1)
    made = torrent_of(data)
    async with seeder(made, tmp_path / "seed", data) as peer, node() as session:
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        await download.checked()
        download.join_swarm([peer])
        await until(lambda: len(download.missing()) < download.pieces)
        # Nothing is excluded, so both bring the same pieces now and then; none may be lost or counted twice.
        results = await asyncio.gather(*(download.put(index, piece(data, index)) for index in reversed(range(download.pieces))))
        assert results == [True] * download.pieces
        await download.finished()
        assert download.verified == len(data)
        assert (tmp_path / "model.gguf").read_bytes() == data


# -- lying and failing parts ------------------------------------------------------------------------------------------


async def test_a_corrupt_seeder_is_given_up_and_an_honest_one_finishes(tmp_path: Path) -> None:
    data, made = content(), torrent_of(content())
    wrong = bytearray(data)
    for index in range(PIECES):
        wrong[index * MIN_PIECE] ^= 1
    # A seeder that checks its file would notice; this one takes the hashes from a torrent of its own making.
    async with node() as session, seeder(made, tmp_path / "honest", data) as honest:
        (tmp_path / "lies").write_bytes(bytes(wrong))
        async with node() as liar:
            await liar.seed(made.torrent, tmp_path / "lies")
            download = await session.download(made.torrent, tmp_path, "model.gguf")
            await download.checked()
            download.join_swarm([("127.0.0.1", liar.port)])
            await until(lambda: download.peers == 1)
            download.add_peers([honest])
            await download.finished()
            assert (tmp_path / "model.gguf").read_bytes() == data
            assert (tmp_path / "lies").read_bytes() == bytes(wrong), "a seed never writes, even when it learns that it is damaged"


async def test_a_seed_never_writes_and_never_makes_a_file(tmp_path: Path) -> None:
    data, made = content(), torrent_of(content())
    async with seeder(made, tmp_path / "whole", data) as peer, node() as session:
        with pytest.raises(Unavailable):
            await session.seed(made.torrent, tmp_path / "missing")
        (tmp_path / "short").write_bytes(data[:-1])
        with pytest.raises(VerificationError, match="bytes where its torrent says"):
            await session.seed(made.torrent, tmp_path / "short")
        (tmp_path / "shrinks").write_bytes(data)
        (tmp_path / "shrinks").chmod(0o400)
        seed = await session.seed(made.torrent, tmp_path / "shrinks")
        assert await session.seed(made.torrent, tmp_path / "shrinks") is seed
        os.truncate(tmp_path / "shrinks", MIN_PIECE)
        session._torrents[made.infohash_v2].connect([peer])
        async with node() as third:
            download = await third.download(made.torrent, tmp_path, "model.gguf")
            await download.checked()
            download.join_swarm([("127.0.0.1", session.port), peer])
            await download.finished()
        assert (tmp_path / "shrinks").stat().st_size == MIN_PIECE
        assert not (tmp_path / "missing").exists()
    assert (tmp_path / "short").read_bytes() == data[:-1]


async def test_a_forgotten_seed_keeps_its_file_and_serves_no_more(tmp_path: Path) -> None:
    data, made = content(), torrent_of(content())
    (tmp_path / "seed").write_bytes(data)
    async with node() as session, node() as other:
        await session.seed(made.torrent, tmp_path / "seed")
        assert await session.metadata(made.infohash, None, [], 1) == made.torrent, "what is seeded here needs no network"
        with pytest.raises(Unavailable, match="in use"):
            await session.download(made.torrent, tmp_path, "model.gguf")
        await session.forget(made.infohash_v2)
        await session.forget(made.infohash_v2)
        await session.forget("00" * 32)
        assert session.status()["torrents"] == 0 and (tmp_path / "seed").read_bytes() == data
        with pytest.raises(Unserved):
            await other.metadata(made.infohash, made.infohash_v2, [("127.0.0.1", session.port)], 0.5)
        (tmp_path / "seed").rename(tmp_path / "moved")
        moved = await session.seed(made.torrent, tmp_path / "moved")
        assert moved.path == tmp_path / "moved"


async def test_a_full_disk_is_said_and_what_was_written_is_used_later(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the system refuses the write with an error of its own."""
    data = content(40 * MIN_PIECE)
    made = torrent_of(data)
    async with node() as session:
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        await download.checked()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 * MIN_PIECE, before[1]))
        try:
            with pytest.raises(NoSpace):
                await asyncio.gather(*(download.put(index, piece(data, index)) for index in range(40)), download.finished())
            with pytest.raises(NoSpace):
                await download.finished()
            # While the limit stands: libtorrent has more blocks to write, and may.
            await download.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        again = await session.download(made.torrent, tmp_path, "model.gguf")
        await again.checked()
        missing = again.missing()
        assert set(range(20, 40)) <= set(missing)
        for index in missing:
            assert await again.put(index, piece(data, index))
        await again.finished()
    assert (tmp_path / "model.gguf").read_bytes() == data


async def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    data, made = content(), torrent_of(content())
    (tmp_path / "model.gguf").mkdir()
    async with node() as session:
        with pytest.raises(Unavailable):
            download = await session.download(made.torrent, tmp_path, "model.gguf")
            await download.checked()
            await download.put(0, piece(data, 0))
            await download.finished()


async def test_malformed_torrents_are_refused(tmp_path: Path) -> None:
    async with node() as session:
        for torrent in (b"", b"d4:infode", b"l" * 100_000):
            with pytest.raises(VerificationError):
                await session.download(torrent, tmp_path, "model.gguf")
            with pytest.raises(VerificationError):
                await session.seed(torrent, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


# -- limits, numbers and the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["upload_rate", "download_rate"])
async def test_rate_limits_hold_between_local_nodes_too(tmp_path: Path, side: str) -> None:
    """libtorrent exempts local peers unless told otherwise. Only the lower bound is looked at: a slow machine is no failure."""
    data = content(4 * MIN_PIECE)
    made = torrent_of(data)
    up, down = ({side: 2 * MIN_PIECE}, {}) if side == "upload_rate" else ({}, {side: 2 * MIN_PIECE})
    async with seeder(made, tmp_path / "seed", data, **up) as peer, node(**down) as session:
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        await download.checked()
        started = time.monotonic()
        download.join_swarm([peer])
        await download.finished()
        assert time.monotonic() - started > 1.0
    assert (tmp_path / "model.gguf").read_bytes() == data


async def test_numbers_of_a_swarm(tmp_path: Path) -> None:
    data = content(20 * MIN_PIECE)
    made = torrent_of(data)
    async with seeder(made, tmp_path / "seed", data, upload_rate=4 * MIN_PIECE) as peer, node() as session:
        assert session.seeds_and_peers(made.infohash_v2) == (0, 0)
        download = await session.download(made.torrent, tmp_path, "model.gguf")
        await download.checked()
        download.join_swarm([peer])
        await until(lambda: download.rate > 0 and session.seeds_and_peers(made.infohash_v2) == (1, 1))
        status = session.status()
        assert status["torrents"] == 1 and status["peers"] == 1
        assert (download.peers, download.seeds) == (1, 1)


async def test_closing_in_the_middle_ends_all_who_wait_and_leaves_nothing_open(tmp_path: Path) -> None:
    data = content(30 * MIN_PIECE)
    made, wanted = torrent_of(data), torrent_of(content())
    async with seeder(made, tmp_path / "seed", data, upload_rate=4 * MIN_PIECE) as peer:
        await asyncio.to_thread(int)  # the loop's own threads come into being before counting
        await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.05) for _ in range(40)))
        files, threads = set(os.listdir("/proc/self/fd")), threads_of_this_process()
        async with node() as session:
            download = await session.download(made.torrent, tmp_path, "model.gguf")
            await download.checked()
            download.join_swarm([peer])
            await until(lambda: download.peers == 1)
            tasks = [
                asyncio.ensure_future(download.finished()),
                asyncio.ensure_future(session.metadata(wanted.infohash, None, [peer], 600)),
            ]
            await asyncio.sleep(0)
            assert threads_of_this_process() > threads
            await asyncio.gather(session.close(), session.close())
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(result) for result in results] == [Unavailable, Unavailable]
            await download.close()
            with pytest.raises(Unavailable):
                await session.seed(made.torrent, tmp_path / "seed")
        # The seeder still lives, and may have closed or be closing its side of the connection.
        await until(lambda: threads_of_this_process() <= threads and len(set(os.listdir("/proc/self/fd")) - files) <= 1)
    assert threading.active_count() >= 1


def threads_of_this_process() -> int:
    return len(os.listdir("/proc/self/task"))


async def test_a_session_that_cannot_listen_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.torrent.session._LISTEN_S", 0.5)
    monkeypatch.setattr(network, "interfaces", lambda kind, port: "192.0.2.1:0")  # an address that no machine has
    before = threads_of_this_process()
    session = TorrentSession("loopback", 0)
    with pytest.raises(Unavailable, match="cannot listen"):
        await session.start()
    await session.close()
    await until(lambda: threads_of_this_process() <= before + 1)


async def test_logs_name_no_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    data, made = content(), torrent_of(content())
    (tmp_path / "seed").write_bytes(data)
    async with node() as session, node() as other:
        await session.seed(made.torrent, tmp_path / "seed")
        # libtorrent looks at the file once by itself; one that goes before that is no error of reading.
        handle = session._torrents[made.infohash].handle
        await until(lambda: handle.status().state == lt.torrent_status.states.seeding)
        (tmp_path / "seed").unlink()
        download = await other.download(made.torrent, tmp_path, "model.gguf")
        await download.checked()
        download.join_swarm([("127.0.0.1", session.port)])
        await until(lambda: "cannot be seeded" in caplog.text)
    assert str(tmp_path) not in caplog.text
