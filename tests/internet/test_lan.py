"""A LAN without a way out: two nodes find each other by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.functional.nodes import until
from tests.internet.world import Host, World


def served(by: Host, code: str) -> dict[str, Any] | None:
    """What a host's `models` says of a code, once somebody serves it."""
    found = [model for model in by.run("models") if model["code"] == code and model["serving"]]
    return found[0] if found else None


def test_two_hosts_meet_by_mdns_then_ask_and_pull(world: World, original: Path) -> None:
    lan = world.lan()
    a, b = lan.host("A"), lan.host("B")
    world.up(a, b)
    code = a.run("publish", str(original))["code"]
    a.run("serve", code)
    model = until(lambda: served(b, code), "A's model on B's list")
    assert not model["local"]
    for _ in range(10):  # over QUIC the end of an answer has been lost now and then
        answer = b.run("ask", "Say yes.", f"#{code}", "--max-tokens", "20")
        assert answer["answered_by"] == a.status["node"]
    b.run("pull", code)
    assert b.blobs() == a.blobs()
