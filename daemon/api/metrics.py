"""`GET /metrics`: a few gauges in Prometheus' text format (version 0.0.4), each counted when it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from aiohttp import web

from daemon.api.guard import REQUESTS
from daemon.api.services import services


async def metrics(request: web.Request) -> web.StreamResponse:
    known = services(request)
    transfers = known.transfers.all()
    sources: Counter[str] = Counter(dict.fromkeys(("ipfs", "bittorrent", "https", "disk"), 0))
    for item in transfers:
        sources.update(dict(item.sources))
    workers = known.serving.served().values()
    families = [
        _family("models", "gauge", "models in the local store", {"": len(known.library.models())}),
        _family("served_models", "gauge", "models that are loaded and answer", {"": len(workers)}),
        _family("free_slots", "gauge", "chats that could start now", {"": sum(worker.free_slots for worker in workers)}),
        _family("peers", "gauge", "nodes that are known and not expired", {"": len(known.peers.peers())}),
        _family("transfers", "gauge", "transfers that are remembered", _labelled("state", Counter(item.state for item in transfers))),
        _family("transfer_bytes", "gauge", "bytes of the transfers that are remembered", _labelled("source", sources)),
        _family("http_requests_total", "counter", "answered requests of this API", _labelled("status", request.app[REQUESTS])),
    ]
    return web.Response(body="".join(families).encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def _family(name: str, kind: str, help_text: str, values: Mapping[str, int]) -> str:
    lines = [f"# HELP swarmctl_{name} {help_text}", f"# TYPE swarmctl_{name} {kind}"]
    lines += [f"swarmctl_{name}{label} {value}" for label, value in sorted(values.items())]
    return "\n".join(lines) + "\n"


def _labelled(label: str, counts: Mapping[str, int] | Mapping[int, int]) -> dict[str, int]:
    return {f'{{{label}="{key}"}}': value for key, value in counts.items()}
