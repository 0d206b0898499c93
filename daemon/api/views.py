"""How things look in JSON: one function per thing, pure, and the same fields wherever the thing occurs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from daemon.api.services import KeyEntry, Services, Transfer
from daemon.engine.interface import Served, Usage
from registry import codes, refs
from registry.address import format_address
from registry.records import Model, Offer, Peer

T = TypeVar("T", str, int)


@dataclass(frozen=True, slots=True)
class Reach:
    """What is known of one CID beyond this machine: offers by other nodes, counted."""

    nodes: int
    seeders: int  # the most that any node sees, and never fewer than the nodes that hold it
    peers: int
    serving: bool


def reach(offers: Iterable[Offer], cid: str, *, local: bool, serving: bool) -> Reach:
    mine = [offer for offer in offers if offer.cid == cid]
    nodes = len({offer.node for offer in mine}) + local
    return Reach(
        nodes=nodes,
        seeders=max([nodes, *(offer.seeders for offer in mine)]),
        peers=max([0, *(offer.peers for offer in mine)]),
        serving=serving or any(offer.serving for offer in mine),
    )


def code_of(cid: str, infohash_v2: str | None) -> str:
    """The 7-character code, as it is shown."""
    return codes.short(codes.codes_of(cid, infohash_v2)[0])


def model(services: Services, model: Model) -> dict[str, Any]:
    """A model of this node. `local` is false once it was removed."""
    identity = model.identity
    serving = identity.blake3 in services.serving.served()
    known = reach(services.peers.offers(), identity.cid, local=True, serving=serving)
    return {
        "name": model.name,
        "size": identity.size,
        "code": code_of(identity.cid, identity.infohash_v2),
        "cid": identity.cid,
        "infohash": identity.infohash,
        "infohash_v2": identity.infohash_v2,
        "magnet": refs.magnet(identity.infohash, identity.infohash_v2, model.name, identity.size),
        "manifest": model.manifest,
        "blake3": identity.blake3,
        "sha256": identity.sha256,
        "path": str(services.library.path(model)),
        "signed_by": model.signed_by,
        "trust": services.library.trust(model),
        "serving": serving,
        "seeders": known.seeders,
        "peers": known.peers,
        "local": True,
        "state": "ready" if model.quarantined is None else "quarantined",
        "reason": model.quarantined,
        "added": model.added,
    }


def served(view: Mapping[str, Any], worker: Served) -> dict[str, Any]:
    return {**view, "context": worker.context, "slots": worker.slots, "free_slots": worker.free_slots}


def transfer(services: Services, item: Transfer) -> dict[str, Any]:
    return {
        "id": item.id,
        "kind": item.kind,
        "ref": item.ref,
        "state": item.state,
        "name": item.name,
        "size": item.size,
        "received": item.received,
        "sources": {source: item.sources.get(source, 0) for source in ("ipfs", "bittorrent", "https", "disk")},
        "rate": round(item.rate),
        "peers": item.peers,
        "notes": list(item.notes),
        "error": None if item.error is None else item.error.as_json()["error"],
        "model": None if item.model is None else model(services, item.model),
        "started": item.started,
        "finished": item.finished,
    }


def swarm_models(services: Services) -> list[dict[str, Any]]:
    """Every model that this node or another offers, the most widely held first."""
    local = {m.identity.cid: m for m in services.library.models() if m.quarantined is None}
    offers: dict[str, list[Offer]] = {cid: [] for cid in local}
    for offer in services.peers.offers():
        offers.setdefault(offer.cid, []).append(offer)
    entries = [_swarm_model(services, cid, found, local.get(cid)) for cid, found in offers.items()]
    return sorted(entries, key=lambda e: (not e["serving"], -e["nodes"], -e["seeders"], e["name"], e["cid"]))


def _swarm_model(services: Services, cid: str, offers: Sequence[Offer], own: Model | None) -> dict[str, Any]:
    """What is said about one CID: by this node where it holds the model, else by most of those who offer it."""
    known = reach(offers, cid, local=own is not None, serving=own is not None and own.identity.blake3 in services.serving.served())
    name = own.name if own else most(offer.name for offer in offers) or ""
    size = own.identity.size if own else most(offer.size for offer in offers) or 0
    infohash = own.identity.infohash if own else most(offer.infohash for offer in offers)
    infohash_v2 = own.identity.infohash_v2 if own else most(offer.infohash_v2 for offer in offers)
    return {
        "name": name,
        "size": size,
        "code": code_of(cid, infohash_v2),
        "cid": cid,
        "infohash": infohash,
        "infohash_v2": infohash_v2,
        "magnet": refs.magnet(infohash, infohash_v2, name, size) if infohash or infohash_v2 else None,
        "manifest": own.manifest if own else most(offer.manifest for offer in offers),
        "serving": known.serving,
        "nodes": known.nodes,
        "seeders": known.seeders,
        "peers": known.peers,
        "local": own is not None,
    }


def most(values: Iterable[T | None]) -> T | None:
    """The value that most nodes give; the smallest of those where several are given equally often."""
    counted = Counter(value for value in values if value is not None)
    return min(counted, key=lambda value: (-counted[value], value)) if counted else None


def peer(services: Services, item: Peer) -> dict[str, Any]:
    offers = [offer for offer in services.peers.offers() if offer.node == item.node]
    return {
        "node": item.node,
        "peer_id": item.peer_id,
        "addresses": [format_address(item.address)],
        "models": len(offers),
        "serving": sorted(code_of(offer.cid, offer.infohash_v2) for offer in offers if offer.serving),
        "expires": iso(item.expires),
    }


def key(entry: KeyEntry) -> dict[str, Any]:
    return {"key": entry.key, "state": entry.state, "name": entry.name}


def usage(count: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": count.prompt_tokens,
        "completion_tokens": count.completion_tokens,
        "total_tokens": count.prompt_tokens + count.completion_tokens,
    }


def iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def seconds(iso_text: str) -> int:
    return int(datetime.fromisoformat(iso_text).timestamp())
