"""The door for other nodes: announcements, small objects, sealed chats. No token: every body authenticates itself.

It listens apart from the local API and knows none of its routes. Over libp2p it is reached through a stream that ends at
this port, so every such peer comes from 127.0.0.1 and shares the ceilings of that source.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler

from daemon.errors import Busy, NotFound, Refused, SwarmError, Unavailable, UsageError, VerificationError
from daemon.listening import listening
from daemon.swarm import exchange
from daemon.swarm.limits import Buckets
from daemon.swarm.relay import CHAT_PATH, ChatServer
from daemon.swarm.seal import REQUEST_LIMIT, REQUEST_TYPE
from registry.cid import parse_cid
from registry.errors import Malformed

_log = logging.getLogger(__name__)

OBJECT_LIMIT = 32 << 20  # bytes; a .torrent of a very large model
HEADER_S = 10.0  # to send a request's header, and between two requests
_OWN_TUNNELS = "127.0.0.1"
_SHUTDOWN_S = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Ceilings of the door. Rates are per second and source."""

    chats: int = 64  # at the same time, over all sources
    chats_per_source: int = 8  # libp2p streams, which share one source, count to `chats` only
    announce_rate: float = 20.0
    announce_burst: float = 100.0
    object_rate: float = 20.0
    object_burst: float = 200.0
    body_s: float = 10.0  # to send a request's body


def create_door(
    *,
    announcements: Callable[[list[bytes]], Awaitable[list[bytes]]],
    chats: ChatServer,
    object_bytes: Callable[[str], Awaitable[bytes | None]],
    limits: Limits | None = None,
) -> web.Application:
    """`announcements` is `Announcer.exchange`; `object_bytes` gives a manifest or .torrent by canonical CID, or None."""
    door = _Door(announcements, chats, object_bytes, limits or Limits())
    app = web.Application(middlewares=[_errors], client_max_size=REQUEST_LIMIT)
    app.on_response_prepare.append(_anonymous)
    app.router.add_post(exchange.PATH, door.announce)
    app.router.add_get("/swarm/1/object/{cid}", door.object)
    app.router.add_post(CHAT_PATH, door.chat)
    return app


@asynccontextmanager
async def open_door(app: web.Application, host: str, port: int, *, header_s: float = HEADER_S) -> AsyncIterator[int]:
    """Serve `app` while the context lasts; gives the port. Raises `Unavailable` when the port is taken.

    A handler is cancelled when its peer goes: that is how a chat that nobody reads any more ends.
    """
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=header_s,
        shutdown_timeout=_SHUTDOWN_S,
        max_line_size=4096,
        max_field_size=4096,
        lingering_time=0,
    )
    await runner.setup()
    try:
        server = runner.server
        assert server is not None
        async with AsyncExitStack() as stack:
            try:
                bound = await stack.enter_async_context(listening(server, host, port, backlog=256))
            except OSError as error:
                raise Unavailable(f"port {port} of {host}", f"it cannot be listened on ({error.strerror})", "change swarm.port") from error
            yield bound
    finally:
        await runner.cleanup()


class _Door:
    def __init__(
        self,
        announcements: Callable[[list[bytes]], Awaitable[list[bytes]]],
        chats: ChatServer,
        object_bytes: Callable[[str], Awaitable[bytes | None]],
        limits: Limits,
    ) -> None:
        self._announcements = announcements
        self._chats = chats
        self._object_bytes = object_bytes
        self._limits = limits
        self._announced = Buckets(rate=limits.announce_rate, burst=limits.announce_burst, clock=time.monotonic)
        self._objects = Buckets(rate=limits.object_rate, burst=limits.object_burst, clock=time.monotonic)
        self._chatting: Counter[str] = Counter()

    async def announce(self, request: web.Request) -> web.Response:
        if not self._announced.take(_source(request)):
            raise Busy("announcements", "they come too fast", "slow down")
        data = await self._body(request, exchange.BODY_LIMIT, "application/json")
        try:
            envelopes = exchange.parse(data)
        except Malformed as error:
            raise UsageError("announcements", str(error)) from error
        return web.Response(body=exchange.body(await self._announcements(envelopes)), content_type="application/json")

    async def object(self, request: web.Request) -> web.Response:
        if not self._objects.take(_source(request)):
            raise Busy("object", "requests come too fast", "slow down")
        try:
            cid = parse_cid(request.match_info["cid"]).canonical
        except Malformed as error:
            raise UsageError("object", str(error)) from error
        data = await self._object_bytes(cid)
        if data is None or len(data) > OBJECT_LIMIT:
            raise NotFound("object", "this node does not have it")
        return web.Response(body=io.BytesIO(data), content_type="application/octet-stream")

    async def chat(self, request: web.Request) -> web.StreamResponse:
        with self._place(_source(request)):
            sealed = await self._body(request, REQUEST_LIMIT, REQUEST_TYPE)
            return await self._chats.handle(request, sealed)

    @contextmanager
    def _place(self, source: str) -> Iterator[None]:
        """One of the places for chats. Raises `Busy` when there is none."""
        full = self._chatting.total() >= self._limits.chats
        if full or (source != _OWN_TUNNELS and self._chatting[source] >= self._limits.chats_per_source):
            raise Busy("chat", "this node answers as many as it takes", "ask another node")
        self._chatting[source] += 1
        try:
            yield
        finally:
            self._chatting[source] -= 1
            if not self._chatting[source]:
                del self._chatting[source]

    async def _body(self, request: web.Request, limit: int, kind: str) -> bytes:
        if request.content_type != kind or "Content-Encoding" in request.headers:
            raise _Unsupported
        if (request.content_length or 0) > limit:
            raise web.HTTPRequestEntityTooLarge(limit, request.content_length or 0)
        data = bytearray()
        async with asyncio.timeout(self._limits.body_s):
            async for piece in request.content.iter_any():
                data += piece
                if len(data) > limit:
                    raise web.HTTPRequestEntityTooLarge(limit, len(data))
        return bytes(data)


class _Unsupported(Exception):
    """The media type or encoding is not the one of the route."""


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Failures in a form that tells a stranger what it did wrong and nothing about this machine."""
    try:
        if "Origin" in request.headers:
            raise Refused("door", "it is for nodes, not for web pages")
        return await handler(request)
    except SwarmError as error:
        if isinstance(error, VerificationError):
            return _plain(400, error.message)
        if error.http_status >= 500:
            _log.info("the door failed a peer: %s", error)
            return _plain(error.http_status, "the node failed")
        return web.json_response(error.as_json(), status=error.http_status)
    except _Unsupported:
        return _plain(415, "unsupported media type")
    except TimeoutError:
        return _plain(408, "the request came too slowly")
    except web.HTTPException as error:
        return _plain(error.status, error.reason)
    except ConnectionError:
        # The peer is gone; whatever is returned goes nowhere.
        return _plain(499, "gone")
    except Exception:  # a fault of ours must not become a page about our code
        _log.exception("the door failed")
        return _plain(500, "the node failed")


def _plain(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"code": 2 if status < 500 else 1, "message": message, "hint": ""}}, status=status)


async def _anonymous(request: web.Request, response: web.StreamResponse) -> None:
    """Which library answers is nobody's business."""
    response.headers["Server"] = "swarmctl"


def _source(request: web.Request) -> str:
    return request.remote or ""
