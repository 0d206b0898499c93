"""Where a node can be reached, as others write it: host:port, http URLs, multiaddrs, peer ids. Shapes only: nothing is looked up.

Addresses in disguise (`127.1`, `0x7f000001`, `http://a\\@b`) are refused, so that whoever connects later can judge an
address by what it says.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from urllib.parse import urlsplit

from registry.errors import Malformed, shown
from registry.records import Address

MAX_ENDPOINTS = 16  # of one kind, per node
MAX_HOST = 253  # RFC 1035
MAX_MULTIADDR = 256
MAX_URL = 2048
MAX_BASE_URL = 256
MAX_RELAYS = 4  # nodes that carry for one node

# Checks that passed and are not made again: every node says the same address in each of its beats.
_PASSED = 8192

_HEX64 = re.compile(r"[0-9a-f]{64}")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label like this makes the whole an IPv4 address (WHATWG URL, 3.5)
_DECIMAL_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"{_DECIMAL_BYTE}(?:\.{_DECIMAL_BYTE}){{3}}")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_URL_CHARACTERS = re.compile(r"[A-Za-z0-9._~:/?\[\]@!$&'()*+,;=%-]+")  # RFC 3986 less the fragment
_PEER_ID = re.compile(r"(12D3KooW|16Uiu2HA|Qm)[1-9A-HJ-NP-Za-km-z]{40,48}|k[0-9a-z]{50,64}|bafzaaj[a-z2-7]{40,70}")
_MULTIADDR_SEGMENT = re.compile(r"[A-Za-z0-9._:*=-]{1,128}")


def host(text: str) -> str:
    """A DNS name or an IP literal (IPv6 without brackets), in lower case."""
    name = text.lower()
    if not text.isascii() or not name or len(name) > MAX_HOST:
        raise Malformed(f"not a host: {shown(text)}")
    if ":" in name:
        return _ip(name, 6)
    labels = name.split(".")
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        return _ip(name, 4)
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise Malformed(f"not a host: {shown(text)}")
    return name


def port(text: str) -> int:
    """1 to 65535, written in decimal without leading zeros."""
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise Malformed(f"not a port: {shown(text)}")
    return int(text)


@lru_cache(_PASSED)
def host_port(text: str) -> str:
    """`host:port` in one spelling; IPv6 in brackets."""
    name, colon, number = text.rpartition(":")
    if not colon:
        raise Malformed(f"not host:port: {shown(text)}")
    if name.startswith("[") and name.endswith("]"):
        return f"[{_ip(name[1:-1].lower(), 6)}]:{port(number)}"
    if ":" in name:
        raise Malformed(f"not host:port: {shown(text)}")
    return f"{host(name)}:{port(number)}"


def http_url(text: str) -> str:
    """An absolute http or https URL as it was given: a sane host, no user, no fragment, no characters that browsers read otherwise."""
    if len(text) > MAX_URL:
        raise Malformed(f"the URL is longer than {MAX_URL} characters")
    if not _URL_CHARACTERS.fullmatch(text):
        raise Malformed(f"the URL has a character that must be escaped: {shown(text)}")
    try:
        parts = urlsplit(text)
        number = parts.port
    except ValueError:
        raise Malformed(f"not a URL: {shown(text)}") from None
    if parts.scheme not in ("http", "https"):
        raise Malformed("only http and https URLs are taken")
    if "@" in parts.netloc:
        raise Malformed("a URL must not carry a user or password")
    if parts.hostname is None or number == 0 or parts.netloc.endswith(":"):
        raise Malformed(f"not a URL: {shown(text)}")
    host(parts.hostname)
    return text


@lru_cache(_PASSED)
def base_url(text: str) -> str:
    """An http URL that paths are appended to: no query, no trailing slash."""
    url = http_url(text)
    if len(url) > MAX_BASE_URL or "?" in url or ".." in url:
        raise Malformed(f"not a base URL: {shown(text)}")
    return url.rstrip("/")


@lru_cache(_PASSED)
def peer_id(text: str) -> str:
    """A libp2p peer id in base58 or as a CID; that it is a key is checked by whoever dials it."""
    if not _PEER_ID.fullmatch(text):
        raise Malformed(f"not a peer id: {shown(text)}")
    return text


@lru_cache(_PASSED)
def multiaddr(text: str) -> str:
    """A full multiaddr: a network address first, `/p2p/ID` last. Transports between them are free, so that new ones fit in."""
    if len(text) > MAX_MULTIADDR or not text.startswith("/"):
        raise Malformed(f"not a multiaddr: {shown(text)}")
    segments = text[1:].split("/")
    if len(segments) < 4 or segments[-2] != "p2p" or not all(_MULTIADDR_SEGMENT.fullmatch(segment) for segment in segments):
        raise Malformed(f"not a multiaddr that ends in /p2p/ID: {shown(text)}")
    kind, name = segments[0], segments[1]
    if kind in ("ip4", "ip6"):
        _ip(name.lower(), 4 if kind == "ip4" else 6)
    elif kind in ("dns", "dns4", "dns6", "dnsaddr"):
        host(name)
    else:
        raise Malformed(f"the multiaddr must begin with an IP address or a DNS name: {shown(text)}")
    if len(segments) > 4 and segments[2] in ("tcp", "udp"):
        port(segments[3])
    peer_id(segments[-1])
    return text


def peer_of(address: str) -> str:
    """The peer id at the end of a multiaddr."""
    return address.rpartition("/")[2]


@lru_cache(_PASSED)
def relay_point(text: str) -> str:
    """`<64 hex of the relay's node key>@ENDPOINT`, where ENDPOINT is the base URL of its peer API or a full multiaddr."""
    key, at, endpoint = text.partition("@")
    if not at or not _HEX64.fullmatch(key):
        raise Malformed(f"not a relay: {shown(text)}")
    checked = multiaddr(endpoint) if endpoint.startswith("/") else base_url(endpoint)
    if "/p2p-circuit" in checked:
        raise Malformed("a relay must be reached without another relay")
    return f"{key}@{checked}"


def relay_address(point: str) -> Address:
    """The address of the node that a relay point names."""
    key, _, endpoint = point.partition("@")
    node = "ed25519:" + key
    return Address(node, ipfs=(endpoint,)) if endpoint.startswith("/") else Address(node, http=(endpoint,))


def _ip(text: str, version: int) -> str:
    if version == 4 and _IPV4.fullmatch(text):
        return text
    try:
        address = ipaddress.IPv4Address(text) if version == 4 else ipaddress.IPv6Address(text)
    except ValueError:
        raise Malformed(f"not an IPv{version} address: {shown(text)}") from None
    if "%" in text:
        raise Malformed(f"an address with a zone means nothing elsewhere: {shown(text)}")
    return str(address)
