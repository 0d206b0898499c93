"""Multiaddrs of the kind that our nodes have: what they say, and which of them a stranger can use.

    /ip4|ip6/ADDRESS/tcp/PORT[/p2p/ID]
    /ip4|ip6/ADDRESS/udp/PORT/quic-v1[/p2p/ID]
    one of these with its ID, then /p2p-circuit[/p2p/ID]

Whatever else multiaddrs can say (DNS names, websockets, WebRTC) is left out: our nodes do not listen
on it, and what a name leads to cannot be judged by looking at it. Sources: multiformats/multiaddr,
libp2p/specs addressing/README.md, peer-ids/peer-ids.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal

from registry import endpoints
from registry.errors import Malformed, shown

Network = Literal["public", "lan", "loopback"]
Transport = Literal["quic-v1", "tcp"]

_GLOBAL_UNICAST = IPv6Network("2000::/3")
_6TO4 = IPv6Network("2002::/16")  # carries any IPv4 address within, a private one too (RFC 3056)
_PRIVATE = tuple(
    ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7")
)
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_MAX_PEER_ID = 64  # characters; the longest that is taken has 53
_ID_PREFIXES = {  # what a peer id's bytes begin with, and how many there are
    b"\x00\x24\x08\x01\x12\x20": 38,  # Ed25519
    b"\x00\x25\x08\x02\x12\x21": 39,  # secp256k1
    b"\x12\x20": 34,  # the sha2-256 of a longer key, such as RSA
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a multiaddr says. With a `relay` (a peer id), the address and the port are the relay's."""

    ip: IPv4Address | IPv6Address
    transport: Transport
    port: int
    peer_id: str  # "" where none is given
    relay: str  # "" for a direct address


def parse_multiaddr(text: str) -> Endpoint:
    """Raises `Malformed` for everything but the forms on top of this file."""
    if len(text) > endpoints.MAX_MULTIADDR:
        raise Malformed(f"the multiaddr is longer than {endpoints.MAX_MULTIADDR} characters")
    match text.split("/"):
        case ["", "ip4" | "ip6" as kind, host, "tcp", port, *rest]:
            transport: Transport = "tcp"
        case ["", "ip4" | "ip6" as kind, host, "udp", port, "quic-v1", *rest]:
            transport = "quic-v1"
        case _:
            raise Malformed(f"not a multiaddr that is understood: {shown(text)}")
    ip = _ip(kind, host)
    number = endpoints.port(port)
    match rest:
        case []:
            return Endpoint(ip, transport, number, "", "")
        case ["p2p", peer]:
            return Endpoint(ip, transport, number, check_peer_id(peer), "")
        case ["p2p", relay, "p2p-circuit"]:
            return Endpoint(ip, transport, number, "", check_peer_id(relay))
        case ["p2p", relay, "p2p-circuit", "p2p", peer]:
            return Endpoint(ip, transport, number, check_peer_id(peer), check_peer_id(relay))
    raise Malformed(f"not a multiaddr that is understood: {shown(text)}")


def check_peer_id(text: str) -> str:
    """The peer id, if it is the base58 form of a multihash that libp2p takes; raises `Malformed`."""
    if not text or len(text) > _MAX_PEER_ID or any(letter not in _BASE58 for letter in text):
        raise Malformed(f"not a peer id: {shown(text)}")
    binary = _base58(text)
    for prefix, size in _ID_PREFIXES.items():
        if binary.startswith(prefix) and len(binary) == size:
            return text
    raise Malformed(f"not a peer id: {shown(text)}")


def is_public(ip: IPv4Address | IPv6Address) -> bool:
    """Whether any machine of the internet can have it: no special range, no tunnel of another kind."""
    if ip.is_multicast or not ip.is_global:
        return False
    return isinstance(ip, IPv4Address) or (ip in _GLOBAL_UNICAST and ip not in _6TO4)


def is_inside(ip: IPv4Address | IPv6Address, network: Network) -> bool:
    """Whether a stranger in a network of this kind may use the address."""
    if network == "public":
        return is_public(ip)
    if network == "lan":
        return any(ip.version == net.version and ip in net for net in _PRIVATE)
    return isinstance(ip, IPv4Address) and ip.is_loopback


def both_transports(address: str) -> tuple[str, ...]:
    """A public address over QUIC and over TCP, whichever of them is given; any other address alone.

    Our nodes listen on both under one number. A hole can be punched only over a transport on which both
    homes know their outside address, which they learn from the public nodes that they dialled; a node that
    is given both forms prefers QUIC, so two homes prefer the same.
    """
    try:
        parsed = parse_multiaddr(address)
    except Malformed:
        return (address,)
    if not is_public(parsed.ip):
        return (address,)
    kind, host = address.split("/")[1:3]
    rest = address.split(f"/{parsed.port}", 1)[1].removeprefix("/quic-v1")
    head = f"/{kind}/{host}"
    return (
        f"{head}/udp/{parsed.port}/quic-v1{rest}",
        f"{head}/tcp/{parsed.port}{rest}",
    )


def usable_multiaddrs(addresses: Iterable[str], network: Network) -> tuple[str, ...]:
    """Of a node's own addresses those that a stranger can use in a network of this kind, best first.

    - Only addresses of this kind of network; through a relay only in the public one, and only where
      the relay's own address is public.
    - Direct ones come before those through a relay, QUIC before TCP (fewer round trips, and holes
      are punched more often), IPv4 before IPv6 (more people have it).
    - Of several relays each is named once before any is named twice.
    - At most `MAX_ENDPOINTS`. What has no peer id at its end, or is not understood, is left out.
    """
    direct: dict[str, Endpoint] = {}
    relayed: dict[str, dict[str, Endpoint]] = {}
    for text in addresses:
        found = _usable(text, network)
        if found is None:
            continue
        if found.relay:
            relayed.setdefault(found.relay, {})[text] = found
        else:
            direct[text] = found
    through = [_best_first(ways) for ways in relayed.values()]
    longest = max((len(ways) for ways in through), default=0)
    in_turn = [ways[turn] for turn in range(longest) for ways in through if turn < len(ways)]
    return tuple([*_best_first(direct), *in_turn][: endpoints.MAX_ENDPOINTS])


def _usable(text: str, network: Network) -> Endpoint | None:
    try:
        found = parse_multiaddr(text)
    except Malformed:
        return None  # a form that others may not understand either
    if not found.peer_id or not is_inside(found.ip, network):
        return None
    if found.relay and network != "public":
        return None
    return found


def _best_first(ways: dict[str, Endpoint]) -> list[str]:
    def rank(text: str) -> tuple[bool, int]:
        return ways[text].transport != "quic-v1", ways[text].ip.version

    return sorted(ways, key=rank)


def _ip(kind: str, text: str) -> IPv4Address | IPv6Address:
    try:
        ip = ip_address(text)
    except ValueError:
        raise Malformed(f"not an IP address: {shown(text)}") from None
    if "%" in text or (kind == "ip4") != (ip.version == 4):
        raise Malformed(f"not an address of its kind: {shown(text)}")
    return ip


def _base58(text: str) -> bytes:
    """The bytes of a base58 text; each leading 1 is a zero byte."""
    number = 0
    for letter in text:
        number = 58 * number + _BASE58.index(letter)
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8)
