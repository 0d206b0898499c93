"""What this node says about itself, under sequence numbers never used before.

A change is said as the pages that changed; nothing but being alive is said as a beat (registry/announcement.py). The numbers
of an offer that move no question to another node, like tokens per second, are no change: they are said when the page is said
for another reason, or after `REFRESH` lifetimes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.ledger import LedgerThread
from registry import announcement as rules
from registry import paging
from registry.envelope import key_name, sign
from registry.records import Address, Announcement, Offer, SealKey
from registry.store import Ledger

_SEQUENCE = "announce.sequence"
FAREWELL_LIFETIME_S = 30
REFRESH = 3  # lifetimes after which a page is said again for its numbers alone
FRESH_S = 1.0  # how old our newest word may be when somebody asks for it
ASKED_AT_ONCE = 2  # pages that are said again at a time because somebody on pubsub asked
_RESERVED = 10_000  # sequence numbers written down at a time; ten seconds of the clock


@dataclass(frozen=True, slots=True)
class Card:
    """How this node is reached now: its libp2p peer id, its address, its key for sealed chat, and whether it carries for others."""

    peer_id: str | None
    address: Address
    seal_key: SealKey
    relay: bool = False


@dataclass(frozen=True, slots=True)
class _Page:
    """A page as it was signed last; `at` in unix seconds."""

    offers: tuple[Offer, ...]
    revision: int
    envelope: bytes
    at: float


class OwnPages:
    """`card` says how this node is reached, `offers` gives its offers, `clock` unix seconds."""

    def __init__(
        self,
        key: Ed25519PrivateKey,
        ledger: LedgerThread,
        *,
        card: Callable[[], Card],
        offers: Callable[[], Sequence[Offer]],
        clock: Callable[[], float],
    ) -> None:
        self.node = key_name(key)
        self.hello = True  # the next words ask to be answered
        self._key = key
        self._ledger = ledger
        self._card = card
        self._offers = offers
        self._clock = clock
        self._sequence = 0
        self._reserved = 0
        self._head: Announcement | None = None  # our newest word
        self._head_envelope = b""
        self._head_at = 0.0
        self._pages: list[_Page] = []
        self._unsaid: set[int] = set()  # pages that only those who asked have
        self._asked: dict[int, None] = {}  # pages that somebody on pubsub lacks
        self._head_unsaid = False  # it says something new, too
        self._outdated = True
        self._parted = False  # our last word is said
        self._composing = asyncio.Lock()

    async def open(self) -> None:
        self._sequence = self._reserved = int(await self._ledger.call(Ledger.get_meta, _SEQUENCE) or 0)

    @property
    def said(self) -> bool:
        """Whether anybody can have heard of us."""
        return self._head is not None and not self._parted

    def address(self) -> Address:
        """How to reach this node, every part of it that is on."""
        return self._card().address

    def outdate(self) -> None:
        """What we say may be different now."""
        self._outdated = True

    def ask_for(self, pages: Collection[int]) -> None:
        """Somebody on pubsub lacks these pages: they are said again with our next words, a few at a time."""
        self._asked |= dict.fromkeys(page for page in pages if page < len(self._pages))

    async def news(self, lifetime_s: float, heard: int, wanted: Collection[int]) -> list[bytes]:
        """What somebody lacks who heard our word number `heard` (0: none) and asks for the `wanted` pages, as things are now,
        whether it has been said yet or not: our newest word first. After the farewell there is nothing else: the peer API and
        exchanges that began before outlive it, and whoever hears of our models from them would think that we are back.
        """
        async with self._composing:
            if self._parted:
                return [self._head_envelope]
            stale = self._head is None or self._clock() - self._head_at >= FRESH_S
            if stale or self._outdated:
                await self._compose(lifetime_s, beat=stale)
            pages = [
                page.envelope
                for number, page in sorted(enumerate(self._pages), key=_served_first)
                if page.revision > heard or number in wanted
            ]
            return list(dict.fromkeys([self._head_envelope, *pages]))

    async def renew(self, lifetime_s: float, *, beat: bool = True) -> list[bytes]:
        """What is to be said to everybody, good for `lifetime_s` seconds: what changed, else a beat.

        Without `beat` nothing is said when nothing changed.
        """
        async with self._composing:
            await self._compose(lifetime_s, beat=beat)
            unsaid = [page for number, page in enumerate(self._pages) if number in self._unsaid]
            words = [page.envelope for page in sorted(unsaid, key=lambda page: page.revision)]
            if beat or self._head_unsaid:
                words.append(self._head_envelope)
            self._unsaid.clear()
            self._head_unsaid = False
            if beat:
                words += self._asked_pages()
            return list(dict.fromkeys(words))

    async def farewell(self) -> list[bytes]:
        """The word that says that we offer nothing any more."""
        async with self._composing:
            self._pages = []
            self._unsaid.clear()
            await self._sign(self._base(FAREWELL_LIFETIME_S))
            self._parted = True
            return [self._head_envelope]

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _compose(self, lifetime_s: float, *, beat: bool) -> None:
        """Sign the pages that changed; if none did, and one is due or the card changed, a beat."""
        self._outdated = False
        dealt = paging.assign([_cids(page) for page in self._pages], self._offers())
        base = self._base(lifetime_s)
        long_ago = self._clock() - REFRESH * lifetime_s
        changed = [
            number for number, offers in enumerate(dealt) if self._changed(number, offers, long_ago)
        ]
        before = [page.revision for page in self._pages]
        del self._pages[len(dealt) :]
        new_card = self._head is None or _card_of(self._head) != _card_of(base)
        if changed:
            first = self._next_sequence()
            numbers = {page: first + place for place, page in enumerate(changed)}
            revisions = tuple(numbers.get(page) or before[page] for page in range(len(dealt)))
            for page in changed:
                word = replace(
                    base, offers=tuple(dealt[page]), page=page, revisions=revisions, sequence=numbers[page]
                )
                envelope = await self._sign(word)
                self._pages[page : page + 1] = [_Page(word.offers, word.sequence, envelope, self._head_at)]
            self._unsaid.update(changed)
        elif beat or new_card or len(before) != len(dealt):
            await self._sign(base)
            self._head_unsaid |= new_card or len(before) != len(dealt)

    def _changed(self, number: int, offers: Sequence[Offer], long_ago: float) -> bool:
        """Whether a page is to be said again, now that these are its offers."""
        if number >= len(self._pages):
            return True
        page = self._pages[number]
        if [paging.matters(offer) for offer in offers] != [paging.matters(one) for one in page.offers]:
            return True
        return page.at <= long_ago and tuple(offers) != page.offers

    def _base(self, lifetime_s: float) -> Announcement:
        """A beat as things are now."""
        card = self._card()
        now = self._clock()
        return rules.beat(
            Announcement(
                node=self.node,
                peer_id=card.peer_id,
                sequence=self._next_sequence(),
                expires=int(now + min(rules.MAX_LIFETIME, lifetime_s)),
                address=card.address,
                seal_keys=(card.seal_key,),
                revisions=tuple(page.revision for page in self._pages),
                hello=self.hello,
                relay=card.relay,
            )
        )

    def _next_sequence(self) -> int:
        return max(int(self._clock() * 1000), self._sequence + 1)

    async def _sign(self, word: Announcement) -> bytes:
        """Make `word` our newest one."""
        self._sequence = word.sequence
        if self._sequence > self._reserved:
            # Written before anybody hears the number, or a crash could make us use it again.
            self._reserved = self._sequence + _RESERVED
            await self._ledger.call(Ledger.set_meta, _SEQUENCE, str(self._reserved))
        envelope = sign(rules.PAYLOAD_TYPE, rules.build(word), self._key)
        self._head, self._head_envelope, self._head_at = word, envelope, self._clock()
        return envelope

    def _asked_pages(self) -> list[bytes]:
        asked = list(self._asked)[:ASKED_AT_ONCE]
        for page in asked:
            del self._asked[page]
        return [self._pages[page].envelope for page in asked if page < len(self._pages)]


def _cids(page: _Page) -> list[str]:
    return [offer.cid for offer in page.offers]


def _card_of(word: Announcement) -> tuple[object, ...]:
    return (word.peer_id, word.address, word.seal_keys, word.relay)


def _served_first(numbered: tuple[int, _Page]) -> tuple[bool, int]:
    number, page = numbered
    return not any(offer.serving for offer in page.offers), number
