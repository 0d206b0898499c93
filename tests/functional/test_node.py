"""What the rest of the daemon asks of an IPFS node, on two real Kubo nodes on loopback."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from daemon.errors import Unavailable, Unserved, UsageError, VerificationError
from daemon.ipfs.node import KuboNode
from daemon.ipfs.rpc import Rpc
from daemon.membership import OpenSwarm
from daemon.peerapi.server import PeerApi, Route
from registry.cid import UnixfsHasher, leaf_cid
from tests.functional.kubos import Running, running, two, until

MIB = 1 << 20
ABSENT = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
TOPIC = "/swarmctl-test/1"


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def leaves_and_nodes(data: bytes) -> list[str]:
    hasher = UnixfsHasher()
    hasher.update(data)
    hasher.finish()
    return hasher.leaves + hasher.nodes


async def fetch(node: KuboNode, cid: str, offset: int, length: int, stall_s: float = 10) -> bytes:
    return b"".join([chunk async for chunk in node.read_range(cid, offset, length, stall_s=stall_s)])


@pytest.fixture
async def pair(kubo_binary: Path, tmp_path: Path) -> AsyncIterator[tuple[Running, Running]]:
    async with two(kubo_binary, tmp_path) as (a, b):
        yield a, b


@pytest.fixture
async def alone(kubo_binary: Path, tmp_path: Path) -> AsyncIterator[Running]:
    async with running(kubo_binary, tmp_path / "home") as kubo:
        yield kubo


# -- adding in place ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, MIB, MIB + 1, 20 * MIB - 3])
async def test_cid_is_that_of_kubo_and_ours(alone: Running, kubo_binary: Path, size: int) -> None:
    data = content(size)
    path = alone.write("mödel, \"1\".gguf", data)
    seen: list[int] = []
    cid = await alone.node.add_in_place(path, seen.append)
    argv = [str(kubo_binary), "add", "--only-hash", "--quieter", str(path)]
    asked = await asyncio.to_thread(
        subprocess.run, argv, env={"IPFS_PATH": str(alone.home / "ipfs")}, capture_output=True, text=True, check=True
    )
    assert cid == asked.stdout.strip() == (leaves_and_nodes(data)[-1])
    assert seen == sorted(seen) and seen[-1:] == ([size] if size else [])
    assert cid in await alone.node.pins()
    assert await alone.node.size(cid, deadline_s=5) == size
    assert await alone.node.leaves(cid, deadline_s=5) == [c for c in leaves_and_nodes(data) if c.startswith("bafkrei")]


async def test_disk_holds_one_copy_and_forgets_it(alone: Running) -> None:
    data = content(20 * MIB)
    path = alone.write("model", data)
    before = await alone.repo_size()
    cid = await alone.node.add_in_place(path)
    assert await alone.node.add_in_place(path) == cid
    assert await alone.repo_size() - before < MIB
    assert await fetch(alone.node, cid, 0, len(data)) == data
    await alone.node.remove_in_place(cid)
    await alone.node.remove_in_place(cid)
    assert cid not in await alone.node.pins()
    with pytest.raises(Unserved):
        await alone.node.size(cid, deadline_s=0.5)
    assert path.read_bytes() == data


async def test_one_model_of_two_that_share_leaves_is_removed(alone: Running) -> None:
    shared, tail = content(3 * MIB), content(MIB, seed=2)
    first = await alone.node.add_in_place(alone.write("first", shared))
    second = await alone.node.add_in_place(alone.write("second", shared + tail))
    await alone.node.remove_in_place(first)
    assert await alone.node.broken_references(second) == []
    assert await fetch(alone.node, second, 0, 4 * MIB) == shared + tail


async def test_home_behind_a_link_and_a_file_behind_a_link(kubo_binary: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "real")
    (tmp_path / "elsewhere").write_bytes(content(2 * MIB))
    async with running(kubo_binary, tmp_path / "home") as kubo:
        (kubo.home / "linked").symlink_to(tmp_path / "elsewhere")
        cid = await kubo.node.add_in_place(kubo.home / "linked")
        assert await kubo.node.broken_references(cid) == []
        with pytest.raises(Unavailable, match="outside the data folder"):
            await kubo.node.add_in_place(tmp_path / "elsewhere")


async def test_changed_bytes_are_found(alone: Running) -> None:
    data = bytearray(content(5 * MIB))
    path = alone.write("model", data)
    cid = await alone.node.add_in_place(path)
    assert await alone.node.broken_references(cid) == []
    data[3 * MIB + 7] ^= 1
    path.write_bytes(data)
    assert await alone.node.broken_references(cid) == [(await alone.node.leaves(cid, deadline_s=5))[3]]
    path.unlink()
    assert len(await alone.node.broken_references(cid)) == 5


async def test_foreign_rpc_is_used_where_it_can_read_the_file(alone: Running, tmp_path: Path) -> None:
    async with Rpc(alone.process.api) as rpc:
        node = KuboNode(rpc, repo=None)
        path = alone.write("model", content(2 * MIB))
        assert await node.broken_references(await node.add_in_place(path)) == []
        (tmp_path / "outside").write_bytes(content(2 * MIB, seed=3))
        with pytest.raises(Unavailable, match="configured IPFS node cannot"):
            await node.add_in_place(tmp_path / "outside")
        assert await node.add_bytes(b"small") == (await alone.node.add_bytes(b"small"))


# -- reading from another node --------------------------------------------------------------------------------------------


async def test_parallel_ranges_then_one_copy(pair: tuple[Running, Running]) -> None:
    a, b = pair
    data = content(40 * MIB + 5)
    cid = await a.node.add_in_place(a.write("model", data))
    before = await b.repo_size()
    assert await b.node.size(cid, deadline_s=5) == len(data)
    starts = range(0, len(data), 10 * MIB)
    parts = await asyncio.gather(*(fetch(b.node, cid, start, min(10 * MIB, len(data) - start)) for start in starts))
    path = b.write("model", b"".join(parts))
    assert path.read_bytes() == data
    assert await b.repo_size() - before > 40 * MIB
    await b.node.drop_blocks([*leaves_and_nodes(data), ABSENT])
    assert await b.node.add_in_place(path) == cid
    assert await b.repo_size() - before < MIB
    assert await b.node.broken_references(cid) == []


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (MIB - 1, 2), (3 * MIB, 7 * MIB), (9 * MIB + 5, MIB), (5, 0)])
async def test_ranges_are_exact(alone: Running, offset: int, length: int) -> None:
    data = content(10 * MIB + 17)
    cid = await alone.node.add_in_place(alone.write("model", data))
    assert await fetch(alone.node, cid, offset, length) == data[offset : offset + length]


async def test_range_past_the_end_is_short_and_says_so(alone: Running) -> None:
    data = content(2 * MIB)
    cid = await alone.node.add_in_place(alone.write("model", data))
    with pytest.raises(Unserved, match="ends 10 bytes before"):
        await fetch(alone.node, cid, MIB, MIB + 10)


async def test_range_that_is_abandoned_leaves_nothing_behind(pair: tuple[Running, Running]) -> None:
    a, b = pair
    data = content(30 * MIB)
    cid = await a.node.add_in_place(a.write("model", data))
    async with aclosing(b.node.read_range(cid, 0, len(data), stall_s=10)) as chunks:  # type: ignore[type-var]
        async for _ in chunks:
            break
    assert [task for task in asyncio.all_tasks() if "_leaf" in repr(task)] == []
    assert await fetch(b.node, cid, 0, len(data)) == data


async def test_stall_when_the_other_node_goes(pair: tuple[Running, Running]) -> None:
    a, b = pair
    data = content(60 * MIB)
    cid = await a.node.add_in_place(a.write("model", data))
    came = 0
    with pytest.raises(Unserved, match="no byte came for 1 s"):
        async for chunk in b.node.read_range(cid, 0, len(data), stall_s=1):
            came += len(chunk)
            if came == 5 * MIB:
                assert a.process.pid is not None
                os.kill(a.process.pid, signal.SIGKILL)
    assert 0 < came < len(data)


async def test_bytes_that_changed_on_the_other_side_never_come(pair: tuple[Running, Running]) -> None:
    a, b = pair
    data = content(6 * MIB)
    path = a.write("model", data)
    cid = await a.node.add_in_place(path)
    path.write_bytes(data[: 4 * MIB] + bytes(2 * MIB))
    assert await fetch(b.node, cid, 0, 4 * MIB) == data[: 4 * MIB]
    with pytest.raises(Unserved):
        await fetch(b.node, cid, 0, len(data), stall_s=1)


async def test_what_nobody_has_is_unserved_at_the_deadline(alone: Running) -> None:
    for read in (
        alone.node.size(ABSENT, deadline_s=0.3),
        alone.node.leaves(ABSENT, deadline_s=0.3),
        alone.node.read_bytes(ABSENT, limit=10, deadline_s=0.3),
        fetch(alone.node, ABSENT, 0, 10, stall_s=0.3),
    ):
        with pytest.raises(Unserved):
            await read


async def test_what_is_no_file_is_a_usage_error(alone: Running) -> None:
    folder = (await alone.rpc.call("files/stat", "/"))["Hash"]
    for cid in (folder, "nonsense"):
        with pytest.raises(UsageError):
            await alone.node.size(cid, deadline_s=2)
    with pytest.raises(UsageError):
        await alone.node.leaves(folder, deadline_s=2)


async def test_a_file_of_kubos_old_layout_is_read_too(alone: Running, kubo_binary: Path) -> None:
    data = content(3 * MIB + 11)
    path = alone.write("old", data)
    argv = [str(kubo_binary), "add", "--quieter", "--cid-version=0", "--raw-leaves=false", "--chunker=size-262144", str(path)]
    added = await asyncio.to_thread(
        subprocess.run, argv, env={"IPFS_PATH": str(alone.home / "ipfs")}, capture_output=True, text=True, check=True
    )
    cid = added.stdout.strip()
    assert cid.startswith("Qm")
    assert await alone.node.size(cid, deadline_s=5) == len(data)
    assert len(await alone.node.leaves(cid, deadline_s=5)) == 13
    assert await fetch(alone.node, cid, 100_000, 2 * MIB) == data[100_000 : 100_000 + 2 * MIB]


async def test_small_objects(pair: tuple[Running, Running]) -> None:
    a, b = pair
    cid = await a.node.add_bytes(b"a manifest")
    assert cid in await a.node.pins()
    assert await b.node.read_bytes(cid, limit=10, deadline_s=5) == b"a manifest"
    with pytest.raises(VerificationError, match="larger than 9"):
        await b.node.read_bytes(cid, limit=9, deadline_s=5)
    await a.node.drop_blocks([cid])  # pinned: it stays
    assert await a.node.read_bytes(cid, limit=10, deadline_s=5) == b"a manifest"


# -- pubsub, peers and streams --------------------------------------------------------------------------------------------


async def test_messages_arrive_whole_and_signed(pair: tuple[Running, Running]) -> None:
    a, b = pair
    got: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    async def listen() -> None:
        async for message in a.node.subscribe(TOPIC):
            got.put_nowait((message.sender, message.data))

    subscriber = asyncio.create_task(listen())

    async def heard() -> bool:
        return (await a.node.identity()).peer_id in await b.node.topic_peers(TOPIC)

    await until(heard)
    sender = (await b.node.identity()).peer_id
    for data in (content(size, seed=size) for size in (0, 1, 100, 8192, 1_000_000)):
        await b.node.publish(TOPIC, data)
        assert await asyncio.wait_for(got.get(), 10) == (sender, data)
    await asyncio.gather(*(b.node.publish(TOPIC, b"at once") for _ in range(20)))  # Kubo alone refuses most of these
    assert a.process.pid is not None
    os.kill(a.process.pid, signal.SIGKILL)
    with pytest.raises(Unavailable):
        await subscriber


async def test_connecting(pair: tuple[Running, Running]) -> None:
    a, b = pair
    peer = (await a.node.identity()).peer_id
    assert peer in await b.node.peers()
    held = await b.rpc.call("swarm/peering/ls")
    assert [entry["ID"] for entry in held["Peers"]] == [peer]
    stranger = "12D3KooWSC85v28BrKjFNXBDCeKMngEQ3NddteDfMfBinjcesPs6"
    for address in (f"/ip4/127.0.0.1/tcp/1/p2p/{stranger}", f"/ip4/10.255.255.1/tcp/4001/p2p/{stranger}", "nonsense"):
        with pytest.raises(Unserved, match=r"failed to dial|gater|protocol|multiaddr"):
            await b.node.connect(address, deadline_s=5)


async def test_connections_say_who_dialled(pair: tuple[Running, Running]) -> None:
    a, b = pair
    (seen,) = await b.node.connections()
    (back,) = await a.node.connections()
    assert seen.peer_id == (await a.node.identity()).peer_id and seen.address.startswith("/ip4/127.0.0.1/tcp/")
    assert (seen.inbound, seen.relayed, back.inbound) == (False, False, True)
    assert await b.node.reachability() == "unknown"
    assert await b.node.known_peers() == ()


async def test_without_a_dht_a_block_is_kept_and_nobody_told(pair: tuple[Running, Running]) -> None:
    a, b = pair
    with pytest.raises(Unserved):
        await a.node.provide(b"a meeting place", deadline_s=5)
    cid = leaf_cid(b"a meeting place")
    assert cid in await a.node.pins()
    assert [found async for found in b.node.providers(cid, limit=5, deadline_s=5)] == []
    await a.node.unprovide(cid)
    await a.node.unprovide(cid)
    assert cid not in await a.node.pins()


async def test_a_stream_begins_with_who_opened_it_where_that_is_wanted(pair: tuple[Running, Running]) -> None:
    a, b = pair
    came: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.put_nowait(await reader.readline())
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        peer = (await a.node.identity()).peer_id
        for wanted in (True, False):
            await a.node.listen("/x/test/1", port, report_peer_id=wanted)
            async with b.node.dial("/x/test/1", peer) as (host, tunnel):
                _, writer = await asyncio.open_connection(host, tunnel)
                writer.write(b"hello\n")
                line = await asyncio.wait_for(came.get(), 10)
                assert line == (f"{(await b.node.identity()).peer_id}\n".encode() if wanted else b"hello\n")
                writer.close()


async def test_http_through_a_stream(pair: tuple[Running, Running]) -> None:
    a, b = pair

    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async with PeerApi([Route("POST", "/echo", echo)], membership=OpenSwarm()).listening(["127.0.0.1"], 0) as ports:
        await a.node.listen("/x/test/1", 1, report_peer_id=True)
        await a.node.listen("/x/test/1", ports.streams, report_peer_id=True)
        peer = (await a.node.identity()).peer_id
        async with aiohttp.ClientSession() as session, b.node.dial("/x/test/1", peer) as one, b.node.dial("/x/test/1", peer) as other:
            assert one[0] == "127.0.0.1" and one[1] != other[1]
            for host, tunnel in (one, other):
                async with session.post(f"http://{host}:{tunnel}/echo", data=content(MIB)) as answer:
                    assert await answer.read() == content(MIB)
        assert (await b.rpc.call("p2p/ls"))["Listeners"] is None
        assert len((await a.rpc.call("p2p/ls"))["Listeners"]) == 1
        with pytest.raises(Unserved):
            async with b.node.dial("/x/test/1", "12D3KooWSC85v28BrKjFNXBDCeKMngEQ3NddteDfMfBinjcesPs6"):
                pass
        assert (await b.rpc.call("p2p/ls"))["Listeners"] is None
