"""What a node says of itself: a change as one page, being alive as a beat, and nothing twice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.gossip.pages import ASKED_AT_ONCE, REFRESH, Card, OwnPages
from daemon.ledger import LedgerThread
from registry import announcement as rules
from registry.cid import leaf_cid
from registry.envelope import key_name
from registry.records import Address, Announcement, Offer, SealKey

NOW = 1_800_000_000.0
LIFETIME_S = 39


class Node:
    """A node with `count` models, whose clock stands still until it is moved."""

    def __init__(self, ledger: LedgerThread, count: int) -> None:
        key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
        self.key = key_name(key)
        self.now = NOW
        self.offers = [self.offer(number) for number in range(count)]
        self.card = Card(None, Address(self.key, http=("http://198.51.100.1:8788",)), SealKey(1, "ab" * 32, 1 << 31))
        self.pages = OwnPages(key, ledger, card=lambda: self.card, offers=self.now_offered, clock=lambda: self.now)

    def offer(self, number: int) -> Offer:
        cid = leaf_cid(b"%d" % number)
        return Offer(self.key, cid, "ab" * 20, "cd" * 32, cid, f"model {number}", 1000, False, seeders=1)

    def change(self, number: int, **fields: object) -> None:
        self.offers[number] = replace(self.offers[number], **fields)  # type: ignore[arg-type]  # any of its fields

    def now_offered(self) -> list[Offer]:
        return list(self.offers)

    async def says(self, *, beat: bool = False, after_s: float = 1.0) -> list[Announcement]:
        self.now += after_s
        return read(await self.pages.renew(LIFETIME_S, beat=beat))


def read(envelopes: list[bytes]) -> list[Announcement]:
    return [rules.read(envelope) for envelope in envelopes]


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[LedgerThread]:
    ledger = await LedgerThread.open(tmp_path / "ledger.db")
    yield ledger
    await ledger.close()


async def test_a_change_is_one_page_and_being_alive_a_beat(ledger: LedgerThread) -> None:
    node = Node(ledger, 50)
    first = await node.says()
    assert len(first) > 3 and [word.page for word in first] == list(range(len(first)))
    assert [word.sequence for word in first] == list(first[0].revisions)
    (beat,) = await node.says(beat=True)
    assert beat.page is None and beat.revisions == first[0].revisions and beat.sequence > first[-1].sequence
    node.change(30, serving=True)
    (page,) = await node.says()
    before = next(word for word in first if node.offers[30].cid in [offer.cid for offer in word.offers])
    assert page.page == before.page and [offer.cid for offer in page.offers] == [offer.cid for offer in before.offers]
    assert [a for a, b in zip(page.revisions, beat.revisions, strict=True) if a != b] == [page.sequence]
    node.offers.append(node.offer(99))
    (page,) = await node.says(beat=True)
    assert node.offers[-1] in page.offers


async def test_where_nothing_changed_nothing_is_said(ledger: LedgerThread) -> None:
    node = Node(ledger, 3)
    await node.says()
    assert await node.says() == []
    node.change(0, peers=7, tokens_per_second=3.0)
    assert await node.says() == []


async def test_numbers_that_move_no_question_are_said_now_and_then(ledger: LedgerThread) -> None:
    node = Node(ledger, 3)
    await node.says()
    said = []
    for beats in range(40):
        node.change(0, peers=beats, seeders=1, tokens_per_second=float(beats))
        said += await node.says(beat=True, after_s=12)
    pages = [word for word in said if word.page is not None]
    assert len(said) == 40 and 1 <= len(pages) <= 40 * 12 / (REFRESH * LIFETIME_S)
    node.change(0, free_slots=1)
    assert len(await node.says()) == 1


async def test_a_new_address_is_said_at_once(ledger: LedgerThread) -> None:
    node = Node(ledger, 1)
    await node.says()
    node.card = replace(node.card, relay=True)
    (beat,) = await node.says()
    assert beat.page is None and beat.relay


async def test_what_only_one_was_told_is_said_to_everybody(ledger: LedgerThread) -> None:
    node = Node(ledger, 1)
    await node.says()
    node.change(0, serving=True)
    node.pages.outdate()
    told = read(await node.pages.news(LIFETIME_S, 0, ()))
    assert [offer.serving for word in told for offer in word.offers] == [True]
    assert [word.page for word in await node.says()] == [0]
    assert await node.says() == []


async def test_who_asks_is_given_what_is_missing(ledger: LedgerThread) -> None:
    node = Node(ledger, 50)
    words = await node.says()
    everything = read(await node.pages.news(LIFETIME_S, 0, ()))
    assert {word.page for word in everything} == {word.page for word in words}
    newest = everything[0].sequence
    assert len(read(await node.pages.news(LIFETIME_S, newest, ()))) == 1
    head, page = read(await node.pages.news(LIFETIME_S, newest, (2, 60)))
    assert head.sequence >= newest and (page.page, page.sequence) == (2, head.revisions[2])
    # Whoever asks hears a fresh word, however long ago the last one was said.
    node.now += 30
    assert read(await node.pages.news(LIFETIME_S, 0, ()))[0].expires == int(node.now + LIFETIME_S)


async def test_questions_on_pubsub_cost_a_few_pages_a_heartbeat(ledger: LedgerThread) -> None:
    """Whoever forges them."""
    node = Node(ledger, 50)
    count = len(await node.says())
    for _ in range(100):
        node.pages.ask_for(range(64))
    assert await node.says() == []
    again = []
    for _ in range(count):
        words = await node.says(beat=True)
        assert len(words) <= 1 + ASKED_AT_ONCE
        again += [word.page for word in words if word.page is not None]
    assert again == list(range(count))


async def test_a_farewell_names_no_page(ledger: LedgerThread) -> None:
    node = Node(ledger, 50)
    words = await node.says()
    last = await node.pages.farewell()
    (word,) = read(last)
    assert word.revisions == () and word.sequence > words[-1].sequence and not node.pages.said
    node.now += 60  # an exchange that began before, or somebody who asks the peer API to the end
    node.pages.outdate()
    assert await node.pages.news(LIFETIME_S, 0, [0]) == last


async def test_sequence_numbers_are_never_used_again(ledger: LedgerThread) -> None:
    """After a restart at any moment, with the clock set back."""
    last = 0
    for _ in range(5):
        node = Node(ledger, 30)
        node.now = NOW - 3600
        await node.pages.open()
        for _ in range(7):
            words = await node.says(beat=True)
            sequences = [word.sequence for word in words]
            assert sequences == sorted(sequences) and sequences[0] > last
            last = sequences[-1]
