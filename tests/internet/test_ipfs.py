"""Our own Kubo in the public network: relays and punched holes, the DHT, and new starts that cut nothing."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from daemon.bootstrap import PUBLIC_BOOTSTRAP
from daemon.config import Config, Ipfs
from daemon.errors import SwarmError, Unavailable, Unserved
from daemon.ipfs import gate
from daemon.ipfs import keeper as keeping
from daemon.ipfs.interface import IpfsNode, Provider
from daemon.ipfs.keeper import IpfsKeeper
from daemon.ipfs.kubo import KuboProcess
from daemon.ipfs.node import KuboNode
from daemon.ipfs.reach import Reach
from daemon.ipfs.rpc import Rpc
from registry.cid import leaf_cid
from registry.multiaddrs import usable_multiaddrs
from tests.functional.kubos import Running, until
from tests.internet.world import Host, World, internet

MIB = 1 << 20
DEAD = "/ip4/11.250.0.9/tcp/4001/p2p/12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"


# What is known to the keeper of one host: where its own listeners have to be.
_HERE: ContextVar[Host] = ContextVar("host")
_LISTEN = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"."], [listener.fileno()])
"""


def listener_on(host: Host) -> socket.socket:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = [*host.namespace.within, sys.executable, "-I", "-S", "-c", _LISTEN, str(theirs.fileno())]
        subprocess.run(words, pass_fds=[theirs.fileno()], check=True, timeout=20)
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    return socket.socket(fileno=descriptors[0])


@pytest.fixture(autouse=True)
def gates_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon and its Kubo share one loopback; here only Kubo runs on the host, so the gates are brought there."""

    async def listen(take: gate.Take) -> asyncio.Server:
        return await asyncio.start_server(take, sock=await asyncio.to_thread(listener_on, _HERE.get()))

    monkeypatch.setattr(gate, "_listen", listen)


def within(host: Host, binary: Path) -> Path:
    """A Kubo that runs on `host`; its RPC is on a unix socket, which does not mind namespaces."""
    script = host.home.with_name(f"kubo-{host.name}")
    enter = " ".join(host.namespace.within)
    script.write_text(f'#!/bin/sh\nexec {enter} {binary} "$@"\n')
    script.chmod(0o700)
    return script


@asynccontextmanager
async def kubo(host: Host, binary: Path, reach: Reach) -> AsyncIterator[Running]:
    process = KuboProcess(
        within(host, binary),
        host.home / "ipfs",
        network="public",
        port=4001,
        max_connections=32,
        log=host.home / "kubo.log",
        reach=reach,
    )
    await process.start()
    try:
        async with Rpc(process.api) as rpc:
            yield Running(host.home, process, rpc, KuboNode(rpc, repo=host.home / "ipfs"))
    finally:
        await process.stop()


@asynccontextmanager
async def relay(host: Host, binary: Path) -> AsyncIterator[tuple[Running, str]]:
    """A public node, and its address."""
    async with kubo(host, binary, Reach("public", relay_service=True)) as running:
        peer = (await running.node.identity()).peer_id
        yield running, f"/ip4/{host.address}/tcp/4001/p2p/{peer}"


@dataclass
class Kept:
    keeper: IpfsKeeper
    home: Path
    lives: list[str] = field(default_factory=list)
    busy: bool = False

    @property
    def node(self) -> IpfsNode:
        assert self.keeper.node is not None
        return self.keeper.node

    async def meets(self, peer: str) -> bool:
        if self.keeper.node is None:
            return False
        try:
            return peer in await self.keeper.node.peers()
        except Unavailable:
            return False  # it is being started again

    async def circuits(self) -> tuple[str, ...]:
        """Where strangers reach it, once it has a reservation."""
        if self.keeper.node is None:
            return ()
        try:
            identity = await self.keeper.node.identity()
        except Unavailable:
            return ()  # it is being started again
        usable = usable_multiaddrs(identity.addresses, "public")
        return tuple(address for address in usable if "/p2p-circuit/" in address)


@asynccontextmanager
async def kept(host: Host, binary: Path, reach: Reach, bootstrap: tuple[str, ...] = ()) -> AsyncIterator[Kept]:
    async def ready(node: IpfsNode) -> None:
        found.lives.append((await node.identity()).peer_id)

    async def gone() -> None:
        found.lives.append("gone")

    ipfs = Ipfs(binary=str(within(host, binary)), bootstrap=bootstrap)
    config = Config(home=host.home, network="public", ipfs=ipfs)
    found = Kept(IpfsKeeper(config, ready, gone, reach=reach, busy=lambda: found.busy), host.home)
    _HERE.set(host)
    task = asyncio.create_task(found.keeper.run())
    try:
        async with asyncio.timeout(10):
            await found.keeper.settled.wait()
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def read(node: IpfsNode, cid: str, length: int) -> bytes:
    return b"".join([chunk async for chunk in node.read_range(cid, 0, length, stall_s=10)])


async def providers(node: IpfsNode, cid: str, limit: int = 5) -> list[Provider]:
    return [found async for found in node.providers(cid, limit=limit, deadline_s=5)]


@pytest.mark.parametrize("told", [True, False], ids=["both have relays", "only the one that is dialled"])
async def test_a_home_reaches_another_through_a_punched_hole(world: World, kubo_binary: Path, told: bool) -> None:
    data = random.Random(1).randbytes(4 * MIB + 5)
    r, a, b = world.public("R"), world.home("A"), world.home("B")
    async with relay(r, kubo_binary) as (public, address):
        own = Reach("private", (address,))
        async with (
            kept(a, kubo_binary, own) as home,
            kept(b, kubo_binary, own if told else Reach(), bootstrap=(address,)) as other,
        ):
            assert await public.node.reachability() == "public"
            await until(home.circuits)
            if told:
                await until(other.circuits)
            assert await home.node.reachability() == "private"
            (home.home / "model").write_bytes(data)
            cid = await home.node.add_in_place(home.home / "model")
            await other.node.connect((await home.circuits())[0], deadline_s=10)
            direct = [c for c in await other.node.connections() if c.peer_id == home.lives[-1] and not c.relayed]
            assert {c.address.split("/")[2] for c in direct} == {a.outside}
            assert await read(other.node, cid, len(data)) == data


async def test_where_no_hole_can_be_punched_the_relay_is_named_as_the_only_way(world: World, kubo_binary: Path) -> None:
    r, a, b = world.public("R"), world.home("A", "symmetric"), world.home("B", "symmetric")
    async with (
        relay(r, kubo_binary) as (_, address),
        kept(a, kubo_binary, Reach("private", (address,))) as home,
        kept(b, kubo_binary, Reach(), bootstrap=(address,)) as other,
    ):
        await until(home.circuits)
        with pytest.raises(Unserved, match="only a relay reaches it within 4 s"):
            await other.node.connect((await home.circuits())[0], deadline_s=4)
        assert not await other.meets(home.lives[-1])


async def test_a_new_start_waits_for_what_is_in_use_and_loses_nobody(world: World, kubo_binary: Path) -> None:
    data = random.Random(2).randbytes(48 * MIB)
    r, s, a = world.public("R"), world.public("S"), world.home("A")
    async with relay(r, kubo_binary) as (public, address), relay(s, kubo_binary) as (second, other), kept(a, kubo_binary, Reach()) as home:
        cid = await public.node.add_in_place(public.write("model", data))
        for one in (address, other):
            await home.node.connect(one, deadline_s=5)
        first, peer = home.node, home.lives[0]
        home.busy = True
        home.keeper.want(Reach("private", (address, DEAD, other)))
        got = bytearray()
        async for chunk in first.read_range(cid, 0, len(data), stall_s=10):
            got += chunk
            if len(got) == 8 * MIB:
                assert home.keeper.node is first and home.lives == [peer]
                home.busy = False
                break
        await until(lambda: len(home.lives) == 3)
        assert home.lives == [peer, "gone", peer]
        await until(lambda: home.keeper.state == "ready")
        for one in (public, second):
            identity = await one.node.identity()
            await until(lambda identity=identity: home.meets(identity.peer_id))  # type: ignore[misc]
        # The dead one of three relays holds up none of the others.
        await until(home.circuits)
        assert {one.rpartition("/")[2] for one in home.keeper.reach.relays} == {address.rpartition("/")[2], other.rpartition("/")[2]}
        rest = [chunk async for chunk in home.node.read_range(cid, len(got), len(data) - len(got), stall_s=10)]
        assert bytes(got) + b"".join(rest) == data
        home.keeper.want(Reach("private", (other, address)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await until(lambda: len(home.lives) > 3)


async def test_relays_that_come_up_later_are_taken_up(world: World, kubo_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_RELAYS_AGAIN_S", 0.5)
    monkeypatch.setattr(keeping, "_LEAST_LIFE_S", 0.0)
    r, a = world.public("R"), world.home("A")
    async with relay(r, kubo_binary) as (_, address):
        pass  # its repository, and so its peer id, stay
    async with kept(a, kubo_binary, Reach("private", (address,))) as home:
        assert home.keeper.reach.relays == ()
        async with relay(r, kubo_binary) as (_, again):
            assert again == address
            await until(home.circuits)


async def test_a_block_is_found_by_its_cid_alone(world: World, kubo_binary: Path) -> None:
    r, s, a, b = world.public("R"), world.public("S"), world.home("A"), world.home("B")
    async with relay(r, kubo_binary) as (_, address), relay(s, kubo_binary) as (second, _):
        await second.node.connect(address, deadline_s=5)
        async with (
            kept(a, kubo_binary, Reach("private", (address,))) as home,
            kept(b, kubo_binary, Reach(bootstrap=(address,))) as other,
        ):
            await until(home.circuits)
            cid = await home.node.provide(b"a meeting place", deadline_s=10)
            await other.node.connect(address, deadline_s=5)
            found = await providers(other.node, cid)
            assert [one.peer_id for one in found] == [home.lives[0]]
            assert usable_multiaddrs(found[0].addresses, "public")
            await other.node.provide(b"a meeting place", deadline_s=10)
            again = await providers(other.node, cid)
            assert [one.peer_id for one in again] == [home.lives[0]]  # never ourselves
            assert len(await providers(second.node, cid, limit=1)) == 1
            await home.node.unprovide(cid)
            await home.node.unprovide(cid)
            assert cid not in await home.node.pins()
            assert cid in await other.node.pins()


async def test_with_nobody_to_tell_a_block_stays(world: World, kubo_binary: Path) -> None:
    async with kept(world.home("A"), kubo_binary, Reach()) as alone:
        with pytest.raises(Unserved):
            await alone.node.provide(b"a meeting place", deadline_s=5)
        pins = await alone.node.pins()
        assert leaf_cid(b"a meeting place") in pins
        assert await providers(alone.node, leaf_cid(b"a meeting place")) == []


async def test_dead_hosts_hold_up_no_start(tmp_path: Path, kubo_binary: Path) -> None:
    """Kubo alone would answer nobody for ten seconds here."""
    with internet(tmp_path, kubo_binary, beyond="silent") as world:
        a, r = world.home("A"), world.public("R")
        async with relay(r, kubo_binary) as (_, address):
            pass
        remembered = Reach(bootstrap=(DEAD, address))
        async with asyncio.timeout(5), kept(a, kubo_binary, remembered, PUBLIC_BOOTSTRAP) as home:
            assert await home.node.peers() == []
        async with kept(a, kubo_binary, remembered, PUBLIC_BOOTSTRAP) as home, relay(r, kubo_binary) as (public, _):
            # It comes up after the first round, and is found by a later one.
            peer = (await public.node.identity()).peer_id
            await until(lambda: home.meets(peer), deadline_s=60)


async def test_an_rpc_that_says_nothing_of_its_reachability_is_asked_in_vain(world: World, kubo_binary: Path) -> None:
    async with kubo(world.public("R"), kubo_binary, Reach()) as running:
        assert await running.node.reachability() == "unknown"
        assert await running.node.known_peers() == ()
        with pytest.raises(SwarmError):
            await running.node.connect(DEAD, deadline_s=1)
