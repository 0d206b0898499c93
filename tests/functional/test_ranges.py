"""Bytes of models over the peer API: what is given and what is not, through relays, and from liars. Real nodes and sockets."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.errors import Declined, Unserved
from daemon.membership import Membership, membership
from daemon.transfer.fetch import Fetch, Patience, Sources, Wanted
from daemon.transfer.holders import Holders
from daemon.transfer.objects import Objects, object_cid
from daemon.transfer.ranges import RANGE_LIMIT, RangeLimits
from daemon.transfer.sources import LeafSink, RateLimit
from daemon.transfer.transfers import Transfer
from registry.cid import UnixfsHasher, leaf_cid
from registry.envelope import key_name
from registry.records import Address, Peer
from tests.functional.swarm_nodes import Node, swarm_node, until
from tests.unit.gguf_files import tiny_gguf

MIB = 1 << 20
SIZE = 5 * MIB + 123


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "model.gguf", SIZE)


def names(path: Path) -> tuple[str, list[str]]:
    """The CID of a file and those of its leaves."""
    hasher = UnixfsHasher()
    hasher.update(path.read_bytes())
    return hasher.finish(), hasher.leaves


class Pull:
    """One download of `model` by `asker`, by its leaves and without IPFS."""

    def __init__(self, asker: Node, model: Path, path: Path, holders: list[Peer]) -> None:
        cid, leaves = names(model)
        self.transfer = Transfer(id="1", kind="pull", ref=cid)
        self._sink = LeafSink(path, SIZE, leaves)
        sources = Sources(
            "lan",
            lambda: None,
            False,
            Holders(asker.ways, asker.http, asker.membership),
            RateLimit(0),
            Patience(0.2, 60),
        )
        wanted = Wanted("it", SIZE, cid, lambda: holders, list)
        self._fetch = Fetch(sources, wanted, self.transfer, self._sink, None)

    async def run(self) -> None:
        await self._sink.check()
        async with asyncio.timeout(60):
            await self._fetch.run()


async def behind_a_relay(
    stack: AsyncExitStack, folder: Path, *, carries_bytes: bool
) -> tuple[Node, Node, Node]:
    """A relay, a holder that it carries for and that nobody can dial, and an asker that knows both."""
    relay = await stack.enter_async_context(
        swarm_node(folder / "relay", relays=True, relays_bytes=carries_bytes)
    )
    holder = await stack.enter_async_context(
        swarm_node(folder / "holder", direct=False, hold=[relay.peer()])
    )
    await until(lambda: holder.holder.held == (relay.key,))
    asker = await stack.enter_async_context(swarm_node(folder / "asker"))
    await asker.gossip.join(relay.gossip.pages.address())
    return relay, holder, asker


async def test_the_whole_comes_through_a_relay_that_carries_bytes(tmp_path: Path, model: Path) -> None:
    async with AsyncExitStack() as stack:
        relay, holder, asker = await behind_a_relay(stack, tmp_path, carries_bytes=True)
        holder.files[names(model)[0]] = model
        pull = Pull(asker, model, tmp_path / "pulled", [holder.peer()])
        await pull.run()
        assert (tmp_path / "pulled").read_bytes() == model.read_bytes()
        assert pull.transfer.sources == {"ipfs": 0, "bittorrent": 0, "https": SIZE, "disk": 0}
        assert relay.relay.carried > SIZE


async def test_where_relays_decline_nothing_is_waited_for(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.transfer.fetch._HOPELESS_S", 0.5)
    async with AsyncExitStack() as stack:
        _, holder, asker = await behind_a_relay(stack, tmp_path, carries_bytes=False)
        holder.files[names(model)[0]] = model
        pull = Pull(asker, model, tmp_path / "pulled", [holder.peer()])
        with pytest.raises(Unserved, match="no relay carries model bytes; a public node") as caught:
            await pull.run()
        assert caught.value.exit_code == 5


async def test_a_holder_that_is_only_away_may_come_back(tmp_path: Path, model: Path) -> None:
    """One that is cut off is no proof that nothing helps: the pull waits for it."""
    async with AsyncExitStack() as stack:
        _, holder, asker = await behind_a_relay(stack, tmp_path, carries_bytes=False)
        gone = Peer("ed25519:" + "ab" * 32, None, Address("x", http=("http://127.0.0.1:9",)), 0, 0)
        holders = Holders(asker.ways, asker.http, asker.membership)
        with pytest.raises(Declined):
            async with holders.reader([holder.peer()]):
                raise AssertionError
        with pytest.raises(Unserved) as caught:
            async with holders.reader([holder.peer(), gone]):
                raise AssertionError
        assert not isinstance(caught.value, Declined)


async def test_a_liar_is_asked_no_more_and_another_holder_brings_it(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        liar, honest, empty, asker = [
            await stack.enter_async_context(swarm_node(tmp_path / name)) for name in "lhea"
        ]
        lies = tmp_path / "lies.gguf"
        lies.write_bytes(model.read_bytes()[:MIB] + bytes(SIZE - MIB))
        cid = names(model)[0]
        liar.files[cid], honest.files[cid] = lies, model
        holders = [liar.peer(), empty.peer()]
        pull = Pull(asker, model, tmp_path / "pulled", holders)
        running = asyncio.create_task(pull.run())
        await until(lambda: "is asked no more" in caplog.text)
        holders.append(honest.peer())
        await running
        assert (tmp_path / "pulled").read_bytes() == model.read_bytes()
        assert pull.transfer.sources["https"] == SIZE  # nothing counts twice


RIGHT = "bytes=0-9"


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (RIGHT, 206),
        (f"bytes={SIZE - 1}-{SIZE - 1}", 206),
        (f"bytes=0-{RANGE_LIMIT - 1}", 206),
        (None, 400),
        ("bytes=0-", 400),
        ("bytes=-5", 400),
        ("bytes=5-4", 400),
        ("bytes=0-1,3-4", 400),
        ("lines=0-9", 400),
        ("bytes=0-" + "9" * 40, 400),
        (f"bytes=0-{RANGE_LIMIT}", 400),
        (f"bytes={SIZE - 1}-{SIZE}", 416),
    ],
)
async def test_one_exact_range_is_given_or_none(
    tmp_path: Path, model: Path, given: str | None, status: int
) -> None:
    async with swarm_node(tmp_path / "node") as node, aiohttp.ClientSession() as http:
        cid = names(model)[0]
        node.files[cid] = model
        headers = {} if given is None else {"Range": given}
        async with http.get(f"{node.url}/swarm/1/bytes/{cid}", headers=headers) as response:
            body = await response.read()
        assert response.status == status
        if given is not None and status == 206:
            first, last = (int(number) for number in given.removeprefix("bytes=").split("-"))
            assert body == model.read_bytes()[first : last + 1]
            assert response.headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
        else:
            assert len(body) < 500 and str(tmp_path) not in body.decode()


async def test_what_is_not_shared_is_not_there(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "node") as node, aiohttp.ClientSession() as http:
        for cid, status in ((leaf_cid(b"other"), 404), ("no-cid", 400)):
            async with http.get(f"{node.url}/swarm/1/bytes/{cid}", headers={"Range": RIGHT}) as response:
                assert response.status == status


async def test_a_source_that_takes_nothing_gets_no_more_and_is_cut_off(tmp_path: Path, model: Path) -> None:
    limits = RangeLimits(requests_per_source=1, idle_s=0.5)
    async with swarm_node(tmp_path / "node", range_limits=limits) as node:
        cid = names(model)[0]
        node.files[cid] = model
        host, port = node.url.removeprefix("http://").split(":")
        taking_little = socket.socket()
        taking_little.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        taking_little.setblocking(False)
        await asyncio.get_running_loop().sock_connect(taking_little, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=taking_little, limit=1)
        request = f"GET /swarm/1/bytes/{cid} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-{RANGE_LIMIT - 1}\r\n\r\n"
        writer.write(8 * request.encode())  # more than the system's own buffers take
        assert await reader.read(1) == b"H"
        async with aiohttp.ClientSession() as http:

            async def status() -> int:
                url = f"{node.url}/swarm/1/bytes/{cid}"
                async with http.get(url, headers={"Range": RIGHT}) as response:
                    return response.status

            async with asyncio.timeout(20):
                while await status() != 429:
                    await asyncio.sleep(0.01)
                while await status() != 206:
                    await asyncio.sleep(0.01)
        writer.close()


async def test_in_a_closed_swarm_it_is_sealed_and_for_members(tmp_path: Path, model: Path) -> None:
    secret = "a secret of the lab, long enough"

    def member(key: Ed25519PrivateKey) -> Membership:
        return membership("the lab", secret, node=key_name(key), clock=time.time)

    keys = [Ed25519PrivateKey.generate() for _ in range(2)]
    async with (
        swarm_node(tmp_path / "a", key=keys[0], membership=member(keys[0])) as a,
        swarm_node(tmp_path / "b", key=keys[1], membership=member(keys[1])) as b,
        aiohttp.ClientSession() as stranger,
    ):
        cid = names(model)[0]
        a.files[cid] = model
        pull = Pull(b, model, tmp_path / "pulled", [a.peer()])
        await pull.run()
        assert (tmp_path / "pulled").read_bytes() == model.read_bytes()
        async with stranger.get(f"{a.url}/swarm/1/bytes/{cid}", headers={"Range": RIGHT}) as response:
            assert response.status == 404


async def test_a_slow_holder_of_an_object_makes_room_for_a_live_one(tmp_path: Path) -> None:
    """Eight that never answer stand before one that does."""
    async def silent(reader: asyncio.StreamReader, writer: Any) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    dead = [
        Peer(f"ed25519:{number:064x}", None, Address("", http=(f"http://127.0.0.1:{port}",)), 0, 99)
        for number in range(8)
    ]
    async with server, swarm_node(tmp_path / "a") as a, swarm_node(tmp_path / "b") as b:
        data = b"a signed manifest"
        a.objects[object_cid(data)] = data
        objects = Objects(lambda: None, b.ways, b.http, b.membership)
        live = replace(a.peer(), expires=1)
        assert await objects.get(object_cid(data), [*dead, live], limit=100) == data
