"""Two homes behind NATs that keep ports, joined to one public node: they ask and pull directly, whoever else dies.

Issue 8, points 2, 7 and 8. The tests tell one story in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.functional.nodes import until
from tests.internet.scenes import ANSWER, OPEN
from tests.internet.world import Host, World

once = pytest.mark.parametrize("homes", [True], indirect=True, ids=["open"])


@dataclass
class Homes:
    """`a` serves `code`; `b` has not joined anybody yet."""

    r1: Host
    r2: Host
    a: Host
    b: Host
    code: str


@pytest.fixture(scope="module", params=[True, False], ids=["open", "closed"])
def homes(request: pytest.FixtureRequest, shared_world: World, model_file: Path) -> Homes:
    """With the peer API of the public nodes open, and with libp2p as the only way to them."""
    kind = "open" if request.param else "closed"
    r1, r2 = shared_world.public(f"R1-{kind}"), shared_world.public(f"R2-{kind}")
    a, b = shared_world.home(f"A-{kind}"), shared_world.home(f"B-{kind}")
    opening = OPEN if request.param else ()
    shared_world.up(r1, r2, settings=opening)
    shared_world.up(a, b)
    code = a.run("publish", str(model_file))["code"]
    a.run("serve", code)
    for node in (r2, a):
        node.join(r1)
    return Homes(r1, r2, a, b, code)


def test_the_first_question_and_the_first_pull_straight_after_join_succeed(homes: Homes) -> None:
    b = homes.b
    b.join(homes.r1)
    answer = b.run("ask", "Say yes.", f"#{homes.code}", *ANSWER)
    assert answer["answered_by"] == homes.a.status["node"]
    with homes.r1.sniff() as watch:
        b.run("pull", homes.code)
    assert b.blobs() == homes.a.blobs()
    size = next((homes.a.home / "models").glob("*.gguf")).stat().st_size
    assert watch.bytes_between(b.outside, homes.r1.address) < size / 8, "the bytes went through the public node"


def test_they_talk_without_a_third_node(homes: Homes) -> None:
    answer = homes.b.run("ask", "Say yes.", f"#{homes.code}", "--via", "never", *ANSWER)
    assert answer["answered_by"] == homes.a.status["node"]
    assert answer["via"] is None


@once
def test_a_public_host_dies_and_all_goes_on(homes: Homes) -> None:
    homes.r1.power_off()
    homes.a.run("serve", homes.code)
    answer = homes.b.run("ask", "Say yes.", f"#{homes.code}", *ANSWER)
    assert answer["answered_by"] == homes.a.status["node"]
    homes.b.run("rm", homes.code)
    homes.b.run("pull", homes.code)
    assert homes.b.blobs() == homes.a.blobs()


@once
def test_of_two_that_serve_one_dies_and_the_other_is_asked(homes: Homes) -> None:
    homes.b.run("serve", homes.code)
    until(lambda: homes.r2.served(homes.code)["nodes"] == 2, "both on R2's list")
    homes.a.power_off()
    answer = homes.r2.run("ask", "Say yes.", f"#{homes.code}", *ANSWER)
    assert answer["answered_by"] == homes.b.status["node"]


@once
def test_one_that_is_killed_is_offered_to_nobody(homes: Homes) -> None:
    homes.b.kill()

    def gone() -> bool:
        return not any(model["serving"] for model in homes.r2.run("models"))

    until(gone, "R2's list without the dead")
    assert homes.r2.fails("ask", "Say yes.", f"#{homes.code}", *ANSWER).code in (3, 5)
