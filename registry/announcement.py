"""What a node says about itself and its models, and which of it is believed.

A *beat* says that the node lives, how it is reached, and the revision of each of its pages: the sequence number of the
announcement that said that page last. A *page* is a beat that also has the offers of one page. So a change is sent as the
pages that changed, being alive as a beat of a few hundred bytes, and whoever lacks a page sees from any beat that it does.

What is accepted, whichever way the bytes came:
- a DSSE envelope of at most 8 KiB, signed by exactly one key: the node that it speaks of;
- not by ourselves (our own messages come back to us);
- as the *newest word* of its node: not expired, expiring at most 15 minutes (and the allowed skew) ahead of our clock, with a
  sequence number greater than the greatest one accepted from that node before, also across restarts (`floor`: what was signed
  before a crash may have been accepted and forgotten, so it is not accepted again);
- as a *page that is missing*: an older page whose sequence number is the very revision that the newest word of its node names
  for that page, while that word has not expired. Nothing of it but its offers is believed, and they live as long as that word;
- every digest, CID, size, count and endpoint in its pattern and under its ceiling; no model twice on a page; names are cleaned
  (registry/manifest.py); a page names itself at its own sequence number, a beat has no offers;
- one wrong field refuses the whole; fields that are not known are ignored, so that later nodes may say more.

A page lives on when a newer word names it at the revision that is held; at another revision it keeps the time it had, and a
page that is not named any more goes at once (daemon/gossip/peers.py).

An accepted word says that the holder of the key said so. Whether the key is trusted is another matter (registry/trust.py).
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from sys import intern
from typing import Any

from registry import endpoints, strictjson
from registry.address import check_endpoints, most, usable
from registry.envelope import open_envelope
from registry.errors import Malformed, Misdated, NotVerified, Repeated, Stale
from registry.manifest import (
    MAX_CONTEXT,
    MAX_SIZE,
    canonical_cid,
    display_name,
    hex40,
    hex64,
    text,
    whole,
)
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

# The fields of an address, each with its name on the wire: those of registry/address.py.
_ENDPOINTS = {"ipfs": "ipfs", "bittorrent": "bt", "http": "http", "relays": "relay"}

_HEADS_KEPT = 4096  # addresses and keys that were found right: a node says them in each of its beats

# JSON around the payload: the envelope of an empty payload has 326 bytes, base64 adds a third.
_ENVELOPE_OVERHEAD = 340
_MAX_HEAD = 2100  # bytes of the payload of a page without its offers; the rest is for them


def build(said: Announcement) -> bytes:
    """The payload to sign. Defaults are left out; raises `Malformed` for what nobody would accept.

    Multiaddrs lose the peer id at their end, which is that of the node.
    """
    fields: dict[str, Any] = {
        "v": VERSION,
        "peer_id": said.peer_id,
        "seq": said.sequence,
        "expires": said.expires,
        "address": _address_fields(said),
        "seal": [_seal_fields(key) for key in said.seal_keys],
        "pages": _steps(said.sequence, said.revisions),
        "offers": [_offer_fields(offer) for offer in said.offers],
        "hello": said.hello,
        "relay": said.relay,
    }
    fields = _filled(fields)
    if said.page is not None:
        fields["page"] = said.page
    payload = strictjson.dumps(fields)
    parse(payload, said.node)
    return payload


def beat(said: Announcement) -> Announcement:
    """`said` without its offers, and with as few endpoints as leave room for a page of them; the first of each kind stay.

    Endpoints that no other node would take are dropped.
    """
    address = usable(said.address)
    own = tuple(value for value in address.ipfs if endpoints.peer_of(value) == said.peer_id)
    address = replace(address, ipfs=own)
    longest = (MAX_SEQUENCE, 1) * (MAX_PAGES // 2)
    for count in range(endpoints.MAX_ENDPOINTS, -1, -1):
        fewer = {field: getattr(address, field)[:count] for field in _ENDPOINTS}
        said = replace(said, address=Address(address.node, **fewer), offers=(), page=None)
        if len(build(replace(said, revisions=longest, sequence=MAX_SEQUENCE))) <= _MAX_HEAD:
            return said
    raise Malformed("the announcement does not fit")


def room(limit: int = MAX_ENVELOPE) -> int:
    """Bytes that the offers of one page may take, see `offer_size`, so that its envelope has at most `limit`."""
    return math.floor((limit - _ENVELOPE_OVERHEAD) / 4) * 3 - _MAX_HEAD


def offer_size(offer: Offer) -> int:
    """Bytes that an offer takes on a page, however its numbers change."""
    widest = replace(
        offer,
        serving=True,
        free_slots=MAX_SLOTS,
        context_length=max(offer.context_length, 1 << 20),
        seeders=MAX_COUNT,
        peers=MAX_COUNT,
        tokens_per_second=9999.9,
    )
    return len(strictjson.dumps(_offer_fields(widest))) + 1


def read(envelope: bytes) -> Announcement:
    """What an envelope says, whatever its age. Raises `Malformed` or `NotVerified`."""
    opened = open_envelope(envelope, PAYLOAD_TYPE, limit=MAX_ENVELOPE)
    if len(opened.keys) != 1:
        raise NotVerified("the announcement is not signed by the node that it speaks of alone")
    return parse(opened.payload, opened.keys[0])


def accept(
    envelope: bytes,
    *,
    now: int,
    known: Mapping[str, Peer],
    own: str,
    floor: int = 0,
    max_skew: int = MAX_SKEW,
) -> Announcement:
    """What `envelope` says, if the rules above hold. `now` in unix seconds, `known` by node, `own` our node key.

    It is the newest word of its node if its sequence number is greater than the known one, else a page that may be missing.
    Raises `Malformed`, `NotVerified` or `Stale`, each with the reason.
    """
    said = read(envelope)
    if said.node == own:
        raise Repeated("the announcement is our own")
    before = known.get(said.node)
    if before is not None and said.sequence <= before.sequence:
        _check_named(said, before, now)
        return said
    _check_expiry(said, now, max_skew)
    if said.sequence <= floor:
        raise Stale("the announcement is older than the last start, and may have been heard before")
    return said


def node_id(node: str) -> str:
    """The short name of a node among those that know it: the first 16 hex digits of its key."""
    return node[len("ed25519:") :][:16]


def missing(peer: Peer, held: Mapping[int, int]) -> tuple[int, ...]:
    """The pages of a node that are not held at the revision that its newest word names. `held` maps pages to revisions."""
    return tuple(page for page, revision in enumerate(peer.revisions) if held.get(page) != revision)


def parse(payload: bytes, node: str) -> Announcement:
    """What a payload signed by `node` says, its form checked; time and sequence are `accept`'s. Raises `Malformed`."""
    fields = strictjson.loads(payload, limit=MAX_ENVELOPE, what="the announcement")
    if not isinstance(fields, dict):
        raise Malformed("the announcement must be an object")
    whole(fields, "v", VERSION, VERSION)
    sequence = whole(fields, "seq", 1, MAX_SEQUENCE)
    peer_id = None if fields.get("peer_id") is None else endpoints.peer_id(text(fields, "peer_id"))
    revisions = _revisions(fields, sequence)
    page = whole(fields, "page", 0, MAX_PAGES - 1) if "page" in fields else None
    offers = tuple(_offer(node, entry) for entry in _objects(fields, "offers", MAX_OFFERS))
    if page is None and offers:
        raise Malformed("there are offers, and no page that they stand on")
    if page is not None and (page >= len(revisions) or revisions[page] != sequence):
        raise Malformed("the page does not name itself")
    if len({offer.cid for offer in offers}) != len(offers):
        raise Malformed("a model is offered twice on one page")
    return Announcement(
        node=node,
        peer_id=peer_id,
        sequence=sequence,
        expires=whole(fields, "expires", 1, MAX_SEQUENCE),
        address=_address(node, peer_id, fields.get("address", {})),
        seal_keys=tuple(_seal_key(entry) for entry in _list(fields, "seal", MAX_SEAL_KEYS)),
        offers=offers,
        page=page,
        revisions=revisions,
        hello=_flag(fields, "hello"),
        relay=_flag(fields, "relay"),
    )


def _check_named(said: Announcement, before: Peer, now: int) -> None:
    """Raises `Stale` unless the newest word of the node names this page, and is in force."""
    named = before.revisions
    if said.page is None or said.page >= len(named) or named[said.page] != said.sequence:
        again = "again" if said.sequence == before.sequence else "after a newer one"
        raise Repeated(f"announcement {said.sequence} of the node came {again}")
    if before.expires <= now:
        raise Stale("the page belongs to an announcement that has expired")


def _check_expiry(said: Announcement, now: int, max_skew: int) -> None:
    ahead = said.expires - now
    if ahead > MAX_LIFETIME + max_skew:
        why = f"expires in {_span(ahead)}, later than any may: the clock of one of the nodes is off"
        raise Misdated(f"the announcement {why}", said.node, long_ago=False)
    if ahead <= -MAX_LIFETIME:
        why = f"expired {_span(-ahead)} ago: it is an old one, or the clock of one of the nodes is off"
        raise Misdated(f"the announcement {why}", said.node, long_ago=True)
    if ahead <= 0:
        raise Stale(f"the announcement expired {_span(-ahead)} ago")


def _span(seconds: int) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds // unit} {name}"
    return f"{seconds} seconds"


# -- reading ----------------------------------------------------------------------------------------------------------------


def _revisions(fields: dict[str, Any], sequence: int) -> tuple[int, ...]:
    """The revision of each page. Written as steps: how much older the first is than `seq`, each other from the one before."""
    steps = _list(fields, "pages", MAX_PAGES)
    if not all(type(step) is int and abs(step) <= MAX_SEQUENCE for step in steps):
        raise Malformed("pages must be whole numbers")
    revisions = tuple(accumulate([sequence, *steps]))[1:]
    # The pages after this one, said in the same breath, have the next numbers.
    if not all(1 <= revision < sequence + MAX_PAGES for revision in revisions):
        raise Malformed("a page has a revision that the node has not come to yet")
    return revisions


def _offer(node: str, fields: dict[str, Any]) -> Offer:
    # Thousands of offers name the same models: each of these texts is kept once.
    manifest = None if fields.get("manifest") is None else intern(canonical_cid(fields, "manifest"))
    infohash = None if fields.get("infohash") is None else intern(hex40(fields, "infohash"))
    infohash_v2 = None if fields.get("infohash_v2") is None else intern(hex64(fields, "infohash_v2"))
    return Offer(
        node,
        intern(canonical_cid(fields, "cid")),
        infohash,
        infohash_v2,
        manifest,
        display_name(text(fields, "name")),
        whole(fields, "size", 1, MAX_SIZE),
        _flag(fields, "serving"),
        _count(fields, "free_slots", MAX_SLOTS),
        _count(fields, "context_length", MAX_CONTEXT),
        _count(fields, "seeders", MAX_COUNT),
        _count(fields, "peers", MAX_COUNT),
        _speed(fields.get("tokens_per_second", 0.0)),
    )


def _count(fields: dict[str, Any], name: str, most: int) -> int:
    return whole(fields, name, 0, most) if name in fields else 0


def _address(node: str, peer_id: str | None, fields: Any) -> Address:
    if not isinstance(fields, dict):
        raise Malformed("address must be an object")
    found = [_texts(fields, name, most(field)) for field, name in _ENDPOINTS.items()]
    return _checked_address(node, peer_id, *found)


@lru_cache(_HEADS_KEPT)
def _checked_address(
    node: str,
    peer_id: str | None,
    ipfs: tuple[str, ...],
    bittorrent: tuple[str, ...],
    http: tuple[str, ...],
    relays: tuple[str, ...],
) -> Address:
    if ipfs and peer_id is None:
        raise Malformed("there are multiaddrs of a node without a peer id")
    # All of them lead to the node itself, or it could send everybody's dials to a stranger.
    whole = tuple(f"{multiaddr}/p2p/{peer_id}" for multiaddr in ipfs)
    return check_endpoints(Address(node, whole, bittorrent, http, relays))


def _seal_key(entry: Any) -> SealKey:
    if not isinstance(entry, list) or len(entry) != 3:
        raise Malformed("a seal key must be its number, its public key and its expiry")
    fields = dict(zip(("key_id", "public", "expires"), entry, strict=True))
    key_id, expires = whole(fields, "key_id", 0, 255), whole(fields, "expires", 1, MAX_SEQUENCE)
    return SealKey(key_id, _hex_of_key(text(fields, "public")), expires)


@lru_cache(_HEADS_KEPT)
def _hex_of_key(public: str) -> str:
    try:
        raw = binascii.a2b_base64(public, strict_mode=True)
    except ValueError:
        raise Malformed("a seal key is not base64") from None
    if len(raw) != 32 or base64.b64encode(raw).decode() != public:
        raise Malformed("a seal key must have 32 bytes in base64")
    return raw.hex()


def _list(fields: dict[str, Any], name: str, most: int) -> list[Any]:
    entries = fields.get(name, [])
    if not isinstance(entries, list) or len(entries) > most:
        raise Malformed(f"{name} must be a list of at most {most} entries")
    return entries


def _objects(fields: dict[str, Any], name: str, most: int) -> list[dict[str, Any]]:
    entries = _list(fields, name, most)
    if not all(isinstance(entry, dict) for entry in entries):
        raise Malformed(f"{name} must be a list of objects")
    return entries


def _texts(fields: dict[str, Any], name: str, most: int) -> tuple[str, ...]:
    entries = _list(fields, name, most)
    if not all(isinstance(entry, str) for entry in entries):
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


def _address_fields(said: Announcement) -> dict[str, Any]:
    fields = {name: list(getattr(said.address, field)) for field, name in _ENDPOINTS.items()}
    suffix = f"/p2p/{said.peer_id}"
    if not all(value.endswith(suffix) for value in fields["ipfs"]):
        raise Malformed("a multiaddr leads to another peer than the node")
    fields["ipfs"] = [value.removesuffix(suffix) for value in fields["ipfs"]]
    return _filled(fields)


def _seal_fields(key: SealKey) -> list[Any]:
    return [key.key_id, base64.b64encode(bytes.fromhex(key.public)).decode(), key.expires]


def _steps(sequence: int, revisions: Sequence[int]) -> list[int]:
    before = [sequence, *revisions]
    return [revision - last for last, revision in zip(before, revisions, strict=False)]


def _offer_fields(offer: Offer) -> dict[str, Any]:
    fields = {field: getattr(offer, field) for field in Offer.__dataclass_fields__ if field != "node"}
    return _filled({**fields, "tokens_per_second": round(offer.tokens_per_second, 1)})


def _filled(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what the reader takes for granted: None, False, 0 and empty lists."""
    return {name: value for name, value in fields.items() if value}
