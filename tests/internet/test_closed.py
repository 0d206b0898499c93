"""A closed swarm over the same internet: members behind NATs ask each other, a stranger at the same public host sees nothing."""

from __future__ import annotations

from pathlib import Path

from tests.internet.scenes import ANSWER, OPEN
from tests.internet.world import World

MEMBER = ("--swarm-name", "the lab", "--swarm-secret", "correct horse battery staple, stapled")


def test_a_stranger_at_the_same_public_host_sees_nothing(world: World, model_file: Path) -> None:
    """Issue 8, point 9."""
    r, a, b, stranger = world.public("R"), world.home("A"), world.home("B"), world.home("S")
    r.up(*OPEN, *MEMBER)
    world.up(a, b, settings=MEMBER)
    stranger.up()
    code = a.run("publish", str(model_file))["code"]
    a.run("serve", code)
    for member in (a, b):
        member.join(r)
    answer = b.run("ask", "Say yes.", f"#{code}", *ANSWER)
    assert answer["answered_by"] == a.status["node"]

    refused = stranger.fails("join", r.status["addresses"][0])
    assert refused.code == 5
    # Its IPFS node is connected to a member's all the same.
    assert stranger.run("models") == []
    assert stranger.run("peers") == []
    assert {peer["node"] for peer in r.run("peers")} == {a.status["node"], b.status["node"]}
