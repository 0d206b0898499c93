"""What a node signs for its relay, which of it is accepted, and the small messages between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from daemon.buckets import Buckets
from daemon.relaying import wire
from registry import strictjson
from registry.envelope import key_name, sign
from registry.errors import Malformed, NotVerified, Stale
from registry.relaying import (
    MAX_CODES,
    MAX_ENVELOPE,
    MAX_LIFETIME,
    PAYLOAD_TYPE,
    HoldRequest,
    accept,
    build,
    parse,
    signed,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RELAY = key_name(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
CHALLENGE = "0123456789abcdef" * 2
REQUEST = HoldRequest(key_name(KEY), RELAY, CHALLENGE, 1, 300, frozenset({"abcdefg", "2345672"}))


def accepted(envelope: bytes, before: HoldRequest | None = None) -> HoldRequest:
    return accept(envelope, relay=RELAY, challenge=CHALLENGE, before=before)


def test_a_request_is_read_as_it_was_written() -> None:
    assert parse(build(REQUEST)) == REQUEST
    assert accepted(signed(REQUEST, KEY)) == REQUEST
    renewed = replace(REQUEST, sequence=2, codes=frozenset())
    assert accepted(signed(renewed, KEY), before=REQUEST) == renewed


def test_the_largest_request_fits() -> None:
    codes = frozenset(f"aaaaa{first}{second}" for first in "abcdefgh" for second in "abcdefgh")
    assert len(codes) == MAX_CODES
    largest = replace(REQUEST, codes=codes, sequence=(1 << 53) - 1, lifetime=MAX_LIFETIME)
    assert len(signed(largest, KEY)) <= MAX_ENVELOPE
    assert accepted(signed(largest, KEY)) == largest


@pytest.mark.parametrize(
    ("request_", "before", "why"),
    [
        (replace(REQUEST, relay="ed25519:" + "07" * 32), None, "another relay"),
        (replace(REQUEST, challenge="0" * 32), None, "another connection"),
        (REQUEST, REQUEST, "again"),
        (REQUEST, replace(REQUEST, sequence=2), "after a newer one"),
        (REQUEST, replace(REQUEST, node="ed25519:" + "07" * 32), "another node"),
    ],
)
def test_r28_what_is_not_for_here_or_not_new(
    request_: HoldRequest, before: HoldRequest | None, why: str
) -> None:
    with pytest.raises((NotVerified, Stale), match=why):
        accepted(signed(request_, KEY), before)


def test_only_the_node_itself_may_ask() -> None:
    other = Ed25519PrivateKey.generate()
    with pytest.raises(NotVerified, match="not signed by the node"):
        accepted(signed(REQUEST, other))
    with pytest.raises(NotVerified, match="own"):
        own = replace(REQUEST, node=RELAY)
        accepted(signed(own, Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))))
    with pytest.raises(NotVerified, match="payload type"):
        accepted(sign("application/vnd.swarmctl.announcement+json", build(REQUEST), KEY))
    broken = bytearray(signed(REQUEST, KEY))
    with pytest.raises((NotVerified, Malformed)):
        accepted(bytes(broken).replace(b'"sig":"', b'"sig":"A', 1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("v", 2),
        ("v", True),
        ("node", "ed25519:" + "00" * 32),
        ("relay", "somebody"),
        ("challenge", "0" * 31),
        ("challenge", "A" * 32),
        ("sequence", 0),
        ("sequence", 1 << 53),
        ("lifetime", 0),
        ("lifetime", MAX_LIFETIME + 1),
        ("codes", ["abcdef"]),
        ("codes", ["abcdefgh"]),
        ("codes", ["ABCDEFG"]),
        ("codes", ["abcdef1"]),
        ("codes", ["abcdefg", "abcdefg"]),
        ("codes", "abcdefg"),
        ("codes", [1]),
        ("codes", ["aaaaaaa"] * (MAX_CODES + 1)),
        ("extra", 1),
    ],
)
def test_a_wrong_field_refuses_the_whole(field: str, value: Any) -> None:
    fields = {**strictjson.loads(build(REQUEST), limit=1 << 16, what="it"), field: value}
    with pytest.raises(Malformed):
        accepted(sign(PAYLOAD_TYPE, strictjson.dumps(fields), KEY))


@given(st.binary(max_size=200))
def test_nothing_but_a_known_error_comes_of_noise(noise: bytes) -> None:
    with pytest.raises((Malformed, NotVerified, Stale)):
        accepted(noise)
    with pytest.raises(Malformed):
        parse(noise)


def test_the_messages_of_a_relay() -> None:
    ticket = "f" * 32
    assert wire.parse_challenge(wire.challenge(ticket)) == ticket
    assert wire.parse_call(wire.call(ticket)) == ticket
    assert wire.parse_call(wire.held(300)) is None
    wire.parse_held(wire.held(300))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"call": 1}', '{"call": "../../x"}', '{"call": "' + "f" * 2000 + '"}']
)
def test_what_a_relay_may_not_say(text: str) -> None:
    with pytest.raises(Malformed):
        wire.parse_call(text)
    with pytest.raises(Malformed):
        wire.parse_challenge(text)
    with pytest.raises(Malformed):
        wire.parse_held(text)


def test_a_reason_fits_a_close_frame() -> None:
    assert len(wire.reason("\N{SNOWMAN}" * 1000)) <= 123


def test_a_source_that_owes_waits_until_it_has_paid() -> None:
    now = [0.0]
    buckets = Buckets(rate=10, burst=100, clock=lambda: now[0])
    assert buckets.owe("a", 100) == 0
    assert buckets.owe("a", 50) == 5
    assert buckets.owe("b", 50) == 0
    assert not buckets.take("a")
    now[0] = 5.0
    assert buckets.owe("a", 0) == 0
    assert buckets.owe("a", 20) == 2
