"""A LAN without a way out: nodes find each other by themselves."""

from __future__ import annotations

from pathlib import Path

from tests.internet.scenes import NO_IPFS
from tests.internet.world import World


def test_two_hosts_meet_by_mdns_then_ask_and_pull(world: World, original: Path) -> None:
    lan = world.lan()
    a, b = lan.host("A"), lan.host("B")
    world.up(a, b)
    code = a.run("publish", str(original))["code"]
    a.run("serve", code)
    assert not b.served(code)["local"]
    for _ in range(10):  # over QUIC the end of an answer has been lost now and then
        answer = b.run("ask", "Say yes.", f"#{code}", "--max-tokens", "20")
        assert answer["answered_by"] == a.status["node"]
    b.run("pull", code)
    assert b.blobs() == a.blobs()


def test_without_ipfs_a_magnet_finds_the_bytes_by_local_service_discovery(
    world: World, original: Path
) -> None:
    lan = world.lan()
    a, b = lan.host("A"), lan.host("B")
    world.up(a, b, settings=NO_IPFS)
    made = a.run("publish", str(original))
    pulled = b.run("pull", made["magnet"])
    assert pulled["sources"]["bittorrent"] == original.stat().st_size
    assert b.blobs() == a.blobs()
