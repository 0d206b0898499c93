"""The DHT as a meeting place: real libtorrent, `public` sessions that talk to 127.0.0.1 alone."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import Unavailable
from daemon.torrent import dht, dht_state, resolving
from daemon.torrent.metainfo import TorrentHasher
from daemon.torrent.session import TorrentSession

# What makes a `public` session one that stays on this machine, and lets DHT nodes share one
# address.
ON_LOOPBACK: dict[str, Any] = {
    "listen_interfaces": "127.0.0.1:0",
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_lsd": False,
    "allow_multiple_connections_per_ip": True,
    "dht_restrict_routing_ips": False,
    "dht_restrict_search_ips": False,
    "dht_prefer_verified_node_ids": False,
    "dht_ignore_dark_internet": False,
    "dht_block_ratelimit": 1000,
}
KEY = hashlib.sha1(b"a key", usedforsecurity=False).digest()
Address = tuple[str, int]


@contextlib.asynccontextmanager
async def node(*ways_in: Address, state: Path | None = None) -> AsyncIterator[TorrentSession]:
    session = TorrentSession(
        "public",
        0,
        dht_bootstrap=ways_in,
        dht_state=state,
        nearby=["127.0.0.0/8"],
        overrides=ON_LOOPBACK,
    )
    await session.start()
    try:
        yield session
    finally:
        await session.close()


@contextlib.asynccontextmanager
async def nodes(count: int) -> AsyncIterator[list[TorrentSession]]:
    """`count` nodes that know each other, all by way of the first."""
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(node())
        others = [await stack.enter_async_context(node(address(first))) for _ in range(count - 1)]
        for one in (first, *others):
            await until(lambda one=one: one.dht.nodes >= 1)  # type: ignore[misc]  # bound at once
        yield [first, *others]


def address(session: TorrentSession) -> Address:
    return "127.0.0.1", session.port


async def until(true: Callable[[], bool], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.02)


async def found(session: TorrentSession, key: bytes = KEY, deadline_s: float = 20) -> list[Address]:
    return [peer async for peer in session.dht.find(key, deadline_s=deadline_s)]


async def found_in_the_end(session: TorrentSession, wanted: set[Address]) -> None:
    """Until all of `wanted` have been found; one search may come too early for one of them."""
    missing = set(wanted)
    async with asyncio.timeout(60):
        while missing:
            async with contextlib.aclosing(session.dht.find(KEY, deadline_s=20)) as peers:
                async for peer in peers:
                    missing.discard(peer)
                    if not missing:
                        return
            await asyncio.sleep(0.1)


async def test_who_announces_a_port_is_found_under_the_key_by_all() -> None:
    async with nodes(5) as (first, a, b, c, d):
        await a.dht.announce(KEY, 4444)
        await b.dht.announce(KEY, 5555)
        wanted = {("127.0.0.1", 4444), ("127.0.0.1", 5555)}
        await asyncio.gather(*(found_in_the_end(one, wanted) for one in (first, c, d)))
        assert await found(c, bytes(20)) == []
        assert c.status()["dht"] == {"enabled": True, "nodes": c.dht.nodes, "state": "ready"}


async def test_a_search_ends_when_all_are_asked_and_searches_run_side_by_side() -> None:
    """The deadline is an hour: only what libtorrent tells of its lookups ends it before."""
    async with nodes(3) as (_, a, b):
        await a.dht.announce(KEY, 4444)
        await found_in_the_end(b, {("127.0.0.1", 4444)})
        searches = [found(b, key, 3600) for key in (KEY, KEY, bytes(20), bytes(range(20)))]
        results = await asyncio.gather(*searches)
        assert results == [[("127.0.0.1", 4444)], [("127.0.0.1", 4444)], [], []]


async def test_nobody_is_found_where_there_is_no_node() -> None:
    async with node() as alone:
        assert await found(alone, deadline_s=0.1) == []
        assert alone.status()["dht"] == {"enabled": True, "nodes": 0, "state": "joining"}


async def test_finding_and_announcing_wait_for_the_first_node() -> None:
    async with node() as first, node() as second:
        announcing = asyncio.ensure_future(first.dht.announce(KEY, 4444))
        searching = asyncio.ensure_future(found(second, deadline_s=60))
        await asyncio.sleep(0)
        assert not announcing.done() and not searching.done()
        first.dht.add_nodes([address(second), ("name.example", 5), ("0.0.0.0", 5)])
        second.dht.add_nodes([address(first)])
        await announcing
        await searching
        await found_in_the_end(second, {("127.0.0.1", 4444)})


async def test_all_who_wait_hear_that_the_session_closes() -> None:
    async with node() as alone:
        waiting = [
            asyncio.ensure_future(alone.dht.announce(KEY, 4444)),
            asyncio.ensure_future(found(alone, deadline_s=3600)),
        ]
        await asyncio.sleep(0)
        await alone.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable, Unavailable]
        with pytest.raises(Unavailable):
            await alone.dht.announce(KEY, 4444)


@pytest.mark.parametrize("key", [b"", b"x" * 19, b"x" * 21])
async def test_a_key_has_twenty_bytes(key: bytes) -> None:
    async with node() as alone:
        with pytest.raises(ValueError, match="20 bytes"):
            await alone.dht.announce(key, 1)
        with pytest.raises(ValueError, match="20 bytes"):
            await found(alone, key)


@pytest.mark.parametrize("kind", ["loopback"])
async def test_elsewhere_everything_does_nothing(kind: Any, tmp_path: Path) -> None:
    session = TorrentSession(
        kind, 0, dht_bootstrap=[("127.0.0.1", 9)], dht_state=tmp_path / "dht.state"
    )
    await session.start()
    try:
        await session.dht.announce(KEY, 4444)
        session.dht.add_nodes([("127.0.0.1", 9)])
        assert await found(session, deadline_s=3600) == []
        assert session.status()["dht"] == {"enabled": False, "nodes": 0, "state": "off"}
        session.ports.map_port(8788)
        assert session.ports.mapped_port is None
    finally:
        await session.close()
    assert list(tmp_path.iterdir()) == []


# -- torrents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["v1", "v2", "both"])
async def test_a_magnet_alone_leads_to_a_seeder(by: str, tmp_path: Path) -> None:
    data = bytes(3 << 20)
    hasher = TorrentHasher(len(data))
    hasher.update(data)
    made = hasher.finish("zeros.gguf")
    (tmp_path / "seed").write_bytes(data)
    async with nodes(3) as (_, seeding, wanting):
        await seeding.seed(made.torrent, tmp_path / "seed")
        infohash = None if by == "v2" else made.infohash
        infohash_v2 = None if by == "v1" else made.infohash_v2
        assert await wanting.metadata(infohash, infohash_v2, [], 60) == made.torrent
        download = await wanting.download(made.torrent, tmp_path, "model.gguf")
        await download.checked()
        download.join_swarm()
        await download.finished()
        await download.close()
    assert (tmp_path / "model.gguf").read_bytes() == data


async def test_what_was_added_before_there_was_a_node_is_found_all_the_same(tmp_path: Path) -> None:
    """By the seeder and by who asks: libtorrent alone would say so again after a quarter of an hour."""
    async with node() as first, node() as seeding, node() as wanting:
        seed = await seeding.seed_bytes("cid.json", b"{}", tmp_path)
        fetch = asyncio.ensure_future(wanting.fetch_small(seed.infohash, limit=100, deadline_s=60))
        await asyncio.sleep(0)
        for one in (seeding, wanting):
            one.dht.add_nodes([address(first)])
        assert await fetch == b"{}"


# -- remembering ----------------------------------------------------------------------------------


async def test_nodes_of_the_last_run_are_a_way_in_without_any_list(tmp_path: Path) -> None:
    state = tmp_path / "dht.state"
    async with nodes(3) as (first, a, _):
        async with node(address(first), state=state) as known:
            await until(lambda: known.dht.nodes >= 2)
            await a.dht.announce(KEY, 4444)
            await found_in_the_end(known, {("127.0.0.1", 4444)})
        assert 0 < state.stat().st_size < dht_state.MAX_STATE
        assert state.stat().st_mode & 0o077 == 0
        async with node(state=state) as again:
            await found_in_the_end(again, {("127.0.0.1", 4444)})


@pytest.mark.parametrize(
    "damaged",
    [
        b"", b"garbage", b"de", b"d9:dht statei3ee", b"d9:dht stated5:nodesl6:abc", b"i5e", b"le",
        b"d9:dht stated5:nodesl3:abce7:node-idi3eee", b"l" * 100_000, b"d" + b"x" * (dht_state.MAX_STATE + 1),
    ],
)  # fmt: skip
async def test_damaged_nodes_are_said_and_others_are_looked_for(
    damaged: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "dht.state"
    state.write_bytes(damaged)
    async with node() as first, node(address(first), state=state) as second:
        await until(lambda: second.dht.nodes >= 1)
    if b"abce7" not in damaged:  # this one is well-formed, with nodes that are none
        assert "dht.state is damaged" in caplog.text
    assert str(tmp_path) not in caplog.text
    assert state.read_bytes() != damaged


async def test_no_node_is_no_reason_to_forget_the_old_ones(tmp_path: Path) -> None:
    state = tmp_path / "dht.state"
    async with nodes(2) as (first, _), node(address(first), state=state) as known:
        await until(lambda: known.dht.nodes >= 1)
    remembered = state.read_bytes()
    async with node(state=state) as alone:
        assert alone.dht.nodes == 0
    assert state.read_bytes() == remembered


async def test_nodes_that_cannot_be_remembered_do_not_keep_the_session_from_closing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        nodes(2) as (first, _),
        node(address(first), state=tmp_path / "nowhere" / "dht.state") as known,
    ):
        await until(lambda: known.dht.nodes >= 1)
    assert "dht.state" in caplog.text and str(tmp_path) not in caplog.text


# -- the bootstrap list ---------------------------------------------------------------------------


async def test_a_resolver_that_never_answers_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither the start, nor the way in by another entry, nor the end."""
    asked, answer = threading.Event(), threading.Event()

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.set()
        answer.wait(60)
        raise OSError("no such host")

    monkeypatch.setattr(resolving.socket, "getaddrinfo", getaddrinfo)
    try:
        async with node() as first, node(("dead.example", 6881), address(first)) as second:
            await until(lambda: second.dht.nodes >= 1)
            assert asked.is_set() and not answer.is_set()
        assert not answer.is_set()
    finally:
        answer.set()


async def test_names_of_the_list_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        if host != "router.example":
            raise OSError("no such host")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", port))]

    monkeypatch.setattr(resolving.socket, "getaddrinfo", getaddrinfo)
    async with node() as first, node(("dead.example", 1), ("router.example", first.port)) as second:
        await until(lambda: second.dht.nodes >= 1)


# -- liars ----------------------------------------------------------------------------------------


async def test_a_thousand_wrong_answers_hide_no_honest_one() -> None:
    """One node that answers with a thousand peers gets a share; what others say is still heard."""
    search = dht.Search(0)
    search.add([(f"10.0.{index // 250}.{index % 250 + 1}", 1) for index in range(1000)])
    search.add([("127.0.0.1", 4444)])
    search.add([("127.0.0.1", port) for port in range(1, 1000)])
    search.add([("evil.example", 1), ("0.0.0.0", 1), ("10.0.0.1", 0)])
    search.end()
    peers: list[Address] = []
    while (peer := await search.next(0)) is not None:
        peers.append(peer)
    assert ("127.0.0.1", 4444) in peers
    assert len(peers) == len(set(peers)) == 25 + 4


async def test_one_host_with_many_ports_hides_nobody_in_the_same_answer() -> None:
    search = dht.Search(0)
    search.add([*(("10.0.0.9", port) for port in range(1, 1000)), ("127.0.0.1", 4444)])
    search.end()
    peers = [await search.next(0) for _ in range(5)]
    assert ("127.0.0.1", 4444) in peers
    assert await search.next(0) is None


async def test_a_search_takes_no_more_than_its_ceiling() -> None:
    search = dht.Search(0)
    for block in range(1000):
        search.add([(f"10.{block // 250}.{block % 250}.{host}", 1) for host in range(1, 11)])
    peers = [await search.next(0) for _ in range(dht.MAX_FOUND)]
    assert None not in peers
    assert await search.next(0) is None


def test_logs_of_a_session_say_nothing_of_a_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def run() -> None:
        async with nodes(2) as (a, b):
            await a.dht.announce(KEY, 4444)
            await found(b)

    asyncio.run(run())
    assert KEY.hex() not in caplog.text
