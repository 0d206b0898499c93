"""Which addresses a node of each kind of network may speak to, whoever names them. Judged by what they say: nothing is looked up.

A node of the public network is never sent inwards by what a stranger announces, and one of a closed network never outwards.
A DNS name is never allowed: it may mean anything.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

from registry.errors import Malformed
from registry.multiaddrs import Network, is_inside, parse_multiaddr


def is_address(host: str) -> bool:
    """Whether `host` is an IP literal, without brackets."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def allows(network: Network, host: str) -> bool:
    """Whether a node of `network` may speak to `host`, an IP literal with or without brackets."""
    try:
        address: IPv4Address | IPv6Address = ip_address(host.strip("[]"))
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    # Several nodes of a LAN may be on one machine.
    return is_inside(address, network) or (network == "lan" and address.is_loopback)


def allows_url(network: Network, url: str) -> bool:
    """Whether a base URL leads to the root of a host that a node of `network` may speak to."""
    parts = urlsplit(url)
    return parts.path in ("", "/") and allows(network, parts.hostname or "")


def allows_multiaddr(network: Network, multiaddr: str) -> bool:
    """Whether a multiaddr, or the relay in it, is one that a node of `network` may speak to."""
    try:
        return allows(network, str(parse_multiaddr(multiaddr).ip))
    except Malformed:
        return False
