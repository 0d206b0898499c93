"""`GET /v1/models`: everything that can be asked. Each entry says more of its model than OpenAI's four fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from daemon.api import views
from daemon.api.services import Services, services
from daemon.errors import Ambiguous, NotFound
from registry import codes, routing
from registry.errors import AmbiguousRef, Malformed
from registry.routing import SwarmModel


async def list_models(request: web.Request) -> web.StreamResponse:
    known = services(request)
    return web.json_response({"object": "list", "data": [_shown(known, model) for model in askable(known)]})


async def get_model(request: web.Request) -> web.StreamResponse:
    known = services(request)
    return web.json_response(_shown(known, resolve(askable(known), request.match_info["id"])))


def askable(known: Services) -> list[SwarmModel]:
    """What somebody serves now, and what is here: that is loaded when it is asked."""
    return [model for model in views.swarm_models(known) if model.serving or model.local]


def resolve(models: Sequence[SwarmModel], wanted: str) -> SwarmModel:
    """The one model that a code (with or without `#`), CID or name means. Raises `NotFound` or `Ambiguous`."""
    try:
        found = routing.resolve(wanted, models)
    except Malformed:
        found = None  # a client asks for ids of other services, such as owner/model: not here, and no error of form
    except AmbiguousRef as error:
        told = ", ".join(codes.told_apart(error.candidates))
        raise Ambiguous("model", f"{wanted[:80]!a} means several: {told}", "use a longer code or the CID") from error
    if found is None:
        raise NotFound("model", f"nobody serves {wanted[:80]!a}", "GET /v1/models lists what can be asked")
    return found


def _shown(known: Services, model: SwarmModel) -> dict[str, Any]:
    local = next((mine for mine in known.library.models() if mine.identity.cid == model.cid), None)
    created = 0 if local is None else views.seconds(local.added)
    return {"id": model.code, "object": "model", "created": created, "owned_by": "swarmctl", **views.swarm_model(known, model)}
