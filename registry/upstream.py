"""Models behind an upstream: they have no bytes that anybody could fetch, so what names them is their name.

The CID of such a model is that of one small raw block, the descriptor, that nobody stores. Two nodes that serve the same name thus
share one code and back each other up; that the same thing answers behind it is each node's word. Whoever sees an offer can make the
descriptor from its name: the CID is its own proof, no field of an announcement is believed for it.
"""

from __future__ import annotations

from typing import Final

from registry import strictjson
from registry.cid import leaf_cid
from registry.manifest import display_name
from registry.records import Offer

_TYPE: Final = "swarmctl upstream 1"
_MAX_BLOCK: Final = 4096  # bytes; far above any name's, far below any file's


def offer(node: str, name: str, free_slots: int) -> Offer:
    """What `node` announces of the model that the upstream calls `name`. Raises `Malformed` when nothing of that can be shown."""
    shown = display_name(name)
    block = _block(shown)
    return Offer(node, leaf_cid(block), None, None, None, shown, len(block), serving=True, free_slots=free_slots)


def proven(offer: Offer) -> bool:
    """Whether an offer is of a model behind an upstream.

    One that claims a file besides proves nothing, or a liar could tie an upstream to somebody else's file.
    """
    if offer.size > _MAX_BLOCK or offer.infohash or offer.infohash_v2 or offer.manifest:
        return False
    block = _block(offer.name)
    return len(block) == offer.size and leaf_cid(block) == offer.cid


def _block(name: str) -> bytes:
    return strictjson.dumps({"model": name, "type": _TYPE})
