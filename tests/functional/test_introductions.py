"""Two nodes that want to meet over BitTorrent, of which one cannot be dialled: both halves over a real peer API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest

from daemon.membership import OpenSwarm
from daemon.peerapi.ping import Ping
from daemon.peerapi.server import PeerApi
from daemon.peerapi.ways import Ways
from daemon.transfer.introductions import PATH, Introductions
from registry.records import Address, Peer

INFOHASH = "ab" * 32
HOLDER, ASKER = "ed25519:" + "01" * 32, "ed25519:" + "02" * 32


@dataclass
class Torrents:
    met: list[tuple[str, list[tuple[str, int]]]] = field(default_factory=list)

    def meet(self, infohash: str, peers: Sequence[tuple[str, int]]) -> None:
        self.met.append((infohash, list(peers)))

    def known(self, infohash: str) -> object | None:
        return self if infohash == INFOHASH else None


@dataclass
class Side:
    peer: Peer
    torrents: Torrents
    introductions: Introductions
    outside: list[tuple[str, int]]
    http: aiohttp.ClientSession


async def no_ipfs() -> None:
    return None


@asynccontextmanager
async def side(node: str, outside: list[tuple[str, int]]) -> AsyncIterator[Side]:
    membership, torrents = OpenSwarm(), Torrents()
    async with aiohttp.ClientSession() as http:
        ways = Ways(network="loopback", ipfs=no_ipfs, http=http, membership=membership)
        introductions = Introductions(
            membership, ways, http, torrents, network="loopback", outside=lambda: outside
        )
        api = PeerApi(
            [*Ping(node, membership).routes(), *introductions.routes()], membership=membership
        )
        async with api.listening(["127.0.0.1"], 0) as ports:
            address = Address(node, http=(f"http://127.0.0.1:{ports.direct}",))
            yield Side(Peer(node, None, address, 0, 0), torrents, introductions, outside, http)


async def test_both_learn_where_the_other_is_seen() -> None:
    async with side(HOLDER, [("127.0.0.7", 7)]) as holder, side(ASKER, []) as asker:
        told: asyncio.Queue[Sequence[tuple[str, int]]] = asyncio.Queue()
        keeping = asyncio.create_task(
            asker.introductions.keep(INFOHASH, lambda: [holder.peer], told.put_nowait)
        )
        # Nobody is asked before it is known how we are seen.
        await asyncio.sleep(0.3)
        assert told.empty() and not holder.torrents.met
        asker.outside.append(("127.0.0.1", 8))
        async with asyncio.timeout(10):
            assert await told.get() == [("127.0.0.7", 7)]
        assert holder.torrents.met == [(INFOHASH, [("127.0.0.1", 8)])]
        keeping.cancel()


async def test_who_does_not_have_the_torrent_tells_nothing_and_dials_nobody() -> None:
    async with side(HOLDER, [("127.0.0.7", 7)]) as holder:
        url = holder.peer.address.http[0] + PATH
        body = b'{"infohash":"%s","addresses":["127.0.0.1:8"]}' % (b"cd" * 32)
        headers = {"Content-Type": "application/json"}
        async with holder.http.post(url, data=body, headers=headers) as response:
            assert response.status == 404 and "127.0.0.7" not in await response.text()
        assert not holder.torrents.met


async def test_whose_address_is_seen_names_no_other() -> None:
    async with side(HOLDER, []) as holder:
        url = holder.peer.address.http[0] + PATH
        body = b'{"infohash":"%s","addresses":["127.0.0.9:9","127.0.0.1:8"]}' % INFOHASH.encode()
        headers = {"Content-Type": "application/json"}
        async with holder.http.post(url, data=body, headers=headers) as response:
            assert response.status == 200
        assert holder.torrents.met == [(INFOHASH, [("127.0.0.1", 8)])]


async def test_a_holder_that_announces_an_address_is_not_asked() -> None:
    async with side(HOLDER, []) as holder, side(ASKER, [("127.0.0.1", 8)]) as asker:
        open_address = Address(HOLDER, (), ("127.0.0.1:1",), holder.peer.address.http)
        known = Peer(HOLDER, None, open_address, 0, 0)
        keeping = asyncio.create_task(
            asker.introductions.keep(INFOHASH, lambda: [known], lambda peers: None)
        )
        await asyncio.sleep(0.3)
        assert not holder.torrents.met
        keeping.cancel()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"infohash":"ab","addresses":[]}', 400),
        (b'{"infohash":"%s","addresses":["127.0.0.1:1","127.0.0.1:2","127.0.0.1:3"]}' % INFOHASH.encode(), 400),
        (b'{"infohash":"%s","addresses":["127.1:80"]}' % INFOHASH.encode(), 400),
        (b" " * 2000, 413),
    ],
)
async def test_what_is_no_introduction(body: bytes, status: int) -> None:
    async with side(HOLDER, []) as holder:
        url = holder.peer.address.http[0] + PATH
        headers = {"Content-Type": "application/json"}
        async with holder.http.post(url, data=body, headers=headers) as response:
            assert response.status == status
        assert not holder.torrents.met


async def test_addresses_outside_of_our_network_are_left_out_and_floods_refused() -> None:
    async with side(HOLDER, []) as holder:
        url = holder.peer.address.http[0] + PATH
        headers = {"Content-Type": "application/json"}
        body = b'{"infohash":"%s","addresses":["169.254.169.254:80","8.8.8.8:53"]}' % INFOHASH.encode()
        statuses = []
        for _ in range(20):
            async with holder.http.post(url, data=body, headers=headers) as response:
                statuses.append(response.status)
        assert statuses[0] == 200 and 429 in statuses
        assert holder.torrents.met[0] == (INFOHASH, [])
