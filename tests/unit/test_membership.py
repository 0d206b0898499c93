"""The keys of a swarm, its seals and its proofs: who is in gets through once, and nobody else does."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import hdrs
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict
from yarl import URL

from daemon.config import load
from daemon.errors import UsageError
from daemon.gossip.moving import settle
from daemon.gossip.peers import PeerTable
from daemon.ledger import LedgerThread
from daemon.membership import ASKED, ClosedSwarm, Membership, OpenSwarm, SeenNonces, check, membership
from registry import membership as rules
from registry.errors import Malformed, NotVerified, Stale
from registry.records import Address, Peer
from registry.store import Ledger

NAME, SECRET = "the lab", "correct horse battery staple"
KEYS = rules.derive(NAME, SECRET)
OTHERS = {
    "another secret": rules.derive(NAME, "correct horse battery stapl3"),
    "another name": rules.derive("the bar", SECRET),
}
ME, OTHER = "ed25519:" + "a" * 64, "ed25519:" + "b" * 64
NOW_MS = 1_800_000_000_000
NONCE = bytes(range(rules.PROOF_NONCE))


# -- keys ---------------------------------------------------------------------------------------------------------------


def test_vectors() -> None:
    """What members of today and of tomorrow must derive alike. Never regenerated."""
    assert KEYS.topic == "510f7d192db410c4135d6183f84118a39e832aff"
    assert KEYS.protocol == "/x/2295e70f96ee8d03061af5bf4f7cd7f936bbcb8f"
    assert KEYS.fingerprint == "b7364543a8b0ecdae2a8e0652d22d6c7"
    assert rules.closed_key(KEYS, "swarm").hex() == "9fcd9c90f07390a39ad6b2a7b04febbfa91e8862"
    assert rules.closed_block(KEYS, "code:pecbsxp").hex() == "d500283ba2ef837b0cf95d6ec4a83cbdb9039c1bc022ce9b6f4bda83d80c6e18"
    sealed = rules.seal(KEYS, bytes(12), b"a page", "announcement")
    assert sealed.hex() == "00000000000000000000000061850cb662fec78af5735bc87d611d0ef8ed62993603"
    proof = rules.prove(KEYS, time_ms=NOW_MS, nonce=NONCE, node=ME, method="GET", target="/x?y=1")
    assert proof == "AAABoxhcUAAAAQIDBAUGBwgJCgsMDQ4PlAQzpbb7HY3v4hfCmpU1ON0X0WXEoP17ceIdRIGfjOI"


def test_the_keys_are_scrypt_and_hkdf_and_hmac() -> None:
    """The same by another way: RFC 7914, RFC 5869 (section 2.3) and RFC 2104 as the standard library has them."""
    root = hashlib.scrypt(
        SECRET.encode(), salt=b"swarmctl/1/closed/" + NAME.encode(), n=2**15, r=8, p=1, maxmem=2**26, dklen=32
    )

    def expanded(label: bytes) -> bytes:  # one round of HKDF-Expand is enough for 32 bytes
        return hmac.digest(root, b"swarmctl/1/closed/" + label + b"\x01", "sha256")

    assert KEYS.topic == expanded(b"topic")[:20].hex()
    assert KEYS.protocol == f"/x/{expanded(b'protocol')[:20].hex()}"
    assert KEYS.sealing == expanded(b"sealing")
    said = b"\0\0\0\x03dht" + b"\0\0\0\x05swarm"
    assert rules.closed_key(KEYS, "swarm") == hmac.digest(expanded(b"rendezvous"), said, "sha256")[:20]


def test_the_open_swarm_has_constants() -> None:
    swarm = OpenSwarm()
    assert (swarm.topic, swarm.protocol) == ("/swarmctl/1/announce", "/x/swarmctl/1")
    assert swarm.rendezvous_block("swarm") == b"swarmctl/1/swarm"
    assert swarm.rendezvous_block("code:pecbsxp") == b"swarmctl/1/code/pecbsxp"
    assert swarm.rendezvous_key("swarm") == hashlib.sha1(b"swarmctl/1/swarm").digest()


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_nothing_is_shared_with_another_swarm(other: rules.SwarmKeys) -> None:
    for field in ("topic", "protocol", "fingerprint", "rendezvous", "sealing", "proving"):
        assert getattr(KEYS, field) != getattr(other, field)
    for what in ("swarm", "code:pecbsxp"):
        assert rules.closed_key(KEYS, what) not in (rules.closed_key(other, what), rules.open_key(what))
        assert rules.closed_block(KEYS, what) != rules.closed_block(other, what)


def test_what_is_shown_to_all_names_nobody() -> None:
    shown = f"{KEYS.topic} {KEYS.protocol} {KEYS!r}"
    assert "swarm" not in f"{KEYS.topic} {KEYS.protocol}"
    for private in (KEYS.sealing, KEYS.proving, KEYS.rendezvous):
        assert private.hex() not in shown and repr(private) not in shown
    assert SECRET not in shown and NAME not in shown


def test_the_same_words_from_two_keyboards_are_the_same_swarm() -> None:
    assert rules.derive("caf\u00e9", "na\u00efve secret words").topic == rules.derive("cafe\u0301", "nai\u0308ve secret words").topic


@pytest.mark.parametrize("what", ["", "code:", "code:PECBSXP", "code:pecbsx", "code:pecbsxp\n", "swarm ", "node:x"])
def test_a_rendezvous_for_something_else_is_refused(what: str) -> None:
    swarm: Membership
    for swarm in (OpenSwarm(), closed()):
        with pytest.raises(Malformed):
            swarm.rendezvous_key(what)
        with pytest.raises(Malformed):
            swarm.rendezvous_block(what)


def test_rendezvous_have_their_sizes() -> None:
    swarm: Membership
    for swarm in (OpenSwarm(), closed()):
        assert len(swarm.rendezvous_key("swarm")) == 20
        assert len(swarm.rendezvous_block("code:pecbsxp")) <= 64


# -- seals --------------------------------------------------------------------------------------------------------------


@given(data=st.binary(max_size=2000), what=st.text(max_size=20))
def test_what_is_sealed_opens(data: bytes, what: str) -> None:
    swarm = closed()
    sealed = swarm.seal(data, what)
    assert len(sealed) == len(data) + swarm.overhead
    assert swarm.open(sealed, what, limit=len(data)) == data
    assert sealed != swarm.seal(data, what)  # the same page twice is not seen to be the same
    assert OpenSwarm().open(OpenSwarm().seal(data, what), what, limit=len(data)) == data


@given(data=st.binary(max_size=200), at=st.integers(min_value=0), flip=st.integers(1, 255))
def test_a_changed_byte_does_not_open(data: bytes, at: int, flip: int) -> None:
    sealed = bytearray(closed().seal(data, "page"))
    sealed[at % len(sealed)] ^= flip
    with pytest.raises(NotVerified):
        closed().open(bytes(sealed), "page", limit=1000)


@given(data=st.binary(max_size=400))
def test_garbage_does_not_open(data: bytes) -> None:
    with pytest.raises(NotVerified):
        closed().open(data, "page", limit=1000)


def test_what_is_sealed_opens_as_nothing_else() -> None:
    sealed = closed().seal(b"a page", "page")
    for strange in (*(ClosedSwarm(keys, node=ME, clock=lambda: 0) for keys in OTHERS.values()),):
        with pytest.raises(NotVerified):
            strange.open(sealed, "page", limit=100)
    with pytest.raises(NotVerified):
        closed().open(sealed, "answer", limit=100)
    with pytest.raises(NotVerified):
        closed().open(sealed[:-1], "page", limit=100)


def test_more_than_the_limit_is_not_even_tried() -> None:
    swarm: Membership
    for swarm in (OpenSwarm(), closed()):
        sealed = swarm.seal(b"x" * 100, "page")
        assert swarm.open(sealed, "page", limit=100) == b"x" * 100
        with pytest.raises(Malformed, match="more than 99 bytes"):
            swarm.open(sealed, "page", limit=99)


# -- proofs -------------------------------------------------------------------------------------------------------------


def closed(clock: Callable[[], float] = lambda: NOW_MS / 1000, node: str = ME) -> ClosedSwarm:
    return ClosedSwarm(KEYS, node=node, clock=clock)


def prove(
    keys: rules.SwarmKeys = KEYS,
    *,
    at_ms: int = NOW_MS,
    nonce: bytes = NONCE,
    node: str = ME,
    method: str = "GET",
    target: str = "/x?y=1",
) -> str:
    return rules.prove(keys, time_ms=at_ms, nonce=nonce, node=node, method=method, target=target)


def admitted(swarm: ClosedSwarm, proof: str, method: str = "GET", target: str = "/x?y=1") -> bool:
    return swarm.admits(make_mocked_request(method, target, headers={"Authorization": f"Bearer {proof}"}))


def test_a_proof_counts_once() -> None:
    swarm = closed()
    assert admitted(swarm, prove())
    assert not admitted(swarm, prove())
    assert admitted(swarm, prove(nonce=NONCE[::-1]))
    # The same proof at another time is another proof, and the nonce that was seen does not make it an old one.
    assert admitted(swarm, prove(at_ms=NOW_MS + 30_000))


def test_a_proof_for_whoever_answers_counts_when_the_key_was_not_known() -> None:
    swarm = closed()
    assert admitted(swarm, prove(node=""))
    assert not admitted(swarm, prove(node=""))


@pytest.mark.parametrize(
    "wrong",
    [
        {"node": OTHER},
        {"method": "POST"},
        {"target": "/x"},
        {"target": "/x?y=2"},
        {"target": "/"},
        {"keys": OTHERS["another secret"]},
        {"keys": OTHERS["another name"]},
        {"at_ms": NOW_MS - rules.MAX_SKEW_MS - 1},
        {"at_ms": NOW_MS + rules.MAX_SKEW_MS + 1},
        {"at_ms": 0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_proof_of_something_else_does_not_count(wrong: dict[str, Any]) -> None:
    assert not admitted(closed(), prove(**wrong))


def test_clocks_may_differ_a_little() -> None:
    for skew in (-rules.MAX_SKEW_MS, rules.MAX_SKEW_MS):
        assert admitted(closed(), prove(at_ms=NOW_MS + skew))


@given(junk=st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), max_size=200))
def test_junk_is_no_proof(junk: str) -> None:
    assert not admitted(closed(), junk)


@given(at=st.integers(0, 73), letter=st.sampled_from("AZaz09-_"))
def test_a_changed_letter_is_no_proof(at: int, letter: str) -> None:
    proof = prove()
    changed = proof[:at] + letter + proof[at + 1 :]
    with pytest.raises((Malformed, NotVerified, Stale)):
        if changed == proof:
            raise NotVerified
        rules.check_proof(KEYS, changed, now_ms=NOW_MS, own=ME, method="GET", target="/x?y=1")


def test_without_a_proof_nobody_is_admitted() -> None:
    assert not closed().admits(make_mocked_request("GET", "/swarm/1/ping"))
    assert OpenSwarm().admits(make_mocked_request("GET", "/swarm/1/ping"))


def test_two_parts_of_a_request_cannot_be_taken_for_each_other() -> None:
    assert prove(method="GET", target="/x") != prove(method="GET/", target="x")
    assert prove(node="ab", method="c") != prove(node="a", method="bc")


# -- nonces -------------------------------------------------------------------------------------------------------------


def proof_at(time_ms: int, number: int) -> rules.Proof:
    return rules.Proof(time_ms, number.to_bytes(rules.PROOF_NONCE, "big"))


def test_nonces_are_forgotten_with_their_time() -> None:
    seen = SeenNonces()
    for number in range(1000):
        now = NOW_MS + number * 1000
        assert seen.add(proof_at(now, number), now)
    kept = sum(len(nonces) for nonces in seen._slices.values())
    assert kept == seen._count <= 2 * rules.MAX_SKEW_MS / 1000


@given(
    said=st.lists(
        st.tuples(st.integers(-rules.MAX_SKEW_MS, rules.MAX_SKEW_MS), st.integers(0, 30), st.integers(-5000, 20_000)),
        max_size=200,
    )
)
def test_nothing_comes_twice_however_full_and_whatever_the_clock_does(said: list[tuple[int, int, int]]) -> None:
    seen, taken, now = SeenNonces(limit=8), set(), NOW_MS
    for skew, number, step in said:
        now += step
        proof = proof_at(now + skew, number)
        for again in (proof, *taken):
            if abs(again.time_ms - now) <= rules.MAX_SKEW_MS and seen.add(again, now):
                assert again not in taken
                taken = {*taken, again}
        assert seen._count <= 8


# -- the asking side ----------------------------------------------------------------------------------------------------


class Asked:
    """As much of an aiohttp request as a middleware may look at."""

    def __init__(self) -> None:
        self.method = "GET"
        self.url = URL("http://127.0.0.1:1/x?y=1")
        self.headers = CIMultiDict({ASKED: OTHER})


class Answered:
    status = 200


@pytest.mark.parametrize("swarm", [OpenSwarm(), closed()], ids=["open", "closed"])
async def test_whom_we_ask_does_not_leave_the_house(swarm: Membership) -> None:
    request = Asked()

    async def send(sent: Any) -> Any:
        assert ASKED not in sent.headers
        return Answered()

    await swarm.middleware(request, send)  # type: ignore[arg-type] # as much of a request as is looked at
    proof = request.headers.get(hdrs.AUTHORIZATION, "").removeprefix("Bearer ")
    assert admitted(closed(node=OTHER), proof) == isinstance(swarm, ClosedSwarm)
    assert not admitted(closed(node=ME), proof)


# -- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "secret", "culprit"),
    [
        ("lab", "", "swarm.secret"),
        ("", SECRET, "swarm.name"),
        ("x" * 65, SECRET, "swarm.name"),
        ("la\nb", SECRET, "swarm.name"),
        (" lab", SECRET, "swarm.name"),
        ("lab", "fifteen letters", "swarm.secret"),
        ("lab", "x" * 1025, "swarm.secret"),
        ("lab", SECRET + "\n", "swarm.secret"),
        ("lab", SECRET + "\x1b[2J", "swarm.secret"),
    ],
)
def test_a_name_or_secret_that_cannot_be_used(tmp_path: Path, name: str, secret: str, culprit: str) -> None:
    (tmp_path / "config.toml").write_text(f"[swarm]\nname = {json.dumps(name)}\nsecret = {json.dumps(secret)}\n")
    with pytest.raises(UsageError) as refused:
        load(tmp_path, {})
    assert refused.value.what == culprit
    assert not secret or secret not in str(refused.value)


@pytest.mark.parametrize("value", ["12345678901234567", "['correct horse battery']", "true"])
def test_a_secret_of_the_wrong_kind_is_not_repeated(tmp_path: Path, value: str) -> None:
    (tmp_path / "config.toml").write_text(f"[swarm]\nname = 'lab'\nsecret = {value}\n")
    with pytest.raises(UsageError, match=r"swarm\.secret must be text") as refused:
        load(tmp_path, {})
    assert "12345" not in str(refused.value) and "horse" not in str(refused.value)


def test_a_closed_swarm_from_the_settings(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f"[swarm]\nname = '{NAME}'\nsecret = '{SECRET}'\n")
    config = load(tmp_path, {})
    assert SECRET not in repr(config)
    swarm = membership(config.swarm.name, config.swarm.secret, node=ME, clock=lambda: 0)
    assert swarm.topic == KEYS.topic
    assert isinstance(membership("", "", node=ME, clock=lambda: 0), OpenSwarm)
    check("", "")


# -- moving -------------------------------------------------------------------------------------------------------------


async def test_who_moves_to_another_swarm_knows_nobody_there(tmp_path: Path) -> None:
    ledger = await LedgerThread.open(tmp_path / "ledger.db")
    try:
        swarm: Membership
        for swarm in (OpenSwarm(), closed(), OpenSwarm()):
            await settle(ledger, swarm)
            assert await ledger.call(Ledger.peers) == []
            assert json.loads(await ledger.call(Ledger.get_meta, "swarm.joined") or "[]") == []
            known = Peer(OTHER, None, Address(OTHER), 1, 2**53 - 1)
            await ledger.call(Ledger.save_peers, [known], [])
            await ledger.call(Ledger.set_meta, "swarm.joined", '["an address"]')
            await settle(ledger, swarm)
            assert len(await ledger.call(Ledger.peers)) == 1
            table = PeerTable(ledger, own=ME, clock=lambda: 0, standing=lambda key: None)
            await table.open()
            assert len(table.remembered()) == 1
    finally:
        await ledger.close()
