"""A node that a relay carries for, the calls to it, and the connection over which it is rung."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from aiohttp import WSMsgType, web

from daemon.errors import UsageError
from daemon.relaying import wire
from registry.relaying import HoldRequest


@dataclass(slots=True, eq=False)
class Call:
    """Somebody asks for a held node. `taken` is what the node opened, None when it went away
    instead.
    """

    taken: asyncio.Future[web.WebSocketResponse | None]
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self) -> None:
        if not self.taken.done():
            self.taken.set_result(None)
        self.over.set()


@dataclass(slots=True, eq=False)
class Hold:
    """A node that this one carries for, its connection, its last request and the calls to it."""

    ws: web.WebSocketResponse
    request: HoldRequest
    calls: set[Call] = field(default_factory=set)

    def end_calls(self) -> None:
        """What was carried over this connection ends with it."""
        for call in list(self.calls):
            call.end()


class Ended(Exception):
    """The connection of a holder ends, with a close code and a reason."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


def new_socket(
    request: web.Request, *, limit: int, heartbeat_s: float | None = None
) -> web.WebSocketResponse:
    """A WebSocket to prepare, for messages of at most `limit` bytes. Raises `UsageError` when none
    was asked for.
    """
    ws = web.WebSocketResponse(
        heartbeat=heartbeat_s,
        autoping=heartbeat_s is not None,
        max_msg_size=limit,
        compress=False,
    )
    if not ws.can_prepare(request):
        raise UsageError("relay", "this is for WebSockets")
    return ws


async def next_request(ws: web.WebSocketResponse, within_s: float) -> bytes | None:
    """The next message of a holder, None when it has closed. Raises `Ended`."""
    try:
        message = await ws.receive(timeout=within_s)
    except TimeoutError:
        raise Ended(wire.LATE, "no request came in time") from None
    if message.type is WSMsgType.TEXT:
        return str(message.data).encode()
    if message.type is WSMsgType.BINARY:
        raise Ended(wire.WRONG_KIND, "requests are text")
    return None
