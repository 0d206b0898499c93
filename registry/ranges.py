"""Which addresses a node of each kind of network may speak to. Judged by what an address says: nothing is looked up.

| network    | addresses |
|---|---|
| `loopback` | 127.0.0.0/8, ::1 |
| `lan`      | loopback, private (RFC 1918), unique local and link-local ranges |
| `public`   | addresses that are globally reachable (IANA's special-purpose registries) |

A node of the public network is never sent inwards by what a stranger announces.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit


def is_address(host: str) -> bool:
    """Whether `host` is an IP literal, without brackets."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def allows(network: str, host: str) -> bool:
    """Whether a node of `network` may speak to `host`, an IP literal. A DNS name is never allowed: it may mean anything."""
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if network == "loopback":
        return address.is_loopback
    if network == "lan":
        return address.is_loopback or _is_local(address)
    return address.is_global and not address.is_multicast


def allows_url(network: str, url: str) -> bool:
    """Whether a base URL leads to the root of a host that a node of `network` may speak to."""
    parts = urlsplit(url)
    return parts.path in ("", "/") and allows(network, parts.hostname or "")


def allows_multiaddr(network: str, multiaddr: str) -> bool:
    """Whether the first host of a multiaddr is one that a node of `network` may speak to."""
    kind, host = multiaddr.split("/")[1:3]
    return kind in ("ip4", "ip6") and allows(network, host)


def _is_local(address: IPv4Address | IPv6Address) -> bool:
    return (address.is_private or address.is_link_local) and not address.is_unspecified
