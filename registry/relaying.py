"""What a node says to the node that it asks to be its relay: signed, and good for one connection
alone.

What is accepted:
- a DSSE envelope of at most `MAX_ENVELOPE` bytes, signed by exactly one key, which is the `node` of
  the payload;
- it names the relay that reads it, so that no other relay can present it there;
- it carries the challenge that the relay drew for this connection, so that nobody can present it on
  another one, now or later, whatever the clocks say;
- on one connection each request has a greater sequence number than the one before;
- not by the relay itself; a lifetime of at most `MAX_LIFETIME` seconds; at most `MAX_CODES` codes,
  none twice.

An accepted request says that the holder of the key asks this relay to carry for it, and to announce
these codes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from registry import codes as short_codes
from registry import strictjson
from registry.envelope import check_key, open_envelope, sign
from registry.errors import Malformed, NotVerified, Stale
from registry.manifest import pattern, text, whole

PAYLOAD_TYPE = "application/vnd.swarmctl.relay-hold+json"
VERSION = 1
MAX_ENVELOPE = 4 << 10  # bytes
MAX_CODES = 64
MAX_LIFETIME = 600  # seconds
MAX_SEQUENCE = (1 << 53) - 1  # what every JSON parser keeps exact

SECRET = re.compile(r"[0-9a-f]{32}")  # 128 bits as hex: challenges, and the tickets of calls
_CODE = re.compile(rf"[a-z2-7]{{{short_codes.SHORT}}}")
_FIELDS = {"v", "node", "relay", "challenge", "sequence", "lifetime", "codes"}


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """`node` asks `relay` to carry for it for `lifetime` seconds; `codes` are those of models that
    it shares.
    """

    node: str  # "ed25519:<hex>"
    relay: str  # "ed25519:<hex>"
    challenge: str  # 32 hex digits, drawn by the relay
    sequence: int  # strictly increasing on one connection
    lifetime: int  # seconds from when it is read
    codes: frozenset[str] = frozenset()  # of 7 characters


def signed(request: HoldRequest, key: Ed25519PrivateKey) -> bytes:
    """The envelope to send. Raises `Malformed` for a request that no relay would take."""
    return sign(PAYLOAD_TYPE, build(request), key)


def build(request: HoldRequest) -> bytes:
    """The payload to sign. Raises `Malformed` for a request that no relay would take."""
    payload = strictjson.dumps(
        {
            "v": VERSION,
            "node": request.node,
            "relay": request.relay,
            "challenge": request.challenge,
            "sequence": request.sequence,
            "lifetime": request.lifetime,
            "codes": sorted(request.codes),
        }
    )
    parse(payload)
    return payload


def accept(
    envelope: bytes, *, relay: str, challenge: str, before: HoldRequest | None
) -> HoldRequest:
    """The request in `envelope`, if the rules above hold.

    `relay` is the key of the node that reads it, `challenge` what it drew for this connection,
    `before` the last request that it accepted on it. Raises `Malformed`, `NotVerified` or `Stale`,
    each with the reason.
    """
    opened = open_envelope(envelope, PAYLOAD_TYPE, limit=MAX_ENVELOPE)
    request = parse(opened.payload)
    if opened.keys != (request.node,):
        raise NotVerified("the request is not signed by the node that it speaks of alone")
    if request.relay != relay:
        raise NotVerified("the request is for another relay")
    if request.node == relay:
        raise NotVerified("the request is the relay's own")
    if request.challenge != challenge:
        raise Stale("the request was made for another connection")
    if before is not None and request.node != before.node:
        raise NotVerified("the request is of another node than the one before")
    if before is not None and request.sequence <= before.sequence:
        raise Stale("the request came again, or after a newer one")
    return request


def parse(payload: bytes) -> HoldRequest:
    """The request in a payload, its form checked; the rest is `accept`'s. Raises `Malformed`."""
    fields = strictjson.loads(payload, limit=MAX_ENVELOPE, what="the request")
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise Malformed(f"the request must be an object with {', '.join(sorted(_FIELDS))}")
    whole(fields, "v", VERSION, VERSION)
    return HoldRequest(
        node=check_key(text(fields, "node")),
        relay=check_key(text(fields, "relay")),
        challenge=pattern(fields, "challenge", SECRET),
        sequence=whole(fields, "sequence", 1, MAX_SEQUENCE),
        lifetime=whole(fields, "lifetime", 1, MAX_LIFETIME),
        codes=_codes(fields["codes"]),
    )


def _codes(entries: Any) -> frozenset[str]:
    if not isinstance(entries, list) or len(entries) > MAX_CODES:
        raise Malformed(f"codes must be a list of at most {MAX_CODES}")
    if not all(isinstance(entry, str) and _CODE.fullmatch(entry) for entry in entries):
        raise Malformed(f"a code must have {short_codes.SHORT} characters of base32")
    if len(set(entries)) != len(entries):
        raise Malformed("a code is there twice")
    return frozenset(entries)
