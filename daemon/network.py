"""Where the peer API of a node listens, and which of its endpoints others are told, by the kind of network it lives in. Pure
but for a look at this machine's own addresses.

| network    | the peer API listens on | announced URL |
|---|---|---|
| `loopback` | 127.0.0.1 | http://127.0.0.1:PORT |
| `lan`      | all addresses, for private ones only | the private address |
| `public`   | all addresses with `swarm.open`, else 127.0.0.1 | the address at which somebody outside reached it |
"""

from __future__ import annotations

import socket
from ipaddress import ip_network

import psutil

from daemon.config import Config
from registry import ranges

_LOOPBACK = "127.0.0.1"
_ANY = ("", "0.0.0.0", "::")  # noqa: S104 - what people say for "all addresses"


def hosts(config: Config) -> list[str]:
    """The addresses that the peer API listens on."""
    if config.swarm.host:
        return [config.swarm.host]
    if config.network == "loopback" or (config.network == "public" and not config.swarm.open):
        return [_LOOPBACK]
    return ["0.0.0.0", "::"] if _has_ipv6() else ["0.0.0.0"]  # noqa: S104 - that is what it is for


def may_come(config: Config, address: str) -> bool:
    """Whether somebody at that IP address may come straight to the peer API."""
    return config.network == "public" or ranges.allows(config.network, address)


def private_url(config: Config, port: int) -> tuple[str, ...]:
    """The URL of the peer API inside a closed network; none where it listens elsewhere, or there is no such network."""
    if config.network == "loopback":
        return (f"http://{_LOOPBACK}:{port}",)
    address = private_address()
    host = config.swarm.host
    if address is None or host in (_LOOPBACK, "::1", "localhost"):
        return ()
    return (url(address if host in _ANY else host, port),)


def url(host: str, port: int) -> str:
    return f"http://{host_port(host, port)}"


def host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_addresses() -> frozenset[str]:
    """The IP addresses of this machine's interfaces, without zones."""
    found = psutil.net_if_addrs().values()
    addresses = (entry.address.partition("%")[0] for entries in found for entry in entries)
    return frozenset(address for address in addresses if ranges.is_address(address))


def own_networks() -> tuple[str, ...]:
    """The private networks that this machine's interfaces are in, loopback left out; IPv6 only as far as links reach."""
    found: set[str] = {"fe80::/10"}
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family is not socket.AF_INET or not entry.netmask:
                continue
            network = ip_network(f"{entry.address}/{entry.netmask}", strict=False)
            if network.is_private and not network.is_loopback:
                found.add(str(network))
    return tuple(sorted(found))


def global_address() -> str | None:
    """An IPv4 address of this machine that the internet could reach; None behind a NAT.

    IPv6 says nothing here: most homes have global IPv6 addresses behind a firewall.
    """
    found = sorted(one for one in own_addresses() if ":" not in one)
    return next((one for one in found if ranges.allows("public", one)), None)


def private_address() -> str | None:
    """The IPv4 address that this machine has towards others in a LAN; of several, the one of the route to the outside."""
    private = sorted(
        one
        for one in own_addresses()
        if ":" not in one and ranges.allows("lan", one) and not ranges.allows("loopback", one)
    )
    routed = _routed_address()
    return routed if routed in private else next(iter(private), None)


def _routed_address() -> str | None:
    """Connecting a UDP socket sends nothing; it only asks the routing table."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _has_ipv6() -> bool:
    if not socket.has_ipv6:
        return False
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True
