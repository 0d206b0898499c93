"""What the index finds is enough: a question is answered as if every offer had been looked at."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import codes, routing, upstream
from registry.catalogue import Catalogue
from registry.cid import leaf_cid
from registry.errors import AmbiguousRef, Malformed
from registry.records import Offer

CIDS = [leaf_cid(b"%d" % number) for number in range(4)]
INFOHASHES = [f"{number:064x}" for number in range(3)]
NAMES = ["one", "two", "abcdefg"]
NODES = [f"ed25519:{number:064x}" for number in range(5)]


def offers(node: st.SearchStrategy[str]) -> st.SearchStrategy[Offer]:
    return st.builds(
        Offer, node, st.sampled_from(CIDS), st.sampled_from([None, "ab" * 20]), st.sampled_from([None, *INFOHASHES]),
        st.sampled_from([None, *CIDS]), st.sampled_from(NAMES), st.integers(1, 3), st.booleans(), seeders=st.integers(0, 2),
    ) | st.builds(upstream.offer, node, st.sampled_from(NAMES), st.just(1))  # fmt: skip


def questions() -> list[str]:
    full = [codes.code_of_cid(cid) for cid in CIDS] + [codes.code_of_infohash_v2(infohash) for infohash in INFOHASHES]
    magnets = [f"magnet:?xt=urn:btmh:1220{infohash}" for infohash in INFOHASHES] + [f"magnet:?xt=urn:btih:{'ab' * 20}"]
    return [*full, *(f"#{code[:7]}" for code in full), *CIDS, *NAMES, *INFOHASHES, *magnets]


QUESTIONS = questions()


def answer(given: list[Offer], wanted: str, local: list[Offer]) -> object:
    try:
        found = routing.candidates(given, wanted=wanted, local=local)
    except AmbiguousRef as error:
        return error.candidates
    # Under which of its CIDs a node offers one model twice is left to chance.
    return {(choice.offer.node, choice.offer.serving, choice.local) for choice in found}


@given(st.lists(st.tuples(st.sampled_from(NODES), st.integers(0, 2), st.lists(offers(st.just("")), max_size=4)), max_size=12), st.data())
def test_a_question_is_answered_as_by_all_offers(puts: list[tuple[str, int, list[Offer]]], data: st.DataObject) -> None:
    catalogue, pages = Catalogue(), {}
    for node, page, said in puts:
        own = {one.cid: replace(one, node=node) for one in said}
        pages[node, page] = list(own.values())
        catalogue.put((node, page), pages[node, page])
        if data.draw(st.integers(0, 4)) == 0:
            catalogue.take((node, page))
            del pages[node, page]
    assert catalogue.count == sum(map(len, pages.values()))
    everything = {(one.node, one.cid): one for key in sorted(pages, key=lambda key: key[1]) for one in pages[key]}
    offered = catalogue.all()
    assert {(one.node, one.cid): one for one in offered} == everything and len(offered) == len(everything)
    local = data.draw(st.lists(offers(st.just("ed25519:me")), max_size=2, unique_by=lambda one: one.cid))
    for wanted in data.draw(st.lists(st.sampled_from(QUESTIONS), min_size=4, max_size=4)):
        assert answer(catalogue.about(wanted, local), wanted, local) == answer(offered, wanted, local), wanted


def test_nothing_is_left_of_what_was_taken_out() -> None:
    catalogue, chance = Catalogue(), random.Random(1)
    for number in range(300):
        node, cid = chance.choice(NODES), chance.choice(CIDS)
        catalogue.put((node, number % 7), [Offer(node, cid, "ab" * 20, INFOHASHES[number % 3], cid, "m", 1, True)])
    for node in NODES:
        for page in range(7):
            catalogue.take((node, page))
    assert (catalogue.count, catalogue.all(), catalogue._codes, catalogue._by_cid) == (0, [], [], {})
    assert catalogue._by_infohash_v2._cids == {} and catalogue._by_name._cids == {}


def test_what_does_not_parse() -> None:
    with pytest.raises(Malformed):
        Catalogue().about("")
    assert Catalogue().about("hf:a/b") == []
