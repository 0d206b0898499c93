"""The sockets of the local API: what a client may do before any route sees it.

- More connections than there is room for are dropped; one that does not send a whole header in time is closed.
- A header field or a request line that is too long is 431 or 414, what is no HTTP is 400; nothing of it is sent back or logged.
- Content codings are never undone: the gate refuses them, and a bomb stays as small as it came.
- A client that stops reading its answer is dropped, which cancels the handler, and so the generation behind it. The socket's
  own buffer is kept small, or an answer would fit into it and nobody would ever notice; what the client's side takes counts as read.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from daemon.api.guard import error_response
from daemon.api.limits import LIMITS, Limits
from daemon.errors import Bug, Unavailable, UsageError
from daemon.listening import listening

log = logging.getLogger(__name__)


class HeaderTooLong(UsageError):
    http_status = 431


class LineIsTooLong(UsageError):
    http_status = 414


@asynccontextmanager
async def open_api(app: web.Application, host: str, port: int, *, last_answers_s: float) -> AsyncIterator[int]:
    """Serve `app` within its limits while the context lasts; gives the port. Raises `Unavailable` when it is taken.

    A handler is cancelled when its client goes. At the end answers under way have `last_answers_s`.
    """
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=last_answers_s)
    await runner.setup()
    try:
        server, loop = runner.server, asyncio.get_running_loop()
        assert server is not None
        async with AsyncExitStack() as stack:
            listener = listening(lambda: Connection(server, loop, app[LIMITS]), host, port)
            try:
                bound = await stack.enter_async_context(listener)
            except OSError as error:
                raise Unavailable(
                    f"port {port}", f"the API cannot listen there: {error.strerror}", "end what uses it, or set api.port"
                ) from error
            yield bound
    finally:
        await runner.cleanup()


class Connection(web.RequestHandler):
    """One client."""

    __slots__ = ("_limits", "_server", "_unread")

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        settings: dict[str, Any] = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": limits.header_s,
            "lingering_time": limits.body_s,
            "max_line_size": limits.request_line,
            "max_field_size": limits.header,
            "max_headers": limits.headers,
        }
        super().__init__(server, loop=loop, **settings)
        self._limits = limits
        self._server = server
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connection = cast(asyncio.Transport, transport)
        if len(self._server.connections) >= self._limits.connections:
            connection.abort()
            return
        connection.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._limits.unread)
        connection.set_write_buffer_limits(self._limits.unread)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._read_on()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.transport is not None:
            self._unread = self._loop.call_later(self._limits.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._read_on()
        super().resume_writing()

    def _read_on(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What the parser refused, in our shape; `message` would send the client's own bytes back."""
        if isinstance(exc, ConnectionError) or request.writer.output_size > 0:
            raise ConnectionError("the client is gone, or has a part of an answer already") from exc
        response = error_response(request, self._refusal(status, exc))
        response.force_close()
        return response

    def _refusal(self, status: int, exc: BaseException | None) -> UsageError | Bug:
        if isinstance(exc, LineTooLong):
            if exc.args[1] == self._limits.request_line:
                return LineIsTooLong("request", "its address is too long", f"use at most {self._limits.request_line} bytes")
            return HeaderTooLong("request", "a field of its header is too long", f"use at most {self._limits.header} bytes")
        if status < 500:
            return UsageError("request", "it cannot be read as HTTP/1.1", "docs/http.md shows what is meant")
        log.error("a bug outside of any route", exc_info=exc)
        return Bug("swarmctl", "a bug", "the daemon's log says more")
