"""What this node says about itself: its signed pages, under sequence numbers never used before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.ledger import LedgerThread
from registry import announcement as rules
from registry.envelope import key_name, sign
from registry.records import Address, Announcement, Offer, SealKey
from registry.store import Ledger

_SEQUENCE = "announce.sequence"
FAREWELL_LIFETIME_S = 30


@dataclass(frozen=True, slots=True)
class Card:
    """How this node is reached now: its libp2p peer id, its address, its key for sealed chat, and whether it carries for others."""

    peer_id: str | None
    address: Address
    seal_key: SealKey
    relay: bool = False


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
        self.hello = True  # the next pages ask to be answered
        self._key = key
        self._ledger = ledger
        self._card = card
        self._offers = offers
        self._clock = clock
        self._sequence = 0
        self._pages: list[bytes] = []
        self._outdated = True
        self._composing = asyncio.Lock()

    async def open(self) -> None:
        self._sequence = int(await self._ledger.call(Ledger.get_meta, _SEQUENCE) or 0)

    @property
    def said(self) -> bool:
        """Whether anybody can have heard of us."""
        return bool(self._pages)

    def address(self) -> Address:
        """How to reach this node, every part of it that is on."""
        return self._card().address

    def outdate(self) -> None:
        """What we say is different now."""
        self._outdated = True

    async def current(self, lifetime_s: float) -> list[bytes]:
        """Our pages as things are now, whether they have been said yet or not."""
        if not self._pages or self._outdated:
            return await self.renew(lifetime_s)
        return self._pages

    async def renew(self, lifetime_s: float) -> list[bytes]:
        """Our pages anew, good for `lifetime_s` seconds."""
        self._outdated = False
        return await self._compose(self._offers(), lifetime_s)

    async def farewell(self) -> list[bytes]:
        """The page that says that we offer nothing any more."""
        pages = await self._compose([], FAREWELL_LIFETIME_S)
        self._pages = []
        return pages

    async def _compose(self, offers: Sequence[Offer], lifetime_s: float) -> list[bytes]:
        async with self._composing:
            now = self._clock()
            card = self._card()
            base = Announcement(
                node=self.node,
                peer_id=card.peer_id,
                sequence=max(int(now * 1000), self._sequence + 1),
                expires=int(now + min(rules.MAX_LIFETIME, lifetime_s)),
                address=card.address,
                seal_keys=(card.seal_key,),
                offers=(),
                hello=self.hello,
                relay=card.relay,
            )
            pages = rules.pages(base, offers)
            self._sequence = pages[-1].sequence
            # Written before anybody hears the number, or a crash could make us use it again.
            await self._ledger.call(Ledger.set_meta, _SEQUENCE, str(self._sequence))
            self._pages = [sign(rules.PAYLOAD_TYPE, rules.build(page), self._key) for page in pages]
            return self._pages
