from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from registry.envelope import MAX_SIGNATURES, check_key, key_name, open_envelope, pae, sign
from registry.errors import CouldNotCheck, Malformed, NotVerified

TYPE = "application/vnd.example+json"
LIMIT = 4096
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
PAYLOAD = b'{"hello":"world"}'
SIGNED = sign(TYPE, PAYLOAD, KEY)

# Wire version 1, never to be regenerated: old signed bytes keep verifying.
VECTOR = (
    b'{"payload":"eyJoZWxsbyI6IndvcmxkIn0=","payloadType":"application/vnd.example+json","signatures":[{"keyid":'
    b'"ed25519:03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8","sig":'
    b'"98ybsmxfvzFMg43xFk1pKajXJvUd9wsykw3khZlgJL4oApwiFSaCq0gGtz3Ik/Y24lWiHFOIYS6i87COlzwlCw=="}]}'
)


def opened(data: bytes) -> tuple[bytes, tuple[str, ...]]:
    result = open_envelope(data, TYPE, limit=LIMIT)
    return result.payload, result.keys


def with_change(**change: Any) -> bytes:
    return json.dumps({**json.loads(SIGNED), **change}).encode()


def test_the_authenticated_bytes_are_those_of_dsse() -> None:
    # The example of the DSSE specification, protocol.md.
    assert pae("http://example.com/HelloWorld", b"hello world") == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_old_signed_bytes_keep_verifying() -> None:
    assert sign(TYPE, PAYLOAD, KEY) == VECTOR
    assert opened(VECTOR) == (PAYLOAD, (key_name(KEY),))


@given(st.binary(max_size=500))
def test_what_is_signed_opens(payload: bytes) -> None:
    assert opened(sign(TYPE, payload, KEY)) == (payload, (key_name(KEY),))


def test_no_changed_byte_verifies() -> None:
    for at in range(len(SIGNED)):
        for mask in (0x01, 0x02, 0x20, 0x80):
            mutated = SIGNED[:at] + bytes((SIGNED[at] ^ mask,)) + SIGNED[at + 1 :]
            with pytest.raises((Malformed, NotVerified)):
                opened(mutated)


@given(at=st.integers(0, len(SIGNED) - 1), byte=st.integers(0, 255))
def test_no_other_byte_verifies(at: int, byte: int) -> None:
    if SIGNED[at] != byte:
        with pytest.raises((Malformed, NotVerified)):
            opened(SIGNED[:at] + bytes((byte,)) + SIGNED[at + 1 :])


@given(start=st.integers(0, len(SIGNED)), length=st.integers(1, 64))
def test_nothing_cut_out_verifies(start: int, length: int) -> None:
    cut = SIGNED[:start] + SIGNED[start + length :]
    if cut != SIGNED:
        with pytest.raises((Malformed, NotVerified)):
            opened(cut)


def signature(**change: Any) -> dict[str, Any]:
    return {**json.loads(SIGNED)["signatures"][0], **change}


FORGED = {
    "stripped": {"signatures": []},
    "another type": {"payloadType": "application/vnd.in-toto+json"},
    "another payload": {"payload": base64.b64encode(b"{}").decode()},
    "another key": {"signatures": [signature(keyid=key_name(OTHER))]},
    "a short signature": {"signatures": [signature(sig=base64.b64encode(bytes(32)).decode())]},
    "an empty signature": {"signatures": [signature(sig="")]},
    "one right, one wrong": {"signatures": [signature(), signature(keyid=key_name(OTHER))]},
    "signed twice": {"signatures": [signature(), signature()]},
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED.keys())
def test_forgeries_do_not_verify(change: dict[str, Any]) -> None:
    with pytest.raises(NotVerified):
        opened(with_change(**change))


def test_an_unknown_kind_of_key_cannot_be_checked() -> None:
    with pytest.raises(CouldNotCheck):
        opened(with_change(signatures=[signature(keyid="ecdsa:00")]))


MALFORMED = {
    "empty": b"",
    "not json": b"DSSE",
    "a list": b"[]",
    "not utf-8": b"\xff" + SIGNED,
    "byte order mark": b"\xef\xbb\xbf" + SIGNED,
    "duplicate key": SIGNED[:-1] + b',"payload":"e30="}',
    "more fields": with_change(more=1),
    "no signatures": b'{"payload":"","payloadType":"x"}',
    "signatures are no list": with_change(signatures={}),
    "a signature is no object": with_change(signatures=["x"]),
    "a signature has more fields": with_change(signatures=[signature(cert="x")]),
    "keyid is no text": with_change(signatures=[signature(keyid=1)]),
    "keyid is short": with_change(signatures=[signature(keyid="ed25519:00")]),
    "keyid in upper case": with_change(signatures=[signature(keyid=key_name(KEY).upper().replace("ED", "ed"))]),
    "payload is no text": with_change(payload=None),
    "base64 without padding": with_change(payload=base64.b64encode(PAYLOAD).decode().rstrip("=")),
    "url-safe base64": with_change(signatures=[signature(sig="-" + signature()["sig"][1:])]),
    "too many signatures": with_change(signatures=[signature()] * (MAX_SIGNATURES + 1)),
    "oversize": SIGNED + b" " * LIMIT,
    "too deep": b"[" * 200 + b"]" * 200,
    "endless nesting": b"[" * 4000,
    "lone surrogate": with_change(payload="\ud800"),
    "NaN": SIGNED[:-1] + b',"x":NaN}',
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_envelope_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        opened(data)


def test_the_limit_is_exact() -> None:
    assert open_envelope(SIGNED, TYPE, limit=len(SIGNED)).payload == PAYLOAD
    with pytest.raises(Malformed, match="more than"):
        open_envelope(SIGNED, TYPE, limit=len(SIGNED) - 1)


def test_several_keys_may_sign() -> None:
    extra = json.loads(sign(TYPE, PAYLOAD, OTHER))["signatures"]
    assert opened(with_change(signatures=[signature(), *extra])) == (PAYLOAD, (key_name(KEY), key_name(OTHER)))


# Edwards25519 points of order 1, 2, 4 and 8, and spellings beyond the field.
@pytest.mark.parametrize(
    "public",
    [
        "01" + "00" * 31,
        "01" + "00" * 30 + "80",
        "ec" + "ff" * 30 + "7f",
        "00" * 32,
        "00" * 31 + "80",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
        "ee" + "ff" * 30 + "7f",
        "ff" * 32,
    ],
)
def test_keys_that_anybody_can_sign_for_are_refused(public: str) -> None:
    with pytest.raises(Malformed):
        check_key("ed25519:" + public)


@pytest.mark.parametrize("name", ["", "ed25519:", "03" * 32, "ed25519:" + "0g" * 32, "ed25519:" + "03" * 33])
def test_what_is_no_key_is_malformed(name: str) -> None:
    with pytest.raises(Malformed):
        check_key(name)
