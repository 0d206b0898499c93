"""`GET /metrics`: a few gauges in Prometheus' text format (version 0.0.4), each counted when it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from aiohttp import web

from daemon.api.guard import REQUESTS
from daemon.api.services import services
from daemon.api.sessions import SESSIONS
from daemon.api.tally import DELAY, TALLY


async def metrics(request: web.Request) -> web.StreamResponse:
    known = services(request)
    transfers = known.transfers.all()
    sources: Counter[str] = Counter(dict.fromkeys(("ipfs", "bittorrent", "https", "disk"), 0))
    for item in transfers:
        sources.update(dict(item.sources))
    workers, tally, delay = known.serving.served().values(), request.app[TALLY], request.app[DELAY]
    requests = {f'{{route="{route}",status="{status}"}}': count for (route, status), count in request.app[REQUESTS].items()}
    families = [
        _family("models", "gauge", "models in the local store", {"": len(known.library.models())}),
        _family("served_models", "gauge", "models that answer for everybody", {"": len(workers)}),
        _family("free_slots", "gauge", "chats that could start now", {"": sum(worker.free_slots for worker in workers)}),
        _family("peers", "gauge", "nodes that are known and not expired", {"": len(known.peers.peers())}),
        _family("transfers", "gauge", "transfers that are remembered", _labelled("state", Counter(item.state for item in transfers))),
        _family("transfer_bytes", "gauge", "bytes of the transfers that are remembered", _labelled("source", sources)),
        _family("http_requests_total", "counter", "answered requests of this API", requests),
        _family("answers_waiting", "gauge", "answers of this API whose first piece has not come", {"": tally.waiting}),
        _family("answers_running", "gauge", "answers of this API that are coming", {"": tally.running}),
        _family("answers_total", "counter", "answers of this API that have ended", _labelled("outcome", tally.ended)),
        _family("answer_tokens_total", "counter", "tokens of the answers of this API", _labelled("kind", tally.tokens)),
        _family("sessions", "gauge", "conversations that are remembered", {"": len(request.app[SESSIONS].all())}),
        _family("loop_delay_p99_seconds", "gauge", "how late the event loop wakes, over the last minute", {"": round(delay.p99(), 6)}),
    ]
    return web.Response(body="".join(families).encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def _family(name: str, kind: str, help_text: str, values: Mapping[str, float]) -> str:
    lines = [f"# HELP swarmctl_{name} {help_text}", f"# TYPE swarmctl_{name} {kind}"]
    lines += [f"swarmctl_{name}{label} {value}" for label, value in sorted(values.items())]
    return "\n".join(lines) + "\n"


def _labelled(label: str, counts: Mapping[str, int]) -> dict[str, int]:
    return {f'{{{label}="{key}"}}': value for key, value in counts.items()}
