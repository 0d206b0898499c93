"""What Kubo's RPC says about connections (`swarm/peers`, core/commands/swarm.go) and reachability (`swarm/addrs/autonat`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from daemon.ipfs.interface import Connection
from daemon.ipfs.reach import MAX_REMEMBERED, Reachability
from registry.errors import Malformed
from registry.multiaddrs import check_peer_id, is_public, parse_multiaddr

MAX_CONNECTIONS = 4096  # that are read; Kubo trims at some hundred

_INBOUND, _OUTBOUND = 1, 2  # network.Direction
_DHT_SERVER = "/ipfs/kad/1.0.0"  # only who holds itself for public speaks it
_LONG_LIVED_S = 60.0
_REACHABILITY: dict[str, Reachability] = {"Public": "public", "Private": "private"}


def read_connections(found: Any) -> list[Connection]:
    """The connections of a `swarm/peers?direction=true`. Peer ids and addresses are partly a stranger's word."""
    connections: list[Connection] = []
    for entry in (found.get("Peers") or ())[:MAX_CONNECTIONS]:
        try:
            peer = check_peer_id(entry["Peer"])
        except Malformed:
            continue
        address = str(entry["Addr"])
        inbound = entry.get("Direction") == _INBOUND
        connections.append(Connection(peer, address, inbound, "/p2p-circuit" in address))
    return connections


def read_reachability(found: Any) -> Reachability:
    return _REACHABILITY.get(found.get("reachability"), "unknown")


class Acquaintances:
    """Which peers are worth being remembered: public ones that we dialled and that have stayed.

    Kubo does not tell how old a connection is, so it is noted when one was first seen here.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # full address -> monotonic seconds

    def look(self, found: Any, now: float | None = None) -> tuple[str, ...]:
        """`found` is a `swarm/peers?direction=true&identify=true`. At most `MAX_REMEMBERED` addresses, the oldest first."""
        now = time.monotonic() if now is None else now
        good = _worth_remembering((found.get("Peers") or ())[:MAX_CONNECTIONS])
        self._since = {address: self._since.get(address, now) for address in good}
        lasting = [address for address, since in self._since.items() if now - since >= _LONG_LIVED_S]
        return tuple(sorted(lasting, key=self._since.__getitem__)[:MAX_REMEMBERED])


def _worth_remembering(entries: Sequence[Any]) -> list[str]:
    good: dict[str, str] = {}
    for entry in entries:
        protocols = (entry.get("Identify") or {}).get("Protocols") or ()
        if entry.get("Direction") != _OUTBOUND or _DHT_SERVER not in protocols:
            continue
        address = f"{entry['Addr']}/p2p/{entry['Peer']}"
        try:
            parsed = parse_multiaddr(address)
        except Malformed:
            continue
        if not parsed.relay and is_public(parsed.ip):
            good.setdefault(parsed.peer_id, address)
    return list(good.values())
