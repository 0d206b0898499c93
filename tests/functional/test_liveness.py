"""Who dropped is looked for: whoever is gone is offered to nobody, whoever is there stays."""

from __future__ import annotations

from pathlib import Path

from daemon.gossip.liveness import Liveness
from tests.functional.swarm_nodes import Script, swarm_node, until


async def test_a_node_that_let_go_and_is_gone_is_not_offered_any_more(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "b") as b:
        liveness = Liveness(b.table, b.ways, b.supervisor)
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
        liveness = Liveness(b.table, b.ways, b.supervisor)
        liveness.connected(["12D3KooWSomebody"])
        liveness.disconnected()
        liveness.connected([])
        assert not any(name.startswith("look for") for name in b.supervisor.state())
