"""Who dropped is looked for: whoever is gone is offered to nobody, whoever is there stays."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from daemon.errors import Unserved
from daemon.gossip.liveness import Liveness
from tests.functional.swarm_nodes import Script, swarm_node, until


async def test_a_node_that_let_go_and_is_gone_is_not_offered_any_more(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "b") as b:
        liveness = Liveness(b.table, b.ways, b.supervisor, lambda: b.ipfs)
        async with swarm_node(tmp_path / "a") as a:
            a.serves(Script())
            await b.gossip.join(a.gossip.pages.address())
            await until(lambda: b.sees(a, serving=True))
            liveness.let_go([a.key])
            # It is there, so nothing changes: it answers the question whether it is.
            await until(lambda: not any(name.startswith("look for") for name in b.supervisor.state()))
            assert b.sees(a, serving=True)
            # Gone without a word.
            a.gossip.transports.clear()
            key, told = a.key, b.table.peer(a.key)
        assert told is not None and b.table.alive(key)
        liveness.let_go([key])
        await until(lambda: not b.table.alive(key))
        assert not b.table.offers()
        assert b.table.peer(key) is not None  # its address is still a way back


async def test_connections_of_our_own_node_that_went_away_say_nothing(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "b") as b:
        liveness = Liveness(b.table, b.ways, b.supervisor, lambda: b.ipfs)
        liveness.connected(["12D3KooWSomebody"])
        liveness.disconnected()
        liveness.connected([])
        assert not any(name.startswith("look for") for name in b.supervisor.state())


async def test_who_serves_and_is_killed_is_gone_in_a_moment(tmp_path: Path, kubo_binary: Path) -> None:
    """Without a direct URL, and over a libp2p connection that nobody closed."""
    async with (
        swarm_node(tmp_path / "a", kubo=kubo_binary, direct=False) as a,
        swarm_node(tmp_path / "b", kubo=kubo_binary, direct=False) as b,
    ):
        a.serves(Script())
        await b.gossip.join(a.gossip.pages.address())
        await until(lambda: b.sees(a, serving=True))
        assert a.ipfs is not None and b.ipfs is not None and a.kubo is not None and a.kubo.pid
        peer_id = (await a.ipfs.identity()).peer_id
        await b.ipfs.ping(peer_id, deadline_s=5)
        liveness = Liveness(b.table, b.ways, b.supervisor, lambda: b.ipfs)
        liveness.connected(await b.ipfs.peers())
        asking = asyncio.create_task(liveness.ask_forever())
        os.kill(a.kubo.pid, signal.SIGSTOP)  # as a cable that is pulled: nothing is closed
        try:
            with pytest.raises(Unserved):
                await b.ipfs.ping(peer_id, deadline_s=1)
            await until(lambda: not b.table.alive(a.key))
            assert not b.table.offers()
        finally:
            os.kill(a.kubo.pid, signal.SIGCONT)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
