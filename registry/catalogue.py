"""The offers of many nodes, found by what a person asks for without looking at all of them.

What is asked for is a code, a CID, a magnet or a name (registry/refs.py). `about` gives every offer that the choice between
models and nodes can depend on (registry/routing.py): those of every CID that the question can mean, and those of every CID
that shares a v2 infohash with one of them. It may give more, never less.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from registry.codes import code_of_cid, code_of_infohash_v2, codes_of
from registry.records import Offer
from registry.refs import CidRef, CodeRef, MagnetRef, NameRef, Ref, parse_ref

PageKey = tuple[str, int]  # a node and the number of its page


class _Index:
    """From a value to the CIDs that are offered with it."""

    def __init__(self) -> None:
        self._cids: dict[str, Counter[str]] = {}

    def add(self, value: str, cid: str) -> bool:
        """Whether the value is new."""
        known = self._cids.get(value)
        if known is None:
            self._cids[value] = Counter((cid,))
            return True
        known[cid] += 1
        return False

    def remove(self, value: str, cid: str) -> bool:
        """Whether the value is gone."""
        known = self._cids[value]
        known[cid] -= 1
        if not known[cid]:
            del known[cid]
        if not known:
            del self._cids[value]
        return not known

    def cids(self, value: str) -> Iterable[str]:
        return self._cids.get(value, ())


class Catalogue:
    """Pages of offers, put in and taken out whole. `generation` grows with every change."""

    def __init__(self) -> None:
        self.generation = 0
        self.count = 0  # offers, over all pages
        self._pages: dict[PageKey, Sequence[Offer]] = {}
        self._by_cid: dict[str, dict[PageKey, Offer]] = {}
        self._by_infohash = _Index()
        self._by_infohash_v2 = _Index()
        self._by_manifest = _Index()
        self._by_name = _Index()
        self._codes: list[tuple[str, str]] = []  # sorted; a full code, and the CID or v2 infohash behind it

    def put(self, key: PageKey, offers: Sequence[Offer]) -> None:
        """The page at `key`, in the place of what stood there."""
        self.take(key)
        self.generation += 1
        self._pages[key] = offers
        self.count += len(offers)
        for offer in offers:
            holders = self._by_cid.get(offer.cid)
            if holders is None:
                holders = self._by_cid[offer.cid] = {}
                insort(self._codes, (code_of_cid(offer.cid), offer.cid))
            holders[key] = offer
            for index, value in self._terms(offer):
                if index.add(value, offer.cid) and index is self._by_infohash_v2:
                    insort(self._codes, (code_of_infohash_v2(value), value))

    def take(self, key: PageKey) -> None:
        """Let a page go; one that is not there is no error."""
        offers = self._pages.pop(key, None)
        if offers is None:
            return
        self.generation += 1
        self.count -= len(offers)
        for offer in offers:
            holders = self._by_cid[offer.cid]
            del holders[key]
            if not holders:
                del self._by_cid[offer.cid]
                self._drop_code(code_of_cid(offer.cid), offer.cid)
            for index, value in self._terms(offer):
                if index.remove(value, offer.cid) and index is self._by_infohash_v2:
                    self._drop_code(code_of_infohash_v2(value), value)

    def all(self) -> list[Offer]:
        """Every offer. A model that stands on two pages of a node is there once, as the later page has it."""
        found: dict[tuple[str, str], Offer] = {}
        for key in sorted(self._pages, key=lambda key: key[1]):
            found |= {(offer.node, offer.cid): offer for offer in self._pages[key]}
        return list(found.values())

    def about(self, wanted: str, local: Iterable[Offer] = ()) -> list[Offer]:
        """The offers that matter for `wanted`, `local` being this node's own. Raises `Malformed` when it does not parse."""
        ref = parse_ref(wanted)
        own = list(local)
        cids = dict.fromkeys(self._meant(ref))
        cids |= dict.fromkeys(offer.cid for offer in own if _can_mean(ref, offer))
        infohashes = {offer.infohash_v2 for offer in own if offer.cid in cids}
        infohashes |= {offer.infohash_v2 for cid in cids for offer in self._holders(cid)}
        for infohash in infohashes:
            cids |= dict.fromkeys(self._by_infohash_v2.cids(infohash or ""))
        return [offer for cid in cids for offer in self._holders(cid)]

    def pages_with(self, code: str) -> Iterator[PageKey]:
        """The pages with an offer of a model whose code begins with `code`; a page may come twice."""
        for cid in self._with_code(code):
            yield from self._by_cid.get(cid, ())

    def _holders(self, cid: str) -> Iterable[Offer]:
        """The offers of one CID, one for each node: as its last page has it."""
        holders = self._by_cid.get(cid, {})
        if len({node for node, _ in holders}) == len(holders):
            return holders.values()
        return {key[0]: holders[key] for key in sorted(holders, key=lambda key: key[1])}.values()

    def _meant(self, ref: Ref) -> Iterator[str]:
        """The CIDs that `ref` can mean."""
        match ref:
            case CodeRef(code=code, name=name):
                yield from self._with_code(code)
                yield from self._by_name.cids(name or "")
            case CidRef(cid=cid):
                yield cid
                yield from self._by_manifest.cids(cid)
            case MagnetRef(infohash=v1, infohash_v2=v2):
                yield from self._by_infohash.cids(v1 or "")
                yield from self._by_infohash_v2.cids(v2 or "")
            case NameRef(name=name):
                yield from self._by_name.cids(name)
                # A bare v2 infohash has the form of a name.
                yield from self._by_infohash_v2.cids(name.lower())

    def _with_code(self, code: str) -> Iterator[str]:
        for at in range(bisect_left(self._codes, (code, "")), len(self._codes)):
            full, value = self._codes[at]
            if not full.startswith(code):
                return
            if value in self._by_cid:
                yield value
            else:
                yield from self._by_infohash_v2.cids(value)

    def _terms(self, offer: Offer) -> Iterator[tuple[_Index, str]]:
        yield self._by_name, offer.name
        if offer.infohash:
            yield self._by_infohash, offer.infohash
        if offer.infohash_v2:
            yield self._by_infohash_v2, offer.infohash_v2
        if offer.manifest:
            yield self._by_manifest, offer.manifest

    def _drop_code(self, code: str, value: str) -> None:
        del self._codes[bisect_left(self._codes, (code, value))]


def _can_mean(ref: Ref, offer: Offer) -> bool:
    match ref:
        case CodeRef(code=code, name=name):
            full = codes_of(offer.cid, offer.infohash_v2)
            return offer.name == name or any(one.startswith(code) for one in full)
        case CidRef(cid=cid):
            return cid in (offer.cid, offer.manifest)
        case MagnetRef(infohash=v1, infohash_v2=v2):
            return bool((v1 and offer.infohash == v1) or (v2 and offer.infohash_v2 == v2))
        case NameRef(name=name):
            return offer.name == name or offer.infohash_v2 == name.lower()
        case _:
            return False
