"""What is held of one other node: its newest word, and its pages."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from registry import announcement as rules
from registry.records import Offer, Peer


class Page:
    __slots__ = ("envelope", "expires", "look_at", "offers", "revision", "serving")

    def __init__(
        self, revision: int, expires: int, offers: tuple[Offer, ...], envelope: bytes
    ) -> None:
        self.revision = revision
        self.expires = expires
        self.offers = offers
        self.envelope = envelope
        self.serving = any(offer.serving for offer in offers)
        self.look_at = expires  # when it is looked at again, see `_sweep`


class Entry:
    """`head` is its newest word, None until it was heard since the start."""

    __slots__ = ("head", "heard", "pages", "peer")

    def __init__(self, peer: Peer, head: bytes | None, heard: float) -> None:
        self.peer = peer
        self.head = head
        self.heard = heard
        self.pages: dict[int, Page] = {}

    def missing(self) -> tuple[int, ...]:
        held = {number: page.revision for number, page in self.pages.items()}
        return rules.missing(self.peer, held)

    def named(self) -> Iterator[tuple[int, Page]]:
        """The pages that the newest word names, those with a model that is served first."""
        revisions = self.peer.revisions
        for number, page in sorted(self.pages.items(), key=_served_first):
            if number < len(revisions) and revisions[number] == page.revision:
                yield number, page

    def lacked(self, head: bytes, heard: int, wanted: Collection[int]) -> list[bytes]:
        """What somebody lacks of this node who heard its word number `heard` and asks for the `wanted` pages."""
        words = [head]  # small, and without it no page is believed
        for number, page in self.named():
            if page.revision > heard or number in wanted:
                words.append(page.envelope)
        return list(dict.fromkeys(words))


def _served_first(numbered: tuple[int, Page]) -> tuple[bool, int]:
    number, page = numbered
    return not page.serving, number
