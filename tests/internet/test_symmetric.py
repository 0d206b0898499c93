"""Symmetric NATs: no hole can be punched, so a third node carries what it cannot read (issue 8, points 4 and 10).

The tests tell one story in their order; the last one kills the relay.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.functional.nodes import until
from tests.internet.scenes import ANSWER, OPEN
from tests.internet.world import Host, World

PROMPT = "A secret prompt: count from one to forty in words."


@dataclass
class Offices:
    """`a` serves `code` behind a symmetric NAT; `b` is behind one, too, and `c` behind one that keeps ports."""

    r1: Host
    r2: Host
    a: Host
    b: Host
    c: Host
    code: str

    @property
    def relays(self) -> dict[str, Host]:
        return {host.status["node"]: host for host in (self.r1, self.r2)}


@pytest.fixture(scope="module")
def offices(shared_world: World, model_file: Path) -> Offices:
    world = shared_world
    r1, r2 = world.public("R1"), world.public("R2")
    a, b, c = world.home("A", "symmetric"), world.home("B", "symmetric"), world.home("C")
    world.up(r1, r2, settings=OPEN)
    world.up(a, b, c)
    code = a.run("publish", str(model_file))["code"]
    a.run("serve", code)
    for node in (r2, a):
        node.join(r1)
    return Offices(r1, r2, a, b, c, code)


@pytest.mark.parametrize("nat", ["symmetric", "preserving"])
def test_the_first_question_goes_through_the_public_node_which_cannot_read_it(offices: Offices, nat: str) -> None:
    asker = {"symmetric": offices.b, "preserving": offices.c}[nat]
    asker.join(offices.r1)
    with offices.r1.sniff(b"secret prompt") as first, offices.r2.sniff(b"secret prompt") as second:
        answer = asker.run("ask", PROMPT, f"#{offices.code}", "--max-tokens", "20")
    assert answer["answered_by"] == offices.a.status["node"]
    assert answer["via"] in offices.relays
    assert not first.found | second.found
    carrier = {offices.r1.status["node"]: first, offices.r2.status["node"]: second}[answer["via"]]
    assert carrier.bytes_between(offices.a.outside, offices.relays[answer["via"]].address) > len(PROMPT)


def test_what_comes_back_passes_the_relay_sealed(offices: Offices) -> None:
    question = ("ask", PROMPT, f"#{offices.code}", "--max-tokens", "40", "--temperature", "0")
    text = offices.b.run(*question)["text"]
    needles = [piece.encode() for piece in text.split() if len(piece) > 6]
    assert needles, text
    with offices.r1.sniff(*needles) as first, offices.r2.sniff(*needles) as second:
        assert offices.b.run(*question)["text"] == text
    assert not first.found | second.found


def test_without_a_relay_there_is_no_way(offices: Offices) -> None:
    assert offices.b.fails("ask", PROMPT, f"#{offices.code}", "--via", "never", *ANSWER).code == 5


def test_doctor_and_privacy_say_how_each_stands(offices: Offices) -> None:
    def network(host: Host) -> str:
        checks = host.run("doctor")["checks"]
        return next(str(check["detail"]) for check in checks if check["name"] == "network")

    until(lambda: offices.b.run("status")["nat"] != "unknown", "B's NAT")
    until(lambda: offices.c.run("status")["nat"] != "unknown", "C's NAT")
    assert "symmetric NAT" in network(offices.b)
    assert "only through a relay" in network(offices.b)
    assert offices.b.outside in network(offices.b)
    assert "NAT that keeps ports" in network(offices.c)
    assert "hole punching" in network(offices.c)
    assert "others reach this node directly" in network(offices.r1)

    def learn(host: Host) -> str:
        """Who learns something of it."""
        return "; ".join(entry["who"] for entry in host.run("privacy"))

    assert "for this one" in learn(offices.b)
    assert "that you carry for" not in learn(offices.b)
    assert "that you carry for" in learn(offices.r1)
    assert "finds the port of your peer API" in learn(offices.r1)


def test_f17_a_relay_that_dies_in_mid_answer_is_told_and_the_next_question_goes_through_another(
    offices: Offices,
) -> None:
    relay = str(offices.r1.status["node"])
    words = ("ask", PROMPT, f"#{offices.code}", "--max-tokens", "400", "--via", relay)
    asking = offices.b.start(*words, bufsize=0)
    assert asking.stdout is not None
    assert asking.stdout.read(1)
    offices.r1.kill()
    _, said = asking.communicate(timeout=60)
    assert asking.returncode, "a cut answer looked like a whole one"
    assert "error: answer: the connection to it broke in the middle" in said
    answer = offices.b.run("ask", PROMPT, f"#{offices.code}", *ANSWER)
    assert answer["via"] == offices.r2.status["node"]

