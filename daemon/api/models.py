"""Routes of the local models and of what brings them: list, publish, download, serve, remove, verify, trust."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

from daemon.api import body, sse, upstreams, views
from daemon.api.body import TEXT, Fields
from daemon.api.services import Services, Transfer, services
from daemon.config import LONGEST_KEEP_ALIVE
from daemon.engine.interface import ServeOptions
from daemon.errors import Ambiguous, NotFound, Unserved, UsageError
from registry.records import Model


async def list_models(request: web.Request) -> web.StreamResponse:
    known = services(request)
    return web.json_response([views.model(known, model) for model in known.library.models()])


async def publish(request: web.Request) -> web.StreamResponse:
    fields = await body.fields(request)
    path, name, license_, source = _path(fields), fields.text("name"), fields.text("license"), fields.text("source")
    fields.done()
    known = services(request)
    transfer = known.publish(path, name=name, license=license_, source=source)
    if "text/event-stream" in request.headers.get("Accept", ""):
        return await sse.stream(request, _events(known, transfer.id))
    return web.json_response(views.model(known, await _outcome(known, transfer)), status=201)


async def download(request: web.Request) -> web.StreamResponse:
    fields = await body.fields(request)
    given = [ref for name in ("ref", "url", "magnetUri") if (ref := fields.text(name)) is not None]
    fields.done()
    if len(given) != 1:
        raise UsageError("request", "needs exactly one of ref, url and magnetUri", body.HINT)
    known = services(request)
    upstreams.refuse(known, given[0])
    return web.json_response(views.transfer(known, known.pull(given[0])), status=202)


async def list_transfers(request: web.Request) -> web.StreamResponse:
    known = services(request)
    return web.json_response([views.transfer(known, item) for item in known.transfers.all()])


async def get_transfer(request: web.Request) -> web.StreamResponse:
    known = services(request)
    return web.json_response(views.transfer(known, known.transfers.get(request.match_info["id"])))


async def cancel_transfer(request: web.Request) -> web.StreamResponse:
    known = services(request)
    await known.transfers.cancel(request.match_info["id"])
    return web.json_response(views.transfer(known, known.transfers.get(request.match_info["id"])))


async def transfer_events(request: web.Request) -> web.StreamResponse:
    known = services(request)
    known.transfers.get(request.match_info["id"])
    return await sse.stream(request, _events(known, request.match_info["id"]))


async def serve(request: web.Request) -> web.StreamResponse:
    fields, known = await body.fields(request), services(request)
    elsewhere = fields.take("upstream")
    if elsewhere is not None:
        return web.json_response(await upstreams.serve(known, elsewhere, fields))
    wanted = fields.required_text("modelId")
    options = ServeOptions(
        context=fields.integer("contextSize", 64, 2**24),
        threads=fields.integer("threads", 1, 1024),
        gpu_layers=fields.integer("gpuLayers", -1, 10_000),
        slots=fields.integer("slots", 1, 256),
        batch=fields.integer("batch", 1, 2**20),
        keep_alive=fields.number("keepAlive", -1, LONGEST_KEEP_ALIVE),
    )
    fields.done()
    model = _local(known, wanted)
    worker = await known.serving.serve(model, options)
    return web.json_response(views.served(views.model(known, model), worker))


async def stop_serving(request: web.Request) -> web.StreamResponse:
    known, wanted = services(request), _query(request, "modelId")
    elsewhere = known.upstreams.find(wanted)
    try:
        model = known.library.find(wanted)
    except (NotFound, UsageError):  # what another server calls a model may be no name here
        if elsewhere is None:
            raise
        return web.json_response(await upstreams.stop(known, elsewhere))
    if elsewhere is not None:
        raise Ambiguous(wanted, "means a model of this node and one of another server", "use its code")
    await known.serving.stop(model)
    return web.json_response(views.model(known, model))


async def remove(request: web.Request) -> web.StreamResponse:
    known = services(request)
    model = _local(known, _query(request, "modelId"))
    before = views.model(known, model)
    await known.serving.stop(model)
    await known.library.remove(model)
    return web.json_response({**before, "serving": False, "local": False})


async def verify(request: web.Request) -> web.StreamResponse:
    known = services(request)
    model = await known.library.check(_local(known, _query(request, "modelId")))
    return web.json_response({**views.model(known, model), "verified": model.quarantined is None})


async def fsck(request: web.Request) -> web.StreamResponse:
    known = services(request)
    checked = [await known.library.check(model) for model in list(known.library.models())]
    return web.json_response([views.model(known, model) for model in checked])


async def list_keys(request: web.Request) -> web.StreamResponse:
    return web.json_response([views.key(entry) for entry in services(request).trust.entries()])


async def set_key(request: web.Request) -> web.StreamResponse:
    fields = await body.fields(request)
    key, state, name = fields.required_text("key"), fields.required_text("state"), fields.text("name")
    fields.done()
    return web.json_response(views.key(await services(request).trust.set(key, state, name or "")))


async def remove_key(request: web.Request) -> web.StreamResponse:
    return web.json_response(views.key(await services(request).trust.remove(_query(request, "key"))))


def _local(known: Services, wanted: str) -> Model:
    """The model of the library that `wanted` means. Raises `NotFound`, `Ambiguous` or `UsageError`."""
    try:
        return known.library.find(wanted)
    except NotFound:
        upstreams.refuse(known, wanted)
        raise


def _path(fields: Fields) -> Path:
    path = Path(fields.required_text("path"))
    if not path.is_absolute():
        raise UsageError("path", "must be absolute", "the daemon has another working folder than you")
    return path


def _query(request: web.Request, name: str) -> str:
    given = request.query.getall(name, [])
    if len(given) != 1 or not given[0].strip() or len(given[0]) > TEXT or set(request.query) != {name}:
        raise UsageError("request", f"needs exactly one query field, {name}", body.HINT)
    return given[0]


async def _events(known: Services, transfer_id: str) -> AsyncIterator[sse.Event]:
    """The views of a transfer as they change. Leaving early leaves the transfer alone."""
    last: dict[str, Any] | None = None
    async for transfer in known.transfers.watch(transfer_id):
        view = views.transfer(known, transfer)
        if view != last:
            yield view
        last = view


async def _outcome(known: Services, transfer: Transfer) -> Model:
    """The model that a transfer brings. Raises its error."""
    async for _ in known.transfers.watch(transfer.id):
        pass
    ended = known.transfers.get(transfer.id)
    if ended.error is not None:
        raise ended.error
    if ended.model is None:
        raise Unserved(ended.ref, f"it ended as {ended.state}", "start it again: it goes on where it was")
    return ended.model
