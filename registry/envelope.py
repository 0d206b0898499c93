"""Signed bytes: DSSE v1 envelopes (github.com/secure-systems-lab/dsse) with Ed25519 keys.

What is accepted:
- at most `limit` bytes of strict JSON with exactly the fields `payload`, `payloadType` and `signatures`;
- `payloadType` is the one that the caller expects;
- 1 to 8 signatures, each by another key, every one of them right: one wrong signature refuses the whole;
- base64 in the standard alphabet with padding (DSSE also allows the URL-safe one; one spelling keeps envelopes unmalleable).

The public key stands in the `keyid` (`ed25519:<64 hex>`), so opening proves possession of the key and nothing else.
Whether the key is to be trusted is decided elsewhere (registry/trust.py), never by the envelope.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from registry import strictjson
from registry.errors import CouldNotCheck, Malformed, NotVerified, shown

MAX_SIGNATURES = 8
_KEYS_KEPT = 4096  # whoever speaks, speaks again
KEY = re.compile(r"ed25519:[0-9a-f]{64}")

# The y coordinates of the points of small order: anybody can sign for such a "key".
_P = 2**255 - 19
_SMALL_ORDER = frozenset(
    {
        0,
        1,
        _P - 1,
        int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"),
        int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"),
    }
)


@dataclass(frozen=True, slots=True)
class Opened:
    """The payload of a verified envelope and the keys (`ed25519:<hex>`) that signed it, in order."""

    payload: bytes
    keys: tuple[str, ...]


def key_name(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """`ed25519:<64 hex>` of the public key."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return "ed25519:" + public.public_bytes_raw().hex()


def check_key(name: str) -> str:
    """`name` itself. Raises `Malformed` unless it is `ed25519:<64 hex>` and a point that somebody can hold the key of."""
    if not KEY.fullmatch(name):
        raise Malformed(f"not a key: {shown(name)}")
    y = int.from_bytes(bytes.fromhex(name[8:]), "little") & (2**255 - 1)
    if y >= _P or y in _SMALL_ORDER:
        raise Malformed("not a key: anybody could sign for it")
    return name


def sign(payload_type: str, payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """An envelope with one signature, as compact JSON."""
    signature = key.sign(pae(payload_type, payload))
    return strictjson.dumps(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"keyid": key_name(key), "sig": base64.b64encode(signature).decode()}],
        }
    )


def open_envelope(data: bytes, payload_type: str, *, limit: int) -> Opened:
    """The payload, after every signature has been checked.

    Raises `Malformed` (not an envelope), `NotVerified` (no signature, a wrong one, another type) or `CouldNotCheck` (a
    kind of key that is unknown here).
    """
    body = strictjson.loads(data, limit=limit, what="the envelope")
    if not isinstance(body, dict) or body.keys() != {"payload", "payloadType", "signatures"}:
        raise Malformed("the envelope must have payload, payloadType and signatures")
    signatures = body["signatures"]
    if not isinstance(signatures, list) or len(signatures) > MAX_SIGNATURES:
        raise Malformed(f"the envelope must have a list of at most {MAX_SIGNATURES} signatures")
    if body["payloadType"] != payload_type:
        raise NotVerified(f"the payload type is not {payload_type}")
    if not signatures:
        raise NotVerified("the envelope is not signed")
    payload = _decode(body["payload"], "payload")
    message = pae(payload_type, payload)
    keys = tuple(_check(signature, message) for signature in signatures)
    if len(set(keys)) != len(keys):
        raise NotVerified("the envelope is signed twice by one key")
    return Opened(payload, keys)


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding, the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _check(signature: Any, message: bytes) -> str:
    if not isinstance(signature, dict) or signature.keys() != {"keyid", "sig"} or not isinstance(signature["keyid"], str):
        raise Malformed("a signature must have keyid and sig")
    key = signature["keyid"]
    if not key.startswith("ed25519:"):
        raise CouldNotCheck(f"unknown kind of key {shown(key)}")
    try:
        _public(key).verify(_decode(signature["sig"], "sig"), message)
    except InvalidSignature:
        raise NotVerified(f"the signature by {key[:16]}.. is wrong") from None
    return key


@lru_cache(_KEYS_KEPT)
def _public(name: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(check_key(name)[8:]))


def _decode(text: Any, what: str) -> bytes:
    if not isinstance(text, str):
        raise Malformed(f"{what} must be text")
    try:
        binary = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise Malformed(f"{what} is not base64") from None
    if binascii.b2a_base64(binary, newline=False).decode() != text:
        raise Malformed(f"{what} is not base64 in its one spelling")
    return binary
