from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from registry import manifest
from registry.announcement import (
    MAX_ENVELOPE,
    MAX_LIFETIME,
    MAX_OFFERS,
    MAX_PAGES,
    MAX_SKEW,
    PAYLOAD_TYPE,
    accept,
    beat,
    build,
    missing,
    parse,
    read,
)
from registry.cid import Cid
from registry.endpoints import MAX_ENDPOINTS
from registry.envelope import key_name, sign
from registry.errors import Malformed, NotVerified, Stale
from registry.records import Address, Announcement, Offer, Peer, SealKey
from tests.unit import strategies
from tests.unit.strategies import PEER_ID, RELAY

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(b"\xf1" * 32)  # not one that a strategy shrinks to
OTHER_SPEAKER = Ed25519PrivateKey.from_private_bytes(b"\xf2" * 32)
NODE, OWN = key_name(KEY), key_name(OTHER)
NOW = 1_800_000_000
CID = "bafybeihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"

OFFER = Offer(NODE, CID, "ab" * 20, "cd" * 32, CID, "qwen-3b", 12345, True, 4, 4096, 3, 5, 12.5)
SAID = Announcement(
    node=NODE,
    peer_id=PEER_ID,
    sequence=7,
    expires=NOW + 600,
    address=Address(NODE, (f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER_ID}",), ("127.0.0.1:6881",), ("http://127.0.0.1:9000",)),
    seal_keys=(SealKey(1, "ef" * 32, NOW + 3600),),
    offers=(OFFER,),
    page=0,
    revisions=(7,),
    hello=True,
)
BEAT = replace(SAID, offers=(), page=None, sequence=9)


def known(sequence: int, *revisions: int, expires: int = NOW + 60) -> dict[str, Peer]:
    return {NODE: Peer(NODE, None, Address(NODE), sequence, expires, revisions=revisions)}


def taken(said: Announcement, *, key: Ed25519PrivateKey = KEY, peers: dict[str, Peer] | None = None, now: int = NOW) -> Announcement:
    return accept(sign(PAYLOAD_TYPE, build(said), key), now=now, known=peers or {}, own=OWN)


def forged(**change: Any) -> bytes:
    """An envelope, rightly signed, whose payload no honest node would write; `...` removes a field."""
    fields = {**json.loads(build(SAID)), **change}
    return sign(PAYLOAD_TYPE, json.dumps({k: v for k, v in fields.items() if v is not ...}).encode(), KEY)


def offering(**change: Any) -> dict[str, Any]:
    offer = json.loads(build(SAID))["offers"][0]
    return {"offers": [{k: v for k, v in {**offer, **change}.items() if v is not ...}]}


def revisions(sequence: int, page: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Of four pages, of which `page` is said now."""
    each = st.lists(st.integers(1, sequence + MAX_PAGES - 1), min_size=4, max_size=4)
    return each.map(lambda four: (*four[:page], sequence, *four[page + 1 :]))


@given(data=st.data(), key=strategies.keys, sequence=st.integers(1, 1 << 50), hello=st.booleans(), page=st.integers(0, 3))
def test_announcements_round_trip(data: st.DataObject, key: Ed25519PrivateKey, sequence: int, hello: bool, page: int) -> None:
    node = key_name(key)
    said = Announcement(
        node, PEER_ID, sequence, NOW + 1, data.draw(strategies.addresses(node)),
        tuple(data.draw(st.lists(strategies.seal_keys, max_size=2))),
        tuple(data.draw(st.lists(strategies.offers(node), max_size=4, unique_by=lambda offer: offer.cid))), page,
        data.draw(revisions(sequence, page)), hello,
    )  # fmt: skip
    assert parse(build(said), node) == said
    assert taken(said, key=key) == said


def test_a_node_without_ipfs_is_taken() -> None:
    said = replace(SAID, peer_id=None, address=replace(SAID.address, ipfs=()))
    assert taken(said) == said


@pytest.mark.parametrize(("sequence", "why"), [(7, "again"), (8, "after a newer one"), (1 << 52, "after a newer one")])
def test_replayed_and_older_announcements_are_stale(sequence: int, why: str) -> None:
    assert taken(SAID, peers=known(6)) == SAID
    with pytest.raises(Stale, match=why):
        taken(SAID, peers=known(sequence))


def test_the_sequence_of_another_node_does_not_count() -> None:
    peer = replace(known(99)[NODE], node=OWN)
    assert taken(SAID, peers={OWN: peer}) == SAID


DAY = 86400


@pytest.mark.parametrize(
    ("expires", "why"),
    [
        (NOW, "expired 0 seconds ago$"),
        (NOW - 60, "expired 60 seconds ago$"),
        (NOW - MAX_LIFETIME, "15 minutes ago: .*clock"),
        (NOW - 2 * DAY, "2 days ago: .*clock of one of the nodes is off"),
        (NOW + MAX_LIFETIME + MAX_SKEW + 1, "in 16 minutes, .*clock"),
        (NOW + 2 * DAY, "in 2 days, .*clock of one of the nodes is off"),
    ],
)
def test_the_wrong_time_is_stale_and_a_wrong_clock_is_named(expires: int, why: str) -> None:
    with pytest.raises(Stale, match=why):
        taken(replace(SAID, expires=expires))


@pytest.mark.parametrize("expires", [NOW + 1, NOW + MAX_LIFETIME, NOW + MAX_LIFETIME + MAX_SKEW])
def test_the_right_time_is_taken(expires: int) -> None:
    assert taken(replace(SAID, expires=expires)).expires == expires


def test_our_own_announcement_is_not_taken() -> None:
    with pytest.raises(Stale, match="our own"):
        accept(sign(PAYLOAD_TYPE, build(SAID), KEY), now=NOW, known={}, own=NODE)


def test_only_the_node_itself_may_speak() -> None:
    """An announcement speaks of whoever signed it: in another's name nothing can be said."""
    assert taken(BEAT, key=OTHER_SPEAKER).node == key_name(OTHER_SPEAKER)
    both = json.loads(sign(PAYLOAD_TYPE, build(SAID), KEY))
    both["signatures"] += json.loads(sign(PAYLOAD_TYPE, build(SAID), OTHER))["signatures"]
    with pytest.raises(NotVerified, match="alone"):
        accept(json.dumps(both).encode(), now=NOW, known={}, own=OWN)


def test_another_payload_type_is_not_taken() -> None:
    with pytest.raises(NotVerified):
        accept(sign(manifest.PAYLOAD_TYPE, build(SAID), KEY), now=NOW, known={}, own=OWN)


def test_an_oversize_envelope_is_malformed() -> None:
    envelope = sign(PAYLOAD_TYPE, build(SAID), KEY)
    assert accept(envelope.ljust(MAX_ENVELOPE), now=NOW, known={}, own=OWN) == SAID
    with pytest.raises(Malformed, match="more than 8192"):
        accept(envelope.ljust(MAX_ENVELOPE + 1), now=NOW, known={}, own=OWN)


def test_no_changed_byte_is_taken() -> None:
    envelope = sign(PAYLOAD_TYPE, build(SAID), KEY)
    for at in range(len(envelope)):
        with pytest.raises((Malformed, NotVerified)):
            accept(envelope[:at] + bytes((envelope[at] ^ 1,)) + envelope[at + 1 :], now=NOW, known={}, own=OWN)


def test_unknown_fields_are_ignored() -> None:
    assert accept(forged(later={"x": 1}, **offering(price=3)), now=NOW, known={}, own=OWN) == SAID


PUBLIC = base64.b64encode(bytes.fromhex("ef" * 32)).decode()
OFFER_FIELDS: dict[str, list[Any]] = {
    "cid": [..., None, 1, "", "x", "../x", CID.upper(), CID[:-1], "QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n"],
    "infohash": [1, "", "AB" * 20, "ab" * 19, "ab" * 32, "../" + "a" * 37],
    "infohash_v2": ["cd" * 20, "g" * 64, []],
    "manifest": ["x", 5, CID + "/"],
    "name": [..., None, 1, "", "\u200b", "\x1b", "/", ".."],
    "size": [..., None, -1, 0, 1 << 60, 1.5, True, "5", 1e300],
    "serving": [1, "true", None],
    "free_slots": [-1, 1 << 40, 0.5, False, None],
    "context_length": [-1, 1 << 60],
    "seeders": [-1, 10**9, "3"],
    "peers": [-1, 10**9],
    "tokens_per_second": [-1, 1e9, 10**400, "fast", True, None],
}
FIELDS: dict[str, list[Any]] = {
    "v": [..., 0, 2, "1", True, 1.0],
    "peer_id": ["", "../x", "12D3", 5, ...],
    "seq": [..., 0, -1, 1 << 53, 1 << 200, "7", True, 7.0, None],
    "expires": [..., 0, -1, 1 << 60, "x", 1.5],
    "address": [[], "x", None, {"ipfs": "x"}, {"ipfs": [1]}, {"ipfs": ["tcp/1"]}, {"ipfs": [""]}, {"ipfs": ["/ip4/1.2.3.4/tcp/0"]},
                {"http": ["ftp://a"]},
                {"http": ["http://u:p@a"]}, {"bt": ["a:0"]}, {"bt": ["a:1", "a:1"]},
                {"bt": [f"h:{i}" for i in range(1, MAX_ENDPOINTS + 2)]}],
    "seal": [{}, ["x"], [{}], [[1, "ef"]], [[256, PUBLIC, 1]], [[1, "ef", 1]], [[1, PUBLIC[:-1], 1]], [[1, PUBLIC, -1]],
             [[1, PUBLIC + "\n", 1]], [[1, PUBLIC.replace("7", "_"), 1]], [[True, PUBLIC, 1]], [[i, PUBLIC, 1] for i in range(5)]],
    "offers": [{}, "x", [1], [[]], [{}] * (MAX_OFFERS + 1), [json.loads(build(SAID))["offers"][0]] * 2],
    "page": [..., -1, 1, 99, "0", None, True],
    "pages": [..., 0, None, "1", [], [1], [-1], [0.0], ["0"], [True], [False], [0, 64], [0, -7], [0] * 65, [0, 1 << 60]],
    "hello": [1, "x", None],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in FIELDS.items() for v in values])
def test_a_wrong_field_refuses_the_page(field: str, value: Any) -> None:
    with pytest.raises(Malformed):
        accept(forged(**{field: value}), now=NOW, known={}, own=OWN)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in OFFER_FIELDS.items() for v in values])
def test_a_wrong_offer_refuses_the_page(field: str, value: Any) -> None:
    with pytest.raises(Malformed):
        accept(forged(**offering(**{field: value})), now=NOW, known={}, own=OWN)


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b"5", b'{"v":1,"v":1}', b"{" * 3000, b'{"v":NaN}', b"\xff"])
def test_what_is_no_announcement_is_malformed(payload: bytes) -> None:
    with pytest.raises(Malformed):
        accept(sign(PAYLOAD_TYPE, payload, KEY), now=NOW, known={}, own=OWN)


def test_names_are_cleaned() -> None:
    said = accept(forged(**offering(name="\x1b[2Jqwen\u202e/3b\u200b")), now=NOW, known={}, own=OWN)
    assert said.offers[0].name == "[2Jqwen-3b"


def cid_number(number: int) -> str:
    return Cid("raw", number.to_bytes(32, "big")).canonical


def test_endpoints_that_others_would_refuse_are_not_announced() -> None:
    good = SAID.address
    bad = Address(
        NODE,
        (f"/ip6/fe80::1%eth0/tcp/1/p2p/{PEER_ID}", f"/ip4/1.2.3.4/tcp/1/p2p/{RELAY}", *good.ipfs, *good.ipfs),
        ("0.0.0.0:0", *good.bittorrent),
        ("unix:/x", *good.http),
    )
    assert beat(replace(SAID, address=bad)).address == good


def test_a_beat_leaves_room_for_a_page() -> None:
    many = tuple(f"/dns4/{'a' * 60}.{'b' * 60}.org/tcp/{i}/p2p/{PEER_ID}" for i in range(1, 60))
    short = beat(replace(SAID, address=replace(SAID.address, ipfs=many)))
    assert 3 < len(short.address.ipfs) < 16 and short.address.http == SAID.address.http
    assert (short.page, short.offers) == (None, ())


def test_a_beat_is_small() -> None:
    endpoint = Address(NODE, (f"/ip4/203.0.113.77/tcp/40001/p2p/{PEER_ID}",), (), ("http://203.0.113.77:8788",))
    said = replace(BEAT, address=endpoint, hello=False, sequence=NOW * 1000, revisions=(NOW * 1000 - 1234567,))
    assert len(sign(PAYLOAD_TYPE, build(said), KEY)) <= 700
    many = replace(said, revisions=tuple(NOW * 1000 - 1234567 + page for page in range(17)))
    assert len(sign(PAYLOAD_TYPE, build(many), KEY)) <= 750


# -- a page that is missing -------------------------------------------------------------------------------------------------


def test_a_page_that_the_newest_word_names_is_taken_whatever_its_age() -> None:
    old = replace(SAID, expires=NOW - 5)
    assert taken(old, peers=known(9, 7)) == old
    assert taken(old, peers=known(7, 7)) == old  # it was heard, and not kept
    assert taken(replace(old, expires=NOW - DAY), peers=known(9, 7)).offers == (OFFER,)


@pytest.mark.parametrize("named", [(), (6,), (8,), (8, 7)])
def test_a_page_of_another_revision_is_stale(named: tuple[int, ...]) -> None:
    with pytest.raises(Stale, match="after a newer one"):
        taken(SAID, peers=known(9, *named))


def test_a_page_does_not_outlive_the_word_that_names_it() -> None:
    with pytest.raises(Stale, match="has expired"):
        taken(SAID, peers=known(9, 7, expires=NOW))


def test_a_beat_is_never_a_page_that_is_missing() -> None:
    with pytest.raises(Stale, match="again"):
        taken(BEAT, peers=known(9, 9))


def test_after_a_crash_nothing_older_is_believed() -> None:
    for sequence, floor in ((7, 7), (7, 8)):
        with pytest.raises(Stale, match="last start"):
            accept(sign(PAYLOAD_TYPE, build(replace(SAID, sequence=sequence, revisions=(sequence,))), KEY),
                   now=NOW, known={}, own=OWN, floor=floor)  # fmt: skip
    assert accept(sign(PAYLOAD_TYPE, build(SAID), KEY), now=NOW, known={}, own=OWN, floor=6) == SAID
    # What a believed word names is as good as that word.
    assert accept(sign(PAYLOAD_TYPE, build(SAID), KEY), now=NOW, known=known(9, 7), own=OWN, floor=8) == SAID


def test_missing_pages() -> None:
    peer = known(9, 3, 4, 9)[NODE]
    assert missing(peer, {}) == (0, 1, 2)
    assert missing(peer, {0: 3, 1: 3, 2: 9, 3: 1}) == (1,)


def test_what_is_read_says_who_signed_it() -> None:
    assert read(sign(PAYLOAD_TYPE, build(SAID), KEY)) == SAID


def test_what_nobody_would_accept_is_not_built() -> None:
    with pytest.raises(Malformed):
        build(replace(SAID, offers=(replace(OFFER, size=0),)))
    with pytest.raises(Malformed, match="another peer"):
        build(replace(SAID, address=Address(NODE, (f"/ip4/1.2.3.4/tcp/1/p2p/{RELAY}",))))
    with pytest.raises(Malformed, match="no page"):
        build(replace(SAID, page=None))
