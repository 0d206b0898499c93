"""What is heard: refused with the reason, and what many wrong times say about our own clock."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.gossip.ear import Ear
from daemon.gossip.peers import PeerTable
from daemon.ledger import LedgerThread
from registry import announcement as rules
from registry.envelope import key_name, sign
from registry.errors import Malformed, Misdated, NotVerified, Repeated, Stale
from registry.records import Address, Announcement

NOW = 1_800_000_000
DAY = 86_400
OWN = "ed25519:" + "ab" * 32


class Heard:
    """An ear, and what it calls."""

    def __init__(self, table: PeerTable) -> None:
        self.greeted = 0
        self.passed_on: list[bytes] = []
        self.ear = Ear(table, greet=self._greet, pass_on=self.passed_on.append, behind=lambda: None)

    def _greet(self) -> None:
        self.greeted += 1


@pytest.fixture
async def heard(tmp_path: Path) -> AsyncIterator[Heard]:
    ledger = await LedgerThread.open(tmp_path / "ledger.db")
    table = PeerTable(ledger, own=OWN, clock=lambda: NOW, standing=lambda key: None)
    await table.open()
    yield Heard(table)
    await table.close()
    await ledger.close()


class Speaker:
    """Another node, whose clock is off by so many seconds."""

    def __init__(self, off: int = 0) -> None:
        self._key = Ed25519PrivateKey.generate()
        self._off = off
        self._sequence = 0

    def word(self) -> bytes:
        self._sequence += 1
        node = key_name(self._key)
        said = Announcement(node, None, self._sequence, NOW + self._off + 60, Address(node), ())
        return sign(rules.PAYLOAD_TYPE, rules.build(said), self._key)


async def refused(heard: Heard, word: bytes, error: type[Exception]) -> str:
    with pytest.raises(error) as raised:
        await heard.ear.receive(word)
    return str(raised.value)


@pytest.mark.parametrize("off", [DAY, -DAY])
async def test_a_word_with_the_wrong_time_is_refused_with_the_cause_named(heard: Heard, off: int) -> None:
    """F18."""
    why = await refused(heard, Speaker(off).word(), Misdated)
    assert "the clock of one of the nodes is off" in why
    assert (heard.ear.heard, heard.greeted) == (set(), 0)


@pytest.mark.parametrize("off", [DAY, -DAY])
async def test_when_most_others_have_a_wrong_time_it_is_ours(heard: Heard, off: int) -> None:
    for number in range(3):
        assert not heard.ear.clock_is_off, number
        await refused(heard, Speaker(off).word(), Misdated)
    assert heard.ear.clock_is_off


async def test_one_node_with_a_wrong_clock_among_others_says_nothing_about_ours(heard: Heard) -> None:
    right, other, wrong = Speaker(), Speaker(), Speaker(DAY)
    for _ in range(50):
        await heard.ear.receive(right.word())
        await heard.ear.receive(other.word())
        await refused(heard, wrong.word(), Misdated)
        assert not heard.ear.clock_is_off


async def test_a_clock_that_was_set_right_is_right_again(heard: Heard) -> None:
    for _ in range(100):
        await refused(heard, Speaker(DAY).word(), Misdated)
    assert heard.ear.clock_is_off
    right = Speaker()
    for _ in range(32):
        await heard.ear.receive(right.word())
    assert not heard.ear.clock_is_off


async def test_other_refusals_say_nothing_about_the_clock(heard: Heard) -> None:
    word = Speaker().word()
    await heard.ear.receive(word)
    for _ in range(10):
        await refused(heard, word, Repeated)
        await refused(heard, Speaker().word().replace(b"ODAw", b"ODEw"), NotVerified)  # another time than was signed
        await refused(heard, b"noise", Malformed)
        await refused(heard, Speaker(-120).word(), Stale)
    assert not heard.ear.clock_is_off


async def test_a_wrong_word_does_not_stop_the_others(heard: Heard) -> None:
    right = Speaker()
    word = right.word()
    found = await heard.ear.take_in([Speaker(DAY).word(), b"noise", word, word])
    assert isinstance(found[0], str) and "clock" in found[0]
    assert isinstance(found[1], str)
    assert isinstance(found[2], Announcement)
    assert isinstance(found[3], str) and "again" in found[3]
    # A node without IPFS: whom only pubsub reaches hears of it from us, once.
    assert heard.passed_on == [word]


async def test_the_same_refusal_again_and_again_is_one_line_in_the_log(heard: Heard, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "daemon.gossip.ear")
    for _ in range(20):
        await refused(heard, b"noise", Malformed)
    assert len(caplog.records) == 1


async def test_whoever_is_new_or_was_forgotten_is_greeted(heard: Heard) -> None:
    speaker = Speaker()
    for _ in range(3):
        await heard.ear.receive(speaker.word())
    assert heard.greeted == 1
    heard.ear.forget()
    await heard.ear.receive(speaker.word())
    assert heard.greeted == 2
    with pytest.raises((Malformed, NotVerified)):
        await heard.ear.receive(b"")
