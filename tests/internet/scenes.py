"""What several scenes need: settings of nodes, and whether the DHT has somebody under a code."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from daemon.membership import OpenSwarm
from tests.internet.world import Host

OPEN = ("--swarm-open", "true")
NO_IPFS = ("--ipfs-enabled", "false")
NO_BITTORRENT = ("--torrent-enabled", "false")
NOBODY = ("--ipfs-bootstrap", "", "--torrent-dht-bootstrap", "")
ANSWER = ("--max-tokens", "4")


def enters_at(*hosts: Host) -> tuple[str, ...]:
    """The settings of a node that enters the BitTorrent DHT at `hosts`."""
    return ("--torrent-dht-bootstrap", " ".join(f"{host.address}:6881" for host in hosts))


def wait_until_named(code: str, entry: Host) -> Any:
    """The first endpoints under a code on the BitTorrent DHT that `entry` is in. It takes a node up to 15 s to tell the DHT."""
    key = OpenSwarm().rendezvous_key(f"code:{code}").hex()
    program = str(Path(__file__).with_name("dht_find.py"))
    found = entry.namespace.start(sys.executable, program, f"{entry.address}:6881", key)
    said, _ = found.communicate(timeout=100)
    assert found.returncode == 0, f"nobody is named under {code}"
    return json.loads(said)


def multiaddr_of(host: Host) -> str:
    """Where its IPFS node takes TCP connections."""
    found = re.findall(r"ipfs=([^,]+)", host.status["addresses"][0])
    return next(str(one) for one in found if "/tcp/" in one)
