"""The keeper of our own Kubo on loopback; what it does in the public network stands in tests/internet/test_ipfs.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

from daemon.config import Config, Ipfs
from daemon.ipfs.interface import IpfsNode
from daemon.ipfs.keeper import IpfsKeeper
from daemon.ipfs.reach import Reach
from tests.functional.kubos import running, until

RELAY = "/ip4/45.10.0.1/tcp/4001/p2p/12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"


async def test_a_closed_network_stays_as_it_is_and_a_crash_loses_no_peer(kubo_binary: Path, tmp_path: Path) -> None:
    lives: list[IpfsNode | None] = []

    async def ready(node: IpfsNode) -> None:
        lives.append(node)

    async def gone() -> None:
        lives.append(None)

    config = Config(tmp_path / "a", network="loopback", ipfs=Ipfs(binary=str(kubo_binary), port=0, bootstrap=(RELAY,)))
    keeper = IpfsKeeper(config, ready, gone, reach=Reach("private", (RELAY,)))
    task = asyncio.create_task(keeper.run())
    try:
        async with running(kubo_binary, tmp_path / "b") as other:
            await until(lambda: keeper.state == "ready")
            first = keeper.node
            assert first is not None
            await first.connect((await other.node.identity()).addresses[0], deadline_s=5)
            keeper.want(Reach("public", relay_service=True))
            peer = (await other.node.identity()).peer_id
            assert await first.peers() == [peer]
            assert lives == [first]
            assert keeper._process is not None
            await keeper._process.stop()  # as if it had died
            await until(lambda: len(lives) == 3)
            await until(lambda: keeper.state == "ready")

            async def met_again() -> bool:
                return keeper.node is not None and await keeper.node.peers() == [peer]

            await until(met_again)
            assert keeper.node is not first
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert keeper.pid is None
