"""A DHT full of liars: what it says is a hint, the work is bounded, and the honest holder is found (issue 8, attackers)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from daemon.membership import OpenSwarm
from tests.functional.nodes import Failed
from tests.internet.scenes import NO_IPFS, NOBODY, OPEN, enters_at, wait_until_named
from tests.internet.world import Host, World
from tests.unit.gguf_files import tiny_gguf

ROOT = Path(__file__).parents[2]
SILENT, ENDLESS, REDIRECT = range(7000, 7060), range(7100, 7130), range(7200, 7230)


def lie(liar: Host, inward: Host, key: bytes, *honest: str) -> list[str]:
    """190 wrong addresses under `key`, from four DHT nodes next to it on `liar`. Gives the addresses of these."""
    more = [f"60.{number}.0.2" for number in (201, 202, 203)]
    liar.namespace.ip(*(f"address add {address}/8 dev eth0" for address in more))
    addresses = [liar.address, *more]
    ports = [*SILENT, *ENDLESS, *REDIRECT]
    inwards = ["127.0.0.1", "10.0.0.1", "169.254.169.254", inward.address]
    lies = [
        *((liar.address, port) for port in ports),
        *((address, port) for address in inwards for port in range(8780, 8790)),
        *((f"60.250.{number}.9", 8788) for number in range(60)),
    ]
    told = {
        "addresses": addresses, "key": key.hex(), "honest": honest, "lies": lies, "silent": [*SILENT], "endless": [*ENDLESS],
        "redirect": [*REDIRECT], "location": f"http://{inward.address}:8788/swarm/1/ping",
    }  # fmt: skip
    module = str(Path(__file__).with_name("liar.py"))
    program = liar.namespace.start(
        "env", f"PYTHONPATH={ROOT}", sys.executable, module, json.dumps(told)
    )
    assert program.stdout is not None
    assert program.stdout.readline() == f"{len(ports)} servers\n"
    return addresses


def test_the_honest_holder_is_found_among_190_lies_and_nothing_inward_is_touched(
    world: World, tmp_path: Path
) -> None:
    d, p, liar = world.public("D"), world.public("P"), world.public("L")
    house = world.house()
    n, inward = house.host("N"), house.host("Printer")
    d.up(*OPEN, *NO_IPFS, *NOBODY)
    p.up(*OPEN, *NO_IPFS, *enters_at(d))
    code = p.run("publish", str(tiny_gguf(tmp_path / "tiny.gguf", size=1 << 20)))["code"]
    p.join(d)
    wait_until_named(code, d)
    addresses = lie(liar, inward, OpenSwarm().rendezvous_key(f"code:{code}"), d.address)
    entries = " ".join(f"{address}:6881" for address in (d.address, *addresses))
    n.up(*NO_IPFS, "--torrent-dht-bootstrap", entries)
    with n.sniff() as seen, inward.sniff() as printer:
        n.run("pull", code, timeout=100)
    assert n.blobs() == p.blobs()
    assert seen.between(n.address, liar.address), "nobody lied"
    assert not printer.between(n.address, inward.address)
    assert not seen.addresses() & {"10.0.0.1", "169.254.169.254"}
    assert n.run("status")["state"] == "ready"


def test_when_all_lie_a_pull_ends_with_its_error(world: World) -> None:
    liar = world.public("L")
    house = world.house()
    n, inward = house.host("N"), house.host("Printer")
    key = OpenSwarm().rendezvous_key("code:aaaaaaa")
    entries = " ".join(f"{address}:6881" for address in lie(liar, inward, key))
    n.up(*NO_IPFS, "--torrent-dht-bootstrap", entries)
    with inward.sniff() as printer:
        failed = _fails_within(n, 100, "pull", "aaaaaaa")
    assert failed.code == 3
    assert not printer.between(n.address, inward.address)
    assert n.run("status")["state"] == "ready"


def _fails_within(host: Host, seconds: float, *words: str) -> Failed:
    try:
        document = host.run(*words, timeout=seconds)
    except Failed as failed:
        return failed
    raise AssertionError(f"swarmctl {' '.join(words)} succeeded: {document}")
