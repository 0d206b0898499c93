"""How things look in JSON: one function per thing, pure, and the same fields wherever the thing occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from daemon.api.services import KeyEntry, Services, Transfer, Upstream
from daemon.api.via import relays_of
from daemon.engine.interface import Served, Usage
from daemon.privacy import Facts
from registry import codes, refs, routing
from registry.address import format_address
from registry.records import Model, Offer, Peer
from registry.routing import SwarmModel


def code_of(cid: str, infohash_v2: str | None) -> str:
    """The 7-character code, as it is shown."""
    return codes.short(codes.codes_of(cid, infohash_v2)[0])


def model(services: Services, model: Model) -> dict[str, Any]:
    """A model of this node. `local` is false once it was removed."""
    identity = model.identity
    known = next((entry for entry in swarm_models(services) if entry.cid == identity.cid), None)
    return {
        "name": model.name,
        "size": identity.size,
        "code": code_of(identity.cid, identity.infohash_v2),
        "cid": identity.cid,
        "infohash": identity.infohash,
        "infohash_v2": identity.infohash_v2,
        "magnet": refs.magnet(
            identity.infohash,
            identity.infohash_v2,
            model.name,
            identity.size,
            services.library.manifest_infohash(model.manifest),
        ),
        "manifest": model.manifest,
        "blake3": identity.blake3,
        "sha256": identity.sha256,
        "path": str(services.library.path(model)),
        "signed_by": model.signed_by,
        "trust": services.library.trust(model),
        "serving": identity.blake3 in services.serving.served(),
        "seeders": known.seeders if known is not None else 0,
        "peers": known.peers if known is not None else 0,
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


def swarm_models(services: Services) -> list[SwarmModel]:
    """Every model that this node or another offers: served ones first, then the most widely held."""
    return routing.aggregate(services.peers.offers(), services.own_offers())


def swarm_model(services: Services, known: SwarmModel) -> dict[str, Any]:
    """A model of the swarm. Its magnet names the manifest where that is here: only its bytes tell its torrent."""
    infohash, infohash_v2 = known.infohash, known.infohash_v2
    return {
        "name": known.name,
        "size": known.size,
        "code": known.code,
        "cid": known.cid,
        "infohash": infohash,
        "infohash_v2": infohash_v2,
        "magnet": _magnet(services, known) if infohash or infohash_v2 else None,
        "manifest": known.manifest,
        "serving": known.serving,
        "nodes": known.nodes,
        "seeders": known.seeders,
        "peers": known.peers,
        "local": known.local,
        "upstream": known.upstream,
    }


def _magnet(services: Services, known: SwarmModel) -> str:
    manifest = services.library.manifest_infohash(known.manifest)
    return refs.magnet(known.infohash, known.infohash_v2, known.name, known.size, manifest)


def upstream(services: Services, served: Upstream) -> dict[str, Any]:
    """A model of another server that is served here; as any model of the swarm, with its limits."""
    [known] = (model for model in swarm_models(services) if model.cid == served.offer.cid)
    return {**swarm_model(services, known), "context": served.offer.context_length, "slots": served.slots, "free_slots": served.free_slots}


def peers(services: Services, items: Sequence[Peer]) -> list[dict[str, Any]]:
    """Other nodes. The offers of all are looked through once, however many nodes there are."""
    by_node: dict[str, list[Offer]] = {item.node: [] for item in items}
    for offer in services.peers.offers():
        if offer.node in by_node:
            by_node[offer.node].append(offer)
    return [_peer(services, item, by_node[item.node]) for item in items]


def _peer(services: Services, item: Peer, offers: Sequence[Offer]) -> dict[str, Any]:
    """`seen`: when it was heard last, `relays` carry for it, `relay`: it carries for others, `via`: through whom it was reached."""
    heard = services.peers.heard(item.node)
    return {
        "node": item.node,
        "peer_id": item.peer_id,
        "addresses": [format_address(item.address)],
        "models": len(offers),
        "serving": sorted(code_of(offer.cid, offer.infohash_v2) for offer in offers if offer.serving),
        "expires": iso(item.expires),
        "seen": None if heard is None else iso(int(heard)),
        "relays": relays_of(item),
        "relay": item.relay,
        "via": services.reached_via(item.node),
    }


def privacy_facts(status: Mapping[str, Any], upstreams: int) -> Facts:
    """What privacy asks of `GET /api/status`; `upstreams`: served models of other servers."""
    return Facts(
        models=status["models"],
        serving=len(status["serving"]),
        upstreams=upstreams,
        relays=len(status["relays"]),
        relaying=status["relaying"]["enabled"],
        closed=status["swarm"]["closed"],
    )


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
