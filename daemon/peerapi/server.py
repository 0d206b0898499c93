"""The peer API: what other nodes may ask. No token: every body authenticates itself; a closed swarm answers its members only.

It listens apart from the local API and knows none of its routes. Each room of the daemon that other nodes may ask something of
brings its routes; the server brings what they share: sources, ceilings, bounded bodies, and errors that tell a stranger what it
did wrong and nothing about this machine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler

from daemon.errors import Refused, SwarmError, Unavailable, VerificationError
from daemon.listening import listening
from daemon.membership import Membership
from daemon.peerapi.connections import Connections
from daemon.peerapi.limits import Limits

_log = logging.getLogger(__name__)

BODY_LIMIT = 4 << 20  # bytes of any request; most routes take less
_SHUTDOWN_S = 1.0


@dataclass(frozen=True, slots=True)
class Route:
    """One thing that other nodes may ask; `path` as aiohttp's router takes it."""

    method: str
    path: str
    handle: Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the peer API listens: `direct` for other nodes, `streams` on loopback for what comes through Kubo or a relay."""

    direct: int
    streams: int


class PeerApi:
    """The server of `routes`. `allowed` says which IP addresses may come straight to its port, `on_direct` is told of each."""

    def __init__(
        self,
        routes: Iterable[Route],
        *,
        membership: Membership,
        limits: Limits | None = None,
        allowed: Callable[[str], bool] = lambda address: True,
        on_direct: Callable[[str], None] = lambda address: None,
    ) -> None:
        self._limits = limits or Limits()
        self._connections = Connections(self._limits, allowed, on_direct)
        self._app = web.Application(
            middlewares=[_members_only, _errors], client_max_size=BODY_LIMIT
        )
        self._app[_MEMBERSHIP] = membership
        self._app[_CONNECTIONS] = self._connections
        self._app[_LIMITS] = self._limits
        self._app.on_response_prepare.append(_anonymous)
        for route in routes:
            self._app.router.add_route(route.method, route.path, route.handle)

    @asynccontextmanager
    async def listening(self, hosts: Sequence[str], port: int) -> AsyncIterator[Ports]:
        """Serve while the context lasts. Raises `Unavailable` when the port is taken.

        A handler is cancelled when its peer goes: that is how a chat that nobody reads any more ends.
        """
        runner = web.AppRunner(
            self._app,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=self._limits.header_s,
            shutdown_timeout=_SHUTDOWN_S,
            max_line_size=4096,
            max_field_size=4096,
            lingering_time=0,
        )
        await runner.setup()
        try:
            http = runner.server
            assert http is not None
            async with AsyncExitStack() as stack:
                direct = lambda: self._connections.direct(http)  # noqa: E731 - a factory, used twice
                for host in hosts:
                    port = await stack.enter_async_context(_on(direct, host, port))
                streams = await stack.enter_async_context(
                    _on(lambda: self._connections.stream(http), "127.0.0.1", 0)
                )
                yield Ports(port, streams)
        finally:
            await runner.cleanup()


@asynccontextmanager
async def _on(
    protocol: Callable[[], asyncio.Protocol], host: str, port: int
) -> AsyncIterator[int]:
    async with AsyncExitStack() as stack:
        try:
            bound = await stack.enter_async_context(listening(protocol, host, port, backlog=256))
        except OSError as error:
            why = f"it cannot be listened on ({error.strerror})"
            raise Unavailable(f"port {port} of {host}", why, "change swarm.port") from error
        yield bound


_MEMBERSHIP: web.AppKey[Membership] = web.AppKey("membership")
_CONNECTIONS: web.AppKey[Connections] = web.AppKey("connections", Connections)
_LIMITS: web.AppKey[Limits] = web.AppKey("limits", Limits)


class Unsupported(Exception):
    """The media type or encoding is not the one of the route."""


def source_of(request: web.Request) -> str:
    """Who asks, for ceilings: an IP address, a libp2p peer id, or `relay:NODE`."""
    return request.app[_CONNECTIONS].source(request.transport)


async def read_body(request: web.Request, limit: int, kind: str) -> bytes:
    """The body, of at most `limit` bytes and of media type `kind`, if it comes in time.

    Raises `Unsupported`, `web.HTTPRequestEntityTooLarge` and `TimeoutError`, which the server answers.
    """
    if request.content_type != kind or "Content-Encoding" in request.headers:
        raise Unsupported
    if (request.content_length or 0) > limit:
        raise web.HTTPRequestEntityTooLarge(limit, request.content_length or 0)
    data = bytearray()
    async with asyncio.timeout(request.app[_LIMITS].body_s):
        async for piece in request.content.iter_any():
            data += piece
            if len(data) > limit:
                raise web.HTTPRequestEntityTooLarge(limit, len(data))
    return bytes(data)


@web.middleware
async def _members_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A stranger gets the same answer whatever it asks: that of a web server with nothing on it."""
    if request.app[_MEMBERSHIP].admits(request):
        return await handler(request)
    return web.Response(status=404, text="404: Not Found")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Failures in a form that tells a stranger what it did wrong and nothing about this machine."""
    try:
        if "Origin" in request.headers:
            raise Refused("peer API", "it is for nodes, not for web pages")
        return await handler(request)
    except SwarmError as error:
        if isinstance(error, VerificationError):
            return _plain(400, error.message)
        if error.http_status >= 500:
            _log.info("the peer API failed a peer: %s", error)
            return _plain(error.http_status, "the node failed")
        return web.json_response(error.as_json(), status=error.http_status)
    except Unsupported:
        return _plain(415, "unsupported media type")
    except TimeoutError:
        return _plain(408, "the request came too slowly")
    except web.HTTPException as error:
        return _plain(error.status, error.reason)
    except ConnectionError:
        # The peer is gone; whatever is returned goes nowhere.
        return _plain(499, "gone")
    except Exception:  # a fault of ours must not become a page about our code
        _log.exception("the peer API failed")
        return _plain(500, "the node failed")


def _plain(status: int, message: str) -> web.Response:
    error = {"code": 2 if status < 500 else 1, "message": message, "hint": ""}
    return web.json_response({"error": error}, status=status)


async def _anonymous(request: web.Request, response: web.StreamResponse) -> None:
    """Which program answers is nobody's business."""
    response.headers.pop("Server", None)
