"""A public node and a home that knows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.internet.world import Nat, World


@pytest.mark.parametrize(("nat", "carrier"), [("preserving", None), ("symmetric", "symmetric")])
def test_a_home_asks_and_pulls_from_a_public_node(
    world: World, original: Path, nat: Nat, carrier: Nat | None
) -> None:
    r, a = world.public("R"), world.home("A", nat, carrier)
    world.up(r, a)
    code = r.run("publish", str(original))["code"]
    r.run("serve", code)
    with r.sniff(b"a most secret question") as watch:
        a.join(r)
        a.served(code)
        answer = a.run("ask", "This is a most secret question.", f"#{code}", "--max-tokens", "20")
        a.run("pull", code)
    assert answer["answered_by"] == r.status["node"]
    assert a.blobs() == r.blobs()
    assert watch.bytes_between(r.address, a.outside) > original.stat().st_size
    assert a.address not in watch.addresses()
    assert not watch.found
