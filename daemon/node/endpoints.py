"""The endpoints of this node: those that others are told, by what is known of how we are reached.

| network    | libp2p | BitTorrent, peer API |
|---|---|---|
| `loopback` | 127.0.0.1 | 127.0.0.1 |
| `lan`      | private addresses | the private address |
| `public`, private | through relays | relay points |
| `public`, public  | direct ones | where somebody outside reached us |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from daemon import network
from daemon.config import Config
from daemon.ipfs.interface import PeerIdentity
from daemon.node.reachability import Reachability
from daemon.peerapi.server import Ports
from daemon.torrent.session import TorrentSession
from registry.address import usable
from registry.errors import Malformed
from registry.multiaddrs import parse_multiaddr, usable_multiaddrs
from registry.records import Address


class Endpoints:
    """`ports` are those of our peer API, `identity` that of our IPFS node (None: there is none), `relays` our relay points."""

    def __init__(
        self,
        node: str,
        config: Config,
        reachability: Reachability,
        torrents: TorrentSession | None,
        *,
        ports: Callable[[], Ports],
        identity: Callable[[], PeerIdentity | None],
        relays: Callable[[], tuple[str, ...]],
    ) -> None:
        self._node = node
        self._config = config
        self._reachability = reachability
        self._torrents = torrents
        self._ports = ports
        self._identity = identity
        self._relays = relays

    # -- what others are told -----------------------------------------------------------------------------------------

    def announced(self) -> Address:
        """The endpoints that a stranger can use, best first."""
        address = Address(
            self._node,
            ipfs=self.multiaddrs(),
            bittorrent=self._bittorrent(),
            http=self.urls(),
            relays=self._relays(),
        )
        return usable(address)

    def for_people(self) -> Address:
        """What a person hands on: the announced ones, and before anybody could prove it, our own on the internet."""
        known = self.announced()
        guess = network.global_address()
        unknown = self._reachability.state == "unknown"
        if self._config.network != "public" or not unknown or guess is None:
            return known
        urls = (network.url(guess, self._ports().direct),) if self.listens_outside() else ()
        bittorrent = self._torrents.port if self._torrents is not None else 0
        peers = (network.host_port(guess, bittorrent),) if bittorrent else ()
        return replace(known, http=urls, bittorrent=peers)

    def multiaddrs(self) -> tuple[str, ...]:
        """Of our IPFS node's addresses those that a stranger can use."""
        identity = self._identity()
        if identity is None:
            return ()
        found = usable_multiaddrs(identity.addresses, self._config.network)
        if self._reachability.state == "unknown" or self._reachability.ipfs_is_public():
            return found
        # What a NAT shows of us outside leads nowhere: a hole must be punched first.
        return tuple(address for address in found if parse_multiaddr(address).relay)

    def urls(self) -> tuple[str, ...]:
        """Base URLs of our peer API."""
        if self._config.network != "public":
            return network.private_url(self._config, self._ports().direct)
        host = self._host("http")
        return () if host is None else (network.url(host, self._outside_port()),)

    def _bittorrent(self) -> tuple[str, ...]:
        """host:port for BitTorrent peers."""
        host = self._host("bittorrent")
        if host is None or self._torrents is None or not self._torrents.port:
            return ()
        return (network.host_port(host, self._torrents.port),)

    def _host(self, part: str) -> str | None:
        """The address at which others reach that part of us."""
        if self._config.network == "loopback":
            return "127.0.0.1"
        if self._config.network == "lan":
            return network.private_address()
        reached = part in self._reachability.reached
        return self._reachability.external[0] if reached else None

    # -- ports --------------------------------------------------------------------------------------------------------

    def listens_outside(self) -> bool:
        """Whether the peer API listens where others could reach it."""
        return network.hosts(self._config) != ["127.0.0.1"]

    def own_ports(self) -> Mapping[str, int]:
        """The ports that somebody outside may try, by part (see daemon/peerapi/dialback.py)."""
        ports: dict[str, int] = {}
        if self.listens_outside():
            ports["http"] = self._outside_port()
        if (libp2p := self._libp2p_port()) is not None:
            ports["ipfs"] = libp2p
        if self._torrents is not None and self._torrents.port:
            ports["bittorrent"] = self._torrents.port
        return ports

    def reached_port(self) -> int | None:
        """The port at which others reach our peer API; None where they do not."""
        return self._outside_port() if "http" in self._reachability.reached else None

    def for_bittorrent(self) -> list[tuple[str, int]]:
        """The (IP, port) at which BitTorrent peers may find us when both dial: right where a router keeps the port."""
        if self._torrents is None:
            return []
        seen = [*self._reachability.external[:1], *reversed(self._torrents.dht.external_addresses)]
        return [(address, self._torrents.port) for address in seen[:1]]

    def _outside_port(self) -> int:
        """The port of our peer API as others see it: the one that a router forwards, where one does."""
        mapped = self._torrents.ports.mapped_port if self._torrents is not None else None
        return mapped or self._ports().direct

    def _libp2p_port(self) -> int | None:
        identity = self._identity()
        for address in identity.addresses if identity is not None else ():
            try:
                found = parse_multiaddr(address)
            except Malformed:
                continue
            if found.transport == "tcp" and not found.relay:
                return found.port
        return None
