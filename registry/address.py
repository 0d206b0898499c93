"""A node's address as people hand it on: `swarmctl://<64 hex of the node key>/ipfs=MULTIADDR,bt=HOST:PORT,http=URL,relay=HEX@URL`.

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

_MAX_FIELDS = 3 * MAX_ENDPOINTS + endpoints.MAX_RELAYS
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


# The name of each kind of endpoint in an address, the field of `Address` that holds them, and what checks one of them.
_KINDS: dict[str, tuple[str, Callable[[str], str]]] = {
    "ipfs": ("ipfs", endpoints.multiaddr),
    "bt": ("bittorrent", endpoints.host_port),
    "http": ("http", endpoints.base_url),
    "relay": ("relays", endpoints.relay_point),
}


def format_address(address: Address) -> str:
    """The address as one line without spaces; at most `MAX_ENDPOINTS` of each kind are written."""
    fields = [
        f"{kind}={quote(value, safe='/:@')}"
        for kind, (field, _) in _KINDS.items()
        for value in getattr(address, field)[: most(field)]
    ]
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
    found: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    for kind, value in _fields("".join(query)):
        if kind not in found:
            raise Malformed(f"the address has an unknown part {shown(kind)}")
        found[kind].append(value)
    return check_endpoints(Address(node, **{field: tuple(found[kind]) for kind, (field, _) in _KINDS.items()}))


def check_endpoints(address: Address) -> Address:
    """The address with every endpoint in its one spelling. Raises `Malformed` for one that is wrong, twice there or one too many."""
    checked: dict[str, tuple[str, ...]] = {}
    for field, parse in _KINDS.values():
        values = getattr(address, field)
        if len(values) > most(field):
            raise Malformed(f"more than {most(field)} endpoints of one kind")
        checked[field] = tuple(parse(value) for value in values)
        if len(set(checked[field])) != len(values):
            raise Malformed("an endpoint is there twice")
    return Address(address.node, **checked)


def usable(address: Address) -> Address:
    """The address without the endpoints that no other node would take; for what the backends say about themselves."""
    return Address(address.node, **{field: _parsing(parse, getattr(address, field)) for field, parse in _KINDS.values()})


def most(field: str) -> int:
    """How many endpoints an address may have in that field of `Address`."""
    return endpoints.MAX_RELAYS if field == "relays" else MAX_ENDPOINTS


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
