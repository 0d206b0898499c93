"""Parts of the BitTorrent session that know no libtorrent: whom the DHT is told of, and which port is forwarded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from daemon.torrent.announcing import ASK_AGAIN_S, AT_ONCE, Announcing
from daemon.torrent.entry import Seed, Swarm, Torrent
from daemon.torrent.port_mapping import PortMapping
from daemon.torrent.search import Search


class NoOwner:
    async def remove(self, torrent: Torrent) -> None: ...
    def announce_soon(self, torrent: Torrent) -> None: ...


def seed() -> Torrent:
    torrent = Torrent(NoOwner(), None, None)
    torrent.seed = Seed("v1", "v2", Path("file"))
    return torrent


def wanted(peers: int = 0) -> Torrent:
    torrent = Torrent(NoOwner(), None, None)
    torrent.swarm = Swarm(peers=peers)
    return torrent


def test_nobody_is_announced_before_the_dht_has_nodes_and_everybody_once_it_has() -> None:
    announcing = Announcing()
    torrents = [seed() for _ in range(2 * AT_ONCE + 1)]
    announcing.soon(torrents[0])
    assert announcing.due(torrents, False, 0) == []
    told = [torrent for now in range(10) for torrent in announcing.due(torrents, True, now)]
    assert told == torrents


def test_a_dht_that_was_lost_and_found_is_told_again() -> None:
    announcing = Announcing()
    one = seed()
    assert announcing.due([one], True, 0) == [one]
    assert announcing.due([one], True, 1) == []
    assert announcing.due([one], False, 2) == []
    assert announcing.due([one], True, 3) == [one]


def test_what_is_wanted_goes_first_and_asks_again_until_it_has_a_peer() -> None:
    announcing = Announcing()
    seeds, one = [seed() for _ in range(AT_ONCE)], wanted()
    assert announcing.due([*seeds, one], True, 100)[0] is one
    announcing.due(seeds, True, 100)
    assert announcing.due([one], True, 100 + ASK_AGAIN_S / 2) == []
    assert announcing.due([one], True, 100 + ASK_AGAIN_S) == [one]
    one.swarm = Swarm(peers=1)
    assert announcing.due([one], True, 100 + 9 * ASK_AGAIN_S) == []


def test_what_was_removed_is_not_announced() -> None:
    announcing = Announcing()
    one = seed()
    announcing.due([], True, 0)
    announcing.soon(one)
    announcing.forget(one)
    assert announcing.due([], True, 1) == []


class Router:
    """libtorrent's part of it: numbers the requests, and notes which were given back."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.given_back: list[int] = []

    def add_port_mapping(self, protocol: Any, external: int, local: int) -> list[int]:
        self.asked.append((external, local))
        return [len(self.asked) + 1]  # libtorrent's own port has the first two numbers

    def delete_port_mapping(self, request: int) -> None:
        self.given_back.append(request)


def test_a_port_is_forwarded_and_given_back_for_another() -> None:
    router, ports = Router(), PortMapping(enabled=True)
    ports.map_port(8788)
    assert ports.mapped_port is None and router.asked == []
    ports.attach(router)
    ports.on_mapped(0, "upnp", 6881)  # libtorrent's own
    assert ports.mapped_port is None
    ports.on_mapped(2, "upnp", 9788)
    assert ports.mapped_port == 9788
    ports.map_port(8788)
    assert router.asked == [(8788, 8788)]
    ports.map_port(8799)
    assert ports.mapped_port is None and router.given_back == [2]
    ports.on_mapped(3, "upnp", 8799)
    ports.on_failed(0, "upnp", "no")
    assert ports.mapped_port == 8799
    ports.on_failed(3, "upnp", "no")
    assert ports.mapped_port is None


def test_another_address_asks_its_router_anew() -> None:
    router, ports = Router(), PortMapping(enabled=True)
    ports.attach(router)
    ports.renew()
    assert router.asked == []
    ports.map_port(8788)
    ports.renew()
    assert router.asked == [(8788, 8788)] * 2 and router.given_back == [2]
    ports.close()
    ports.renew()
    assert len(router.asked) == 2


def test_no_router_is_asked_where_the_network_has_none() -> None:
    router, ports = Router(), PortMapping(enabled=False)
    ports.attach(router)
    ports.map_port(8788)
    assert router.asked == [] and ports.mapped_port is None


async def test_one_host_with_many_ports_pushes_nobody_out_of_a_reply() -> None:
    search = Search(0)
    search.add([*(("60.9.0.9", port) for port in range(1, 221)), ("60.1.0.1", 8788)])
    search.end()
    loop = asyncio.get_running_loop()
    found = [peer async for peer in _peers(search, loop.time() + 1)]
    assert ("60.1.0.1", 8788) in found
    assert len(found) == 5


async def _peers(search: Search, ends: float) -> AsyncIterator[tuple[str, int]]:
    while (peer := await search.next(ends)) is not None:
        yield peer
