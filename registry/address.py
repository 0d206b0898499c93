"""A node's address as people hand it on: `swarmctl://<64 hex of the node key>/ipfs=MULTIADDR,bt=HOST:PORT,http=URL`.

Every part of a node that is on has its own fields, each repeatable, so that `join` works with IPFS off. A bare multiaddr
that ends in /p2p/ID is taken too; its node key is then not known (`node` is empty). No character means anything to a shell, so
that an address may be pasted without quotes; the `?` and `&` of an ordinary URL are understood as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import parse_qsl, quote

from registry import endpoints
from registry.endpoints import MAX_ENDPOINTS
from registry.envelope import check_key
from registry.errors import Malformed, shown
from registry.records import Address

SCHEME = "swarmctl://"
MAX_ADDRESS = 8192  # characters

_MAX_FIELDS = 3 * MAX_ENDPOINTS
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def format_address(address: Address) -> str:
    """The address as one line without spaces; at most `MAX_ENDPOINTS` of each kind are written."""
    kinds = (("ipfs", address.ipfs), ("bt", address.bittorrent), ("http", address.http))
    fields = [f"{kind}={quote(value, safe='/:')}" for kind, values in kinds for value in values[:MAX_ENDPOINTS]]
    return f"{SCHEME}{address.node.removeprefix('ed25519:')}" + ("/" + ",".join(fields) if fields else "")


def parse_address(text: str) -> Address:
    """The address in `text`. Raises `Malformed` for anything that is not understood whole."""
    text = text.strip()
    if len(text) > MAX_ADDRESS:
        raise Malformed(f"the address is longer than {MAX_ADDRESS} characters")
    if text.startswith("/"):
        return Address("", ipfs=(endpoints.multiaddr(text),))
    if not text.startswith(SCHEME):
        raise Malformed(f"not a node's address: {shown(text)}; one begins with {SCHEME} or is a multiaddr")
    key, *query = re.split("[/?]", text.removeprefix(SCHEME), maxsplit=1)
    node = check_key("ed25519:" + key.lower())
    found: dict[str, list[str]] = {"ipfs": [], "bt": [], "http": []}
    for kind, value in _fields("".join(query)):
        if kind not in found:
            raise Malformed(f"the address has an unknown part {shown(kind)}")
        found[kind].append(value)
    address = Address(node, tuple(found["ipfs"]), tuple(found["bt"]), tuple(found["http"]))
    return check_endpoints(address)


def check_endpoints(address: Address) -> Address:
    """The address with every endpoint in its one spelling. Raises `Malformed` for one that is wrong, twice there or one too many."""
    for values in (address.ipfs, address.bittorrent, address.http):
        if len(values) > MAX_ENDPOINTS:
            raise Malformed(f"more than {MAX_ENDPOINTS} endpoints of one kind")
    checked = Address(
        address.node,
        tuple(endpoints.multiaddr(value) for value in address.ipfs),
        tuple(endpoints.host_port(value) for value in address.bittorrent),
        tuple(endpoints.base_url(value) for value in address.http),
    )
    for values in (checked.ipfs, checked.bittorrent, checked.http):
        if len(set(values)) != len(values):
            raise Malformed("an endpoint is there twice")
    return checked


def usable(address: Address) -> Address:
    """The address without the endpoints that no other node would take; for what the backends say about themselves."""
    return Address(
        address.node,
        _parsing(endpoints.multiaddr, address.ipfs),
        _parsing(endpoints.host_port, address.bittorrent),
        _parsing(endpoints.base_url, address.http),
    )


def _parsing(parse: Callable[[str], str], values: tuple[str, ...]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for value in values:
        try:
            found[parse(value)] = None
        except Malformed:
            continue
    return tuple(found)


def _fields(query: str) -> list[tuple[str, str]]:
    query = query.replace("&", ",")
    if not query:
        return []
    if _ESCAPE.search(query) or "+" in query:
        raise Malformed("the address has a wrong escape")
    try:
        return parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=_MAX_FIELDS, separator=",")
    except ValueError:
        raise Malformed("the address does not parse") from None
