"""Which model stands on which page: what changes, what stays, and that every page fits."""

from __future__ import annotations

import random
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import announcement as rules
from registry.cid import Cid
from registry.envelope import key_name, sign
from registry.paging import assign, matters
from registry.records import Address, Announcement, Offer
from tests.unit import strategies
from tests.unit.strategies import PEER_ID

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NODE = key_name(KEY)


def cid(number: int) -> str:
    return Cid("raw", number.to_bytes(32, "big")).canonical


def offer(number: int, *, serving: bool = False, name: str = "a model") -> Offer:
    return Offer(NODE, cid(number), "ab" * 20, "cd" * 32, cid(number), name, 12345, serving, 4, 4096, 3, 5, 12.5)


def cids(pages: list[list[Offer]]) -> list[list[str]]:
    return [[offer.cid for offer in page] for page in pages]


def differing(before: list[list[str]], after: list[list[str]]) -> int:
    both = [*before, *[[]] * len(after)], [*after, *[[]] * len(before)]
    return sum(one != other for one, other in zip(*both, strict=False))


def test_served_models_come_first() -> None:
    pages = assign((), [offer(number, serving=number % 5 == 0) for number in range(100)])
    flat = [one.serving for page in pages for one in page]
    assert flat == sorted(flat, reverse=True) and sum(flat) == 20


def test_what_comes_or_goes_touches_one_page() -> None:
    offers = [offer(number) for number in range(200)]
    before = cids(assign((), offers))
    assert len(before) > 10
    assert differing(before, cids(assign(before, offers))) == 0
    for number in range(200):
        assert differing(before, cids(assign(before, offers[:number] + offers[number + 1 :]))) == 1
    assert differing(before, cids(assign(before, [*offers, offer(200, serving=True)]))) == 1
    # The order in which they are listed does not matter.
    assert sorted(map(sorted, cids(assign(before, offers[::-1])))) == sorted(map(sorted, before))


def test_pages_that_are_nearly_empty_are_dealt_out_anew() -> None:
    before = cids(assign((), [offer(number) for number in range(200)]))
    few = [offer(number) for number in range(0, 200, 40)]
    assert len(assign(before, few)) == 1
    assert assign(before, []) == []


def test_pages_are_not_endless_and_what_is_served_has_a_place() -> None:
    held = [offer(number) for number in range(2000)]
    pages = assign((), held)
    assert len(pages) == rules.MAX_PAGES
    served = offer(5000, serving=True)
    assert served in assign(cids(pages), [*held, served])[0]


@settings(max_examples=25)  # each builds some hundred pages
@given(st.data(), st.randoms())
def test_pages_fit_and_lose_nothing(data: st.DataObject, chance: random.Random) -> None:
    """Whatever models come and go, with the longest names and the longest head."""
    template = data.draw(strategies.offers(NODE))
    name = data.draw(st.sampled_from(["q", "\U0001f600" * 120, "n" * 120]))
    many = tuple(f"/dns4/{'a' * 60}.example.org/tcp/{i}/p2p/{PEER_ID}" for i in range(1, 60))
    address = Address(NODE, many, tuple(f"h{i}:1" for i in range(20)), tuple(f"http://h{i}" for i in range(20)))
    base = rules.beat(Announcement(NODE, PEER_ID, 1 << 52, 1 << 33, address, ()))
    pages: list[list[str]] = []
    for _ in range(4):
        numbers = chance.sample(range(150), chance.randrange(150))
        offers = [replace(template, cid=cid(number), name=name, serving=number % 3 == 0) for number in numbers]
        dealt = assign(pages, offers)
        assert sorted(one.cid for page in dealt for one in page) == sorted(cid(number) for number in numbers)
        for number, page in enumerate(dealt):
            revisions = tuple(base.sequence if place == number else 1 + place for place in range(len(dealt)))
            said = replace(base, offers=tuple(page), page=number, revisions=revisions)
            envelope = sign(rules.PAYLOAD_TYPE, rules.build(said), KEY)
            assert len(envelope) <= rules.MAX_ENVELOPE
            assert rules.read(envelope) == said
        pages = cids(dealt)


def test_what_matters_for_a_question() -> None:
    one = offer(1)
    for same in (replace(one, free_slots=1), replace(one, peers=9), replace(one, tokens_per_second=99.0), replace(one, seeders=2)):
        assert matters(same) == matters(one)
    for other in (replace(one, free_slots=0), replace(one, serving=True), replace(one, seeders=4), replace(one, context_length=8192)):
        assert matters(other) != matters(one)
