"""Routes of the swarm: what others have, and who they are."""

from __future__ import annotations

from aiohttp import web

from daemon.api import body, views
from daemon.api.services import services
from daemon.errors import UsageError, VerificationError
from registry.address import parse_address
from registry.errors import Malformed, NotVerified, Stale

ENVELOPE = 16 * 1024  # bytes; an envelope of 8 KiB in base64, with its signatures


class WrongSignature(VerificationError):
    http_status = 400  # not 502: whoever sent it was asked nothing


class OutOfDate(UsageError):
    http_status = 409


async def list_models(request: web.Request) -> web.StreamResponse:
    here = services(request)
    return web.json_response([views.swarm_model(here, known) for known in views.swarm_models(here)])


async def list_peers(request: web.Request) -> web.StreamResponse:
    known = services(request)
    return web.json_response(views.peers(known, known.peers.peers()))


async def register(request: web.Request) -> web.StreamResponse:
    """Take an announcement; the envelope carries its own proof and its bytes are read by registry/announcement.py."""
    envelope = await body.read(request, ENVELOPE)
    try:
        said = await services(request).gossip.receive(envelope)
    except Malformed as error:
        raise UsageError("announcement", str(error), "send the envelope as its node made it") from error
    except NotVerified as error:
        raise WrongSignature("announcement", str(error), "send the envelope as its node made it") from error
    except Stale as error:
        raise OutOfDate("announcement", str(error), "send a newer one") from error
    return web.json_response({"node": said.node, "models": len(said.offers), "expires": views.iso(said.expires)})


async def join(request: web.Request) -> web.StreamResponse:
    fields = await body.fields(request)
    text = fields.required_text("address")
    fields.done()
    try:
        address = parse_address(text)
    except Malformed as error:
        raise UsageError("address", str(error), "copy it from another node's `swarmctl status`") from error
    known = services(request)
    [joined] = views.peers(known, [await known.gossip.join(address)])
    return web.json_response(joined)
