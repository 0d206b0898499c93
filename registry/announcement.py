"""What a node says about itself and its models, and which of it is believed.

What is accepted, whichever way the bytes came:
- a DSSE envelope of at most 8 KiB, signed by exactly one key, which is the `node` of the payload;
- not by ourselves (our own messages come back to us);
- not expired, and expiring at most 15 minutes (and the allowed skew) ahead of our clock;
- a sequence number greater than the greatest one accepted from that node before, also across restarts;
- every digest, CID, size, count and endpoint in its pattern and under its ceiling; peer-to-peer addresses lead to the node's
  own peer id; no model twice; names are cleaned (registry/manifest.py);
- one wrong field refuses the whole page; fields that are not known are ignored, so that later nodes may say more.

An accepted page says that the holder of the key said so. Whether the key is trusted is another matter (registry/trust.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from registry import endpoints, strictjson
from registry.address import check_endpoints, usable
from registry.envelope import check_key, open_envelope
from registry.errors import Malformed, Misdated, NotVerified, Repeated, Stale
from registry.manifest import MAX_CONTEXT, MAX_SIZE, canonical_cid, display_name, hex40, hex64, text, whole
from registry.records import Address, Announcement, Offer, Peer, SealKey

PAYLOAD_TYPE = "application/vnd.swarmctl.announcement+json"
VERSION = 1
MAX_ENVELOPE = 8 << 10  # bytes
MAX_LIFETIME = 15 * 60  # seconds from now to the expiry
MAX_SKEW = 60  # seconds that a clock may be ahead of ours
MAX_OFFERS = 32  # per page
MAX_PAGES = 64
MAX_SEAL_KEYS = 4
MAX_SEQUENCE = (1 << 53) - 1  # what every JSON parser keeps exact
MAX_COUNT = 1_000_000  # seeders or peers
MAX_SLOTS = 1024
MAX_TOKENS_PER_SECOND = 1_000_000.0

_ENDPOINTS = ("ipfs", "bittorrent", "http", "relays")  # of an address

# JSON around the payload: the envelope of an empty payload has 326 bytes, base64 adds a third.
_ENVELOPE_OVERHEAD = 340


def build(announcement: Announcement) -> bytes:
    """The payload to sign. Defaults are left out; raises `Malformed` for a page that nobody would accept."""
    address = announcement.address
    fields: dict[str, Any] = {
        "v": VERSION,
        "node": announcement.node,
        "peer_id": announcement.peer_id,
        "sequence": announcement.sequence,
        "expires": announcement.expires,
        "address": _filled({field: list(getattr(address, field)) for field in _ENDPOINTS}),
        "seal_keys": [{"key_id": key.key_id, "public": key.public, "expires": key.expires} for key in announcement.seal_keys],
        "offers": [_offer_fields(offer) for offer in announcement.offers],
        "page": announcement.page,
        "pages": announcement.pages,
        "hello": announcement.hello,
        "relay": announcement.relay,
    }
    payload = strictjson.dumps(_filled(fields))
    parse(payload)
    return payload


def pages(base: Announcement, offers: Sequence[Offer], limit: int = MAX_ENVELOPE) -> list[Announcement]:
    """`base` with `offers` on as many pages as they need, those that are served first; page i has sequence `base.sequence + i`.

    Each page, signed by one key, has at most `limit` bytes. Endpoints that no other node would take are dropped, and then the
    last ones while they take more than half a page. Offers beyond `MAX_PAGES` pages are left out.
    """
    base = _shortened(replace(base, offers=(), page=MAX_PAGES - 1, pages=MAX_PAGES), limit)
    room = _payload_limit(limit) - _size(replace(base, sequence=MAX_SEQUENCE)) - len(',"offers":[]')
    groups: list[list[Offer]] = [[]]
    left = room
    for offer in sorted(offers, key=lambda offer: not offer.serving):
        size = len(strictjson.dumps(_offer_fields(offer))) + 1
        if groups[-1] and (size > left or len(groups[-1]) == MAX_OFFERS):
            groups.append([])
            left = room
        groups[-1].append(offer)
        left -= size
    groups = groups[:MAX_PAGES]
    numbered = [replace(base, sequence=base.sequence + page, page=page, pages=len(groups)) for page in range(len(groups))]
    return [replace(page, offers=tuple(group)) for page, group in zip(numbered, groups, strict=True)]


def accept(envelope: bytes, *, now: int, known: Mapping[str, Peer], own: str, max_skew: int = MAX_SKEW) -> Announcement:
    """The announcement in `envelope`, if the rules above hold. `now` in unix seconds, `known` by node, `own` our node key.

    Raises `Malformed`, `NotVerified` or `Stale`, each with the reason.
    """
    opened = open_envelope(envelope, PAYLOAD_TYPE, limit=MAX_ENVELOPE)
    announcement = parse(opened.payload)
    if opened.keys != (announcement.node,):
        raise NotVerified("the announcement is not signed by the node that it speaks of, and by it alone")
    if announcement.node == own:
        raise Repeated("the announcement is our own")
    _check_expiry(announcement.expires, now, max_skew)
    before = known.get(announcement.node)
    if before is not None and announcement.sequence <= before.sequence:
        again = "again" if announcement.sequence == before.sequence else "after a newer one"
        raise Repeated(f"announcement {announcement.sequence} of the node came {again}")
    return announcement


def parse(payload: bytes) -> Announcement:
    """The announcement in a payload, its form checked; signature, time and sequence are `accept`'s. Raises `Malformed`."""
    fields = strictjson.loads(payload, limit=MAX_ENVELOPE, what="the announcement")
    if not isinstance(fields, dict):
        raise Malformed("the announcement must be an object")
    whole(fields, "v", VERSION, VERSION)
    node = check_key(text(fields, "node"))
    peer_id = None if fields.get("peer_id") is None else endpoints.peer_id(text(fields, "peer_id"))
    offers = tuple(_offer(node, entry) for entry in _objects(fields, "offers", MAX_OFFERS))
    if len({offer.cid for offer in offers}) != len(offers):
        raise Malformed("a model is offered twice on one page")
    page_count = whole({"pages": 1, **fields}, "pages", 1, MAX_PAGES)
    return Announcement(
        node=node,
        peer_id=peer_id,
        sequence=whole(fields, "sequence", 1, MAX_SEQUENCE),
        expires=whole(fields, "expires", 1, MAX_SEQUENCE),
        address=_address(node, peer_id, fields.get("address", {})),
        seal_keys=tuple(_seal_key(entry) for entry in _objects(fields, "seal_keys", MAX_SEAL_KEYS)),
        offers=offers,
        page=whole({"page": 0, **fields}, "page", 0, page_count - 1),
        pages=page_count,
        hello=_flag(fields, "hello"),
        relay=_flag(fields, "relay"),
    )


def _check_expiry(expires: int, now: int, max_skew: int) -> None:
    ahead = expires - now
    if ahead > MAX_LIFETIME + max_skew:
        raise Misdated(f"the announcement expires in {_span(ahead)}, later than any may: the clock of one of the nodes is off")
    if ahead <= -MAX_LIFETIME:
        raise Misdated(f"the announcement expired {_span(-ahead)} ago: it is an old one, or the clock of one of the nodes is off")
    if ahead <= 0:
        raise Stale(f"the announcement expired {_span(-ahead)} ago")


def _span(seconds: int) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds // unit} {name}"
    return f"{seconds} seconds"


# -- reading ----------------------------------------------------------------------------------------------------------------


def _offer(node: str, fields: dict[str, Any]) -> Offer:
    numbers = {"free_slots": 0, "context_length": 0, "seeders": 0, "peers": 0, **fields}
    return Offer(
        node=node,
        cid=canonical_cid(fields, "cid"),
        infohash=None if fields.get("infohash") is None else hex40(fields, "infohash"),
        infohash_v2=None if fields.get("infohash_v2") is None else hex64(fields, "infohash_v2"),
        manifest=None if fields.get("manifest") is None else canonical_cid(fields, "manifest"),
        name=display_name(text(fields, "name")),
        size=whole(fields, "size", 1, MAX_SIZE),
        serving=_flag(fields, "serving"),
        free_slots=whole(numbers, "free_slots", 0, MAX_SLOTS),
        context_length=whole(numbers, "context_length", 0, MAX_CONTEXT),
        seeders=whole(numbers, "seeders", 0, MAX_COUNT),
        peers=whole(numbers, "peers", 0, MAX_COUNT),
        tokens_per_second=_speed(fields.get("tokens_per_second", 0.0)),
    )


def _address(node: str, peer_id: str | None, fields: Any) -> Address:
    if not isinstance(fields, dict):
        raise Malformed("address must be an object")
    address = check_endpoints(Address(node, **{field: _texts(fields, field) for field in _ENDPOINTS}))
    # Otherwise a node could send everybody's dials to a stranger.
    if any(endpoints.peer_of(multiaddr) != peer_id for multiaddr in address.ipfs):
        raise Malformed("a multiaddr leads to another peer than the node")
    return address


def _seal_key(fields: dict[str, Any]) -> SealKey:
    return SealKey(whole(fields, "key_id", 0, 255), hex64(fields, "public"), whole(fields, "expires", 1, MAX_SEQUENCE))


def _objects(fields: dict[str, Any], name: str, most: int) -> list[dict[str, Any]]:
    entries = fields.get(name, [])
    if not isinstance(entries, list) or len(entries) > most or not all(isinstance(entry, dict) for entry in entries):
        raise Malformed(f"{name} must be a list of at most {most} objects")
    return entries


def _texts(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    entries = fields.get(name, [])
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise Malformed(f"{name} must be a list of texts")
    return tuple(entries)


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise Malformed(f"{name} must be true or false")
    return value


def _speed(value: Any) -> float:
    # A whole number may be too large for a float, so it is compared before it is converted.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_TOKENS_PER_SECOND:
        raise Malformed("tokens_per_second must be a number that is not absurd")
    return float(value)


# -- writing ----------------------------------------------------------------------------------------------------------------


def _offer_fields(offer: Offer) -> dict[str, Any]:
    fields = {field: getattr(offer, field) for field in Offer.__dataclass_fields__ if field != "node"}
    return _filled({**fields, "tokens_per_second": round(offer.tokens_per_second, 1)})


def _filled(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what the reader takes for granted: None, False, 0 and empty lists."""
    return {name: value for name, value in fields.items() if value}


def _payload_limit(limit: int) -> int:
    return math.floor((limit - _ENVELOPE_OVERHEAD) / 4) * 3


def _size(base: Announcement) -> int:
    return len(build(base))


def _shortened(base: Announcement, limit: int) -> Announcement:
    """`base` with so few endpoints that they leave half a page to the offers; of each kind the first ones stay."""
    address = usable(base.address)
    address = replace(address, ipfs=tuple(value for value in address.ipfs if endpoints.peer_of(value) == base.peer_id))
    for most in range(endpoints.MAX_ENDPOINTS, -1, -1):
        address = Address(address.node, **{field: getattr(address, field)[:most] for field in _ENDPOINTS})
        base = replace(base, address=address)
        if _size(base) <= _payload_limit(limit) // 2:
            return base
    raise Malformed("the announcement does not fit")
