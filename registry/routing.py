"""Which models the swarm has, and who answers a question. Pure: offers in, an order out.

The order is the user's rule: serving first, then most seeders; ties by free slots, then by measured latency and success,
then by node, so that equal knowledge gives equal choices. Without a code: the model with the most nodes, then the most
seeders, among those that somebody serves; after its nodes comes the local serving model with the most seeders.
What this node holds and does not serve it can load for its own user, which is better than no answer and worse than any other.

Models are told apart by their CID, which every offer has. Offers under two CIDs are one model when they agree on the v2
infohash - but an infohash counts for a CID only when most of the nodes that offer the CID say so (or this node knows), so
that one liar cannot tie two models together. A model behind an upstream has none: its CID proves what it is (upstream.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar

from registry import upstream
from registry.codes import codes_of, short
from registry.errors import AmbiguousRef, Malformed, shown
from registry.records import Offer
from registry.refs import CidRef, CodeRef, MagnetRef, NameRef, parse_ref

T = TypeVar("T")

_UNMEASURED_S = 1.0  # what a node that was never asked is taken to need


@dataclass(frozen=True, slots=True)
class Stats:
    """What asking a node was like: seconds to the first token (None: never measured), answers that ended well and that did not."""

    latency_s: float | None = None
    successes: int = 0
    failures: int = 0

    @property
    def cost(self) -> float:
        """Expected seconds to an answer: the latency over the success rate, which starts at one half (rule of succession)."""
        latency = _UNMEASURED_S if self.latency_s is None else self.latency_s
        return latency * (self.successes + self.failures + 2) / (self.successes + 1)


@dataclass(frozen=True, slots=True)
class SwarmModel:
    """One model as the swarm knows it. `code` is the short one, `codes` all full ones; `offers` has at most one per node."""

    name: str
    size: int
    code: str
    codes: tuple[str, ...]
    cid: str
    infohash: str | None
    infohash_v2: str | None
    manifest: str | None
    serving: bool
    nodes: int  # distinct nodes that hold it, this one included
    seeders: int
    peers: int
    local: bool
    offers: tuple[Offer, ...]
    upstream: bool = False  # there is no file: nodes answer for it from elsewhere
    manifest_infohash: str | None = None  # of the torrent of `manifest`


@dataclass(frozen=True, slots=True)
class Choice:
    """One node that could answer. Of those whose offer is not `serving`, only this node can: by loading what it holds."""

    offer: Offer
    local: bool


def aggregate(offers: Iterable[Offer], local: Iterable[Offer] = ()) -> list[SwarmModel]:
    """The models behind `offers` (of other nodes) and `local` (this node's own, known to be true).

    Those that somebody serves come first, then those with the most nodes, then with the most seeders.
    """
    own = {offer.cid: offer for offer in local}
    offered = [*offers, *own.values()]
    without_file = {offer.cid for offer in offered if upstream.proven(offer)}
    by_cid: dict[str, dict[str, Offer]] = {}
    for offer in offered:
        if offer.cid in without_file and not upstream.proven(offer):
            continue
        per_node = by_cid.setdefault(offer.cid, {})
        if offer.node not in per_node or offer.serving:
            per_node[offer.node] = offer
    groups: dict[str, list[Offer]] = {}
    for cid, per_node in by_cid.items():
        infohash = own[cid].infohash_v2 if cid in own else _agreed(offer.infohash_v2 for offer in per_node.values())
        groups.setdefault(infohash or cid, []).extend(per_node.values())
    models = [_model(group, own, without_file) for group in groups.values()]
    return sorted(models, key=lambda m: (not m.serving, -m.nodes, -m.seeders, m.name, m.cid))


def resolve(wanted: str, models: Iterable[SwarmModel]) -> SwarmModel | None:
    """The model that a code or prefix, CID, magnet or name means, or None. Raises `AmbiguousRef` or `Malformed`."""
    models = list(models)
    match parse_ref(wanted):
        case CodeRef(code=code, name=name):
            found = [m for m in models if any(full.startswith(code) for full in m.codes)]
            found = found or [m for m in models if name is not None and m.name == name]
        case CidRef(cid=cid):
            found = [m for m in models if cid in (m.cid, m.manifest)]
        case MagnetRef(infohash=v1, infohash_v2=v2):
            found = [m for m in models if (v1 and m.infohash == v1) or (v2 and m.infohash_v2 == v2)]
        case NameRef(name=name):
            found = [m for m in models if m.name == name]
        case _:
            raise Malformed(f"{shown(wanted)} names no model of the swarm; use a code, a CID or a name")
    if len(found) > 1:
        raise AmbiguousRef(wanted, tuple(sorted(model.codes[0] for model in found)))
    return found[0] if found else None


def candidates(
    offers: Iterable[Offer], *, wanted: str | None, local: Iterable[Offer] = (), stats: Mapping[str, Stats] | None = None
) -> list[Choice]:
    """Whom to ask, the best first; empty when nobody is known. `local` are this node's own offers, `stats` is by node.

    With `wanted` (see `resolve`, whose errors it raises) the nodes that serve the model and after them those that only hold
    it; without, only nodes that serve, and when there is none, this node with the model of its own that has the most seeders.
    """
    own = list(local)
    models = aggregate(offers, own)
    nodes = {offer.node for offer in own}
    measured = stats or {}
    if wanted is not None:
        model = resolve(wanted, models)
        return _ordered(model.offers if model else (), nodes, measured)
    # `aggregate` has the rule's order already.
    chosen = _ordered([offer for offer in models[0].offers if offer.serving] if models else (), nodes, measured)
    fallback = max((m for m in models if any(o.node in nodes and o.serving for o in m.offers)), key=lambda m: m.seeders, default=None)
    if fallback is not None:
        chosen += [Choice(offer, True) for offer in fallback.offers if offer.node in nodes]
    if not chosen:
        held = max((model for model in models if model.local), key=lambda m: m.seeders, default=None)
        chosen = [Choice(offer, True) for offer in held.offers if offer.node in nodes] if held is not None else []
    return list(dict.fromkeys(chosen))


def _ordered(offers: Sequence[Offer], own: set[str], stats: Mapping[str, Stats]) -> list[Choice]:
    costs = {node: _finite(stats[node].cost) for node in stats} | dict.fromkeys(own, 0.0)
    unmeasured = Stats().cost

    def rank(offer: Offer) -> tuple[Any, ...]:
        cost = costs.get(offer.node, unmeasured)
        return (not offer.serving, -offer.seeders, -offer.free_slots, cost, offer.node, offer.cid)

    return [Choice(offer, offer.node in own) for offer in sorted(offers, key=rank)]


def _finite(cost: float) -> float:
    return cost if math.isfinite(cost) else math.inf


def _model(offers: Sequence[Offer], own: Mapping[str, Offer], without_file: Set[str]) -> SwarmModel:
    """The group as one model: what this node knows, else what most nodes say, else the smallest of what they say."""
    ours = [offer for offer in offers if own.get(offer.cid) is offer]
    voters = ours or offers
    per_node: dict[str, Offer] = {}
    for offer in offers:
        if offer.node not in per_node or offer.serving:
            per_node[offer.node] = offer
    cid = _most((offer.cid for offer in voters), "")
    # An infohash counts with the CID it came with, see above.
    infohash_v2 = _most((offer.infohash_v2 for offer in voters if offer.cid == cid and offer.infohash_v2), None)
    manifest = _most((offer.manifest for offer in offers if offer.cid == cid and offer.manifest), None)
    full = codes_of(cid, infohash_v2)
    return SwarmModel(
        name=_most((offer.name for offer in voters), ""),
        size=_most((offer.size for offer in voters if offer.cid == cid), 0),
        code=short(full[0]),
        codes=full,
        cid=cid,
        infohash=_most((offer.infohash for offer in voters if offer.cid == cid and offer.infohash), None),
        infohash_v2=infohash_v2,
        manifest=manifest,
        serving=any(offer.serving for offer in offers),
        nodes=len(per_node),
        seeders=0 if cid in without_file else max(len(per_node), *(offer.seeders for offer in offers)),
        peers=max(offer.peers for offer in offers),
        local=bool(ours),
        offers=tuple(per_node.values()),
        upstream=cid in without_file,
        manifest_infohash=_most(
            (
                offer.manifest_infohash
                for offer in voters
                if offer.manifest == manifest and offer.manifest_infohash
            ),
            None,
        ),
    )


def _agreed(values: Iterable[str | None]) -> str | None:
    """The value that more nodes give than any other; None on a tie."""
    ranked = Counter(value for value in values if value is not None).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def _most(values: Iterable[Any], default: T) -> Any | T:
    """The most common value, the smallest of several that are equally common."""
    counted = Counter(values)
    return min(counted, key=lambda value: (-counted[value], value)) if counted else default
