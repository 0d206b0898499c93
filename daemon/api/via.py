"""Through whom an answer may come: `via` as a person writes it, and as `Answers.open` takes it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from daemon.errors import Ambiguous, NotFound, UsageError
from daemon.peerapi.ways import AUTO, NEVER
from registry.endpoints import relay_address
from registry.errors import shown
from registry.records import Peer

MAX_VIA = 72  # characters of "ed25519:" and 64 hex digits

_NODE = re.compile(r"(?:ed25519:)?([0-9a-fA-F]{8,64})")


def relay(wanted: str, peers: Iterable[Peer]) -> str:
    """`auto`, `never`, or the node key that `wanted` begins: of a peer, or of a relay of a peer.

    `wanted` is a node key or at least 8 hex digits of its beginning, with or without `ed25519:`.
    Raises `UsageError` for any other form, `NotFound` when nobody known here begins like that, and
    `Ambiguous` when several do.
    """
    if wanted in (AUTO, NEVER):
        return wanted
    digits = _NODE.fullmatch(wanted)
    if digits is None:
        hint = "use auto, never, or the first 8 hex digits of a node key, as swarmctl peers has it"
        raise UsageError("via", f"{shown(wanted)} is no node", hint)
    begin = "ed25519:" + digits[1].lower()
    found = sorted(node for node in _known(peers) if node.startswith(begin))
    if not found:
        why = f"no node that begins with {digits[1]} is known here"
        raise NotFound("via", why, "swarmctl peers lists them; swarmctl join adds one")
    if len(found) > 1:
        told = ", ".join(node.removeprefix("ed25519:")[:16] for node in found[:4])
        raise Ambiguous("via", f"{digits[1]} begins {len(found)} nodes: {told}", "give more digits")
    return found[0]


def _known(peers: Iterable[Peer]) -> set[str]:
    found: set[str] = set()
    for peer in peers:
        found.add(peer.node)
        found.update(relays_of(peer))
    return found


def relays_of(peer: Peer) -> list[str]:
    """The keys of the nodes that carry for a peer, in the order in which it names them."""
    carriers = [relay_address(point).node for point in peer.address.relays]
    return list(dict.fromkeys(carriers))
