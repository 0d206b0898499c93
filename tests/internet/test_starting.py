"""A node that has just started, in a world where nothing answers but what is here (issue 8, points 2 and 7)."""

from __future__ import annotations

from pathlib import Path

from tests.internet.world import internet


def test_join_straight_after_up_waits_for_ipfs(tmp_path: Path, kubo_binary: Path) -> None:
    with internet(tmp_path, kubo_binary, beyond="silent") as world:
        r, a = world.public("R").up(), world.home("A")
        a.up(ready=False)
        a.join(r)
        assert [peer["node"] for peer in a.run("peers")] == [r.status["node"]]
