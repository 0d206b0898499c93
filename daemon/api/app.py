"""The local HTTP API: which route is whose. `open_api` (server.py) runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict

from aiohttp import web

from daemon import privacy
from daemon.api import chat, guard, metrics, models, swarm, views
from daemon.api.limits import LIMITS, Limits
from daemon.api.openai import models as openai_models
from daemon.api.openai import routes as openai
from daemon.api.services import SERVICES, Services, services
from daemon.api.sessions import SESSIONS, Sessions
from daemon.api.tally import DELAY, TALLY, LoopDelay, Tally
from daemon.supervise import Supervisor


def create_app(services: Services, token: str, sessions: Sessions, limits: Limits | None = None) -> web.Application:
    """The application. `token` is the bearer token; the port that `Host` must name is the one a request comes in on."""
    app = web.Application(middlewares=[guard.answer_errors, guard.gate(token)])
    app[SERVICES] = services
    app[LIMITS] = limits or Limits()
    app[guard.REQUESTS] = Counter()
    app[SESSIONS] = sessions
    app[TALLY] = Tally()
    app[DELAY] = LoopDelay()
    app.cleanup_ctx.append(_background)
    app.add_routes(
        [
            web.get("/healthz", healthz, allow_head=False),
            web.get("/metrics", metrics.metrics, allow_head=False),
            web.get("/api/status", status, allow_head=False),
            web.get("/api/privacy", tell_privacy, allow_head=False),
            web.post("/api/stop", stop),
            web.get("/v1/models", openai_models.list_models, allow_head=False),
            web.get("/v1/models/{id:.+}", openai_models.get_model, allow_head=False),
            web.post("/v1/chat/completions", openai.chat_completions),
            web.post("/v1/completions", openai.completions),
            web.post("/v1/embeddings", openai.embeddings),
            web.get("/api/ai/list", models.list_models, allow_head=False),
            web.post("/api/ai/publish", models.publish),
            web.post("/api/ai/download", models.download),
            web.get("/api/transfers", models.list_transfers, allow_head=False),
            web.get("/api/transfers/{id}", models.get_transfer, allow_head=False),
            web.delete("/api/transfers/{id}", models.cancel_transfer),
            web.get("/api/transfers/{id}/events", models.transfer_events, allow_head=False),
            web.post("/api/ai/serve", models.serve),
            web.delete("/api/ai/serve", models.stop_serving),
            web.delete("/api/ai/model", models.remove),
            web.post("/api/ai/chat", chat.whole_chat),
            web.post("/api/ai/sessions", chat.open_session),
            web.get("/api/ai/sessions", chat.list_sessions, allow_head=False),
            web.get("/api/ai/sessions/{id}", chat.get_session, allow_head=False),
            web.delete("/api/ai/sessions/{id}", chat.end_session),
            web.get("/api/ai/verify", models.verify, allow_head=False),
            web.post("/api/fsck", models.fsck),
            web.get("/api/trust", models.list_keys, allow_head=False),
            web.post("/api/trust", models.set_key),
            web.delete("/api/trust", models.remove_key),
            web.get("/api/swarm/models", swarm.list_models, allow_head=False),
            web.get("/api/swarm/peers", swarm.list_peers, allow_head=False),
            web.post("/api/swarm/register", swarm.register),
            web.post("/api/swarm/join", swarm.join),
            web.post("/api/swarm/relay/chat", chat.relay_chat),
        ]
    )
    return app


async def _background(app: web.Application) -> AsyncIterator[None]:
    """The loops of the API itself."""
    supervisor = Supervisor()
    supervisor.run("sessions", app[SESSIONS].sweep, restart=True)
    supervisor.run("loop delay", app[DELAY].watch, restart=True)
    try:
        yield
    finally:
        await supervisor.close()


async def healthz(request: web.Request) -> web.StreamResponse:
    return web.json_response({"status": "ok"})


async def status(request: web.Request) -> web.StreamResponse:
    return web.json_response(await services(request).status())


async def tell_privacy(request: web.Request) -> web.StreamResponse:
    known = services(request)
    facts = views.privacy_facts(await known.status(), len(known.upstreams.served()))
    return web.json_response([asdict(told) for told in privacy.exposures(known.config, facts)])


async def stop(request: web.Request) -> web.StreamResponse:
    services(request).stop()
    return web.json_response({"state": "stopping"}, status=202)
