"""Which of a node's models stands on which of its pages.

A model keeps its page for as long as it is offered, so that one that comes or goes changes one page and no other. Newcomers
take the first page with room, those that are served before the others. Pages at the end that are empty go; one in the middle
waits to be filled again. When less than half of the pages would do, or a model has no place, all are dealt out anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from registry.announcement import MAX_OFFERS, MAX_PAGES, offer_size, room
from registry.records import Offer


def assign(before: Sequence[Iterable[str]], offers: Iterable[Offer]) -> list[list[Offer]]:
    """The offers of each page. `before` has the CIDs of the models that stand on each page now.

    Of two offers of one model the last counts. What `MAX_PAGES` pages have no room for is left out: what is not served first.
    """
    by_cid = {offer.cid: offer for offer in offers}
    pages, left_out = _fill(before, by_cid)
    if before and (left_out or len(pages) > 2):
        anew, _ = _fill((), by_cid)
        if left_out or 2 * len(anew) < len(pages):
            return anew
    return pages


def matters(offer: Offer) -> Offer:
    """The offer without what moves no question to another node when it changes: that is said with the next page.

    Of free slots it matters whether there are any, of seeders their order of magnitude, to the base 2.
    """
    slots, seeders = min(offer.free_slots, 1), offer.seeders.bit_length()
    return replace(offer, free_slots=slots, seeders=seeders, peers=0, tokens_per_second=0.0)


def _fill(before: Sequence[Iterable[str]], by_cid: dict[str, Offer]) -> tuple[list[list[Offer]], bool]:
    """The pages, and whether a model was left out."""
    space = room()
    sizes = {cid: offer_size(offer) for cid, offer in by_cid.items()}
    pages: list[list[Offer]] = []
    left: list[int] = []  # bytes, on each page
    placed: set[str] = set()

    def put(page: int, offer: Offer) -> bool:
        size = sizes[offer.cid]
        if size > left[page] or len(pages[page]) == MAX_OFFERS:
            return False
        pages[page].append(offer)
        left[page] -= size
        placed.add(offer.cid)
        return True

    for number, cids in enumerate(before):
        pages.append([])
        left.append(space)
        for cid in cids:
            if cid in by_cid and cid not in placed:
                put(number, by_cid[cid])
    newcomers = [offer for cid, offer in by_cid.items() if cid not in placed]
    first_with_room = 0
    for offer in sorted(newcomers, key=lambda offer: not offer.serving):
        while first_with_room < len(pages) and left[first_with_room] < _LEAST:
            first_with_room += 1
        if any(put(page, offer) for page in range(first_with_room, len(pages))):
            continue
        if len(pages) == MAX_PAGES:
            return _trimmed(pages), True
        pages.append([])
        left.append(space)
        put(len(pages) - 1, offer)
    return _trimmed(pages), False


_LEAST = 100  # bytes; no offer is smaller


def _trimmed(pages: list[list[Offer]]) -> list[list[Offer]]:
    while pages and not pages[-1]:
        pages.pop()
    return pages
