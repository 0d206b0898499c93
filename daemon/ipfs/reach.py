"""What an IPFS node is told about where it stands in the public network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from daemon.errors import Bug
from registry.errors import Malformed
from registry.multiaddrs import parse_multiaddr

Reachability = Literal["public", "private", "unknown"]

MAX_RELAYS = 4
MAX_REMEMBERED = 16


@dataclass(frozen=True, slots=True)
class Reach:
    """Whether strangers can dial this node, and by whose help they reach it if they cannot.

    Every address is a direct multiaddr by IP (TCP or QUIC) that ends in /p2p/ID. The constructor
    raises `Bug` for another, or for too many: whoever hears addresses from strangers filters them
    first (`direct_addresses`), because Kubo does not start with one that it cannot read.
    """

    reachability: Reachability = "unknown"
    relays: tuple[str, ...] = ()  # public nodes to hold reservations with, one address each, live ones
    relay_service: bool = False  # whether others may hold reservations here, while we are public
    bootstrap: tuple[str, ...] = ()  # good peers of earlier lives; tried before any list

    def __post_init__(self) -> None:
        if len(self.relays) > MAX_RELAYS or len(self.bootstrap) > MAX_REMEMBERED:
            raise Bug("IPFS", f"at most {MAX_RELAYS} relays and {MAX_REMEMBERED} peers are taken")
        for address in (*self.relays, *self.bootstrap):
            if not _is_direct(address):
                raise Bug("IPFS", f"{address!r} is no direct address of a peer")

    def needs_restart(self, running: Reach) -> bool:
        """Whether a node that was started with `running` must be started again for this to hold."""
        return self._configured() != running._configured()

    def _configured(self) -> tuple[object, ...]:
        relays = frozenset(address.rpartition("/p2p/")[2] for address in self.relays)
        return self.reachability, relays, self.relay_service


def direct_addresses(addresses: tuple[str, ...], most: int) -> tuple[str, ...]:
    """The first `most` of the peers that `addresses` name, one direct address each, in their order."""
    found: dict[str, str] = {}
    for address in addresses:
        if _is_direct(address):
            found.setdefault(address.rpartition("/p2p/")[2], address)
    return tuple(found.values())[:most]


def _is_direct(address: str) -> bool:
    try:
        parsed = parse_multiaddr(address)
    except Malformed:
        return False
    return bool(parsed.peer_id) and not parsed.relay
