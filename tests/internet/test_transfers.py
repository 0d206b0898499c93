"""Models that come although no direct way leads to their holder, and through a network that was cut in the middle."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.functional.nodes import until
from tests.internet.world import Host, World
from tests.unit.gguf_files import tiny_gguf

MIB = 1 << 20
NO_IPFS = ("--ipfs-enabled", "false")
CUT_S = 35.0  # longer than QUIC keeps a silent connection, and than a pull waits for a silent range


def held(home: Host) -> bool:
    return bool(home.run("status")["relays"])


def test_bytes_come_through_a_relay_only_where_its_owner_allows_it(world: World, tmp_path: Path) -> None:
    """Both ends are behind symmetric NATs and without IPFS: manifest and .torrent come by the relay in any case."""
    original = tiny_gguf(tmp_path / "tiny.gguf", 3 * MIB)
    relay = world.public("R").up(*NO_IPFS, "--swarm-open", "true")
    a, b = (world.home(name, "symmetric").up(*NO_IPFS) for name in ("A", "B"))
    model = a.run("publish", str(original))
    for home in (a, b):
        home.join(relay)
    until(lambda: held(a), "a relay for A")
    until(lambda: b.run("models"), "A's model on B's list")

    failed = b.fails("pull", model["code"])
    assert failed.code == 5
    assert "no holder can be dialled, and no relay carries model bytes" in failed.error
    assert "swarm.relay_bytes" in failed.error
    until(lambda: held(a), "a relay for A")
    assert relay.run("status")["relaying"]["bytes"] < MIB

    relay.stop()
    relay.up(*NO_IPFS, "--swarm-open", "true", "--swarm-relay-bytes", "true")
    until(lambda: held(a), "a relay for A")
    pulled = b.run("pull", model["code"])
    assert pulled["signed_by"] == a.status["node"]
    assert pulled["sources"] == {"ipfs": 0, "bittorrent": 0, "https": model["size"], "disk": 0}
    assert b.blobs() == a.blobs()


def past_a_quarter(puller: Host, ref: str) -> subprocess.Popen[str]:
    """A pull of which a quarter is there."""
    pull = puller.start("pull", ref, "--json")
    assert pull.stderr is not None
    for line in pull.stderr:
        progress = json.loads(line) if line.startswith("{") else {}
        if progress.get("size") and progress["received"] > progress["size"] / 4:
            return pull
    raise AssertionError(f"the pull ended before a quarter of it came, with {pull.wait()}")


def finished(pull: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, stderr = pull.communicate(timeout=60)
    assert pull.returncode == 0, stderr
    document: dict[str, Any] = json.loads(stdout)
    return document


def test_f14_a_partition_heals_by_itself_and_nothing_is_fetched_twice(world: World, tmp_path: Path) -> None:
    """One pull over each network, both cut off at once. What a network does not bring soon after, the peer API brings."""
    original = tiny_gguf(tmp_path / "tiny.gguf", 32 * MIB)
    a = world.public("A").up("--swarm-open", "true")
    slow = ("--transfer-download-rate", "3MiB")
    over_ipfs = world.home("B").up(*slow, "--torrent-enabled", "false")
    without_ipfs = world.home("C").up(*slow, *NO_IPFS)
    pullers = (over_ipfs, without_ipfs)
    model = a.run("publish", str(original))
    for home in pullers:
        home.join(a)
        until(lambda home=home: home.run("models"), "A's model on the list")  # type: ignore[misc]
    # Nobody has dialled A's BitTorrent port yet, so A does not announce it; the magnet may name it.
    refs = (model["code"], f"{model['magnet']}&x.pe={a.address}:6881")
    with over_ipfs.sniff() as of_ipfs, without_ipfs.sniff() as of_others:
        with ThreadPoolExecutor(2) as pool:
            pulls = list(pool.map(past_a_quarter, pullers, refs))
        for home in pullers:
            home.cut()
        time.sleep(CUT_S)  # that long it is cut
        for home in pullers:
            home.heal()
        models = [finished(pull) for pull in pulls]
    for pulled in models:
        assert pulled["sources"]["disk"] == 0
        assert sum(pulled["sources"].values()) == pulled["received"] == model["size"]
    assert models[0]["sources"]["ipfs"] > 0 and models[1]["sources"]["bittorrent"] > 0
    # What was on the wire when it was cut may come again; of what had arrived nothing does.
    for seen, home in ((of_ipfs, over_ipfs), (of_others, without_ipfs)):
        assert seen.bytes_between(a.address, home.address) < 1.6 * model["size"]
    assert over_ipfs.blobs() == without_ipfs.blobs() == a.blobs()
