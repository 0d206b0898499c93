"""A magnet alone leads to a signed model, without IPFS and with no node known: in a LAN, and over the DHT of a small internet."""

from __future__ import annotations

from pathlib import Path

from tests.functional.nodes import until
from tests.internet.world import Host, World

NO_IPFS = ("--ipfs-enabled", "false")


def signed(puller: Host, magnet: str) -> str:
    pulled = puller.run("pull", magnet)
    assert pulled["sources"]["bittorrent"] == pulled["size"]
    assert pulled["magnet"] == magnet
    return str(pulled["signed_by"])


def test_in_a_lan_a_magnet_brings_a_signed_model(world: World, original: Path) -> None:
    lan = world.lan()
    a, b = lan.host("A").up(*NO_IPFS), lan.host("B").up(*NO_IPFS)
    model = a.run("publish", str(original))
    assert "&x.mf=" in model["magnet"]
    assert b.run("peers") == []
    assert signed(b, model["magnet"]) == a.status["node"]
    assert b.blobs() == a.blobs()


def test_over_the_dht_a_magnet_brings_a_signed_model(world: World, original: Path) -> None:
    first, a = world.public("R1"), world.public("A")
    home = world.home("B", "symmetric")
    settings = (*NO_IPFS, "--swarm-rendezvous", "false", "--torrent-dht-bootstrap")
    first.up(*settings, "")
    for host in (a, home):
        host.up(*settings, f"{first.address}:6881")
    model = a.run("publish", str(original))
    until(lambda: home.run("status")["dht"]["bittorrent"], "the DHT at home")
    assert home.run("peers") == []
    assert signed(home, model["magnet"]) == a.status["node"]
