"""WebSockets as pipes: opening one to a relay, closing one for certain, and carrying a TCP
connection over one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

import aiohttp
from aiohttp import WSMsgType, web

from daemon.errors import Busy, Declined, Unserved
from daemon.membership import Membership
from daemon.peerapi.ways import Way
from daemon.relaying import wire

_log = logging.getLogger(__name__)

WebSocket: TypeAlias = web.WebSocketResponse | aiohttp.ClientWebSocketResponse

CLOSE_S = 1.0  # for the other end to answer that it has closed
FLUSH_S = 30.0  # the same where it still has an answer to read


def session(membership: Membership) -> aiohttp.ClientSession:
    """What relays are spoken to with: its connections last, so they are not counted with those of
    short requests.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        middlewares=(_never_elsewhere, membership.middleware),
    )


async def _never_elsewhere(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """A relay that redirects could send its peers anywhere, inwards too."""
    response = await handler(request)
    if 300 <= response.status < 400:
        response.close()
        raise aiohttp.ClientConnectionError("it redirects")
    return response


@asynccontextmanager
async def connected(
    http: aiohttp.ClientSession,
    way: Way,
    path: str,
    *,
    deadline_s: float,
    limit: int,
    heartbeat_s: float | None = None,
    close_s: float = CLOSE_S,
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """A WebSocket to `path` of the peer API at the end of `way`, for messages of at most `limit`
    bytes; closed with the context.

    Raises `Busy` when a ceiling of the other end refuses it, `Declined` when its owner does, `Unserved` when it cannot be had.
    """
    try:
        async with asyncio.timeout(deadline_s):
            ws = await http.ws_connect(
                way.url + path,
                headers=way.headers,
                timeout=aiohttp.ClientWSTimeout(ws_close=close_s),
                heartbeat=heartbeat_s,
                autoping=heartbeat_s is not None,
                max_msg_size=limit,
                compress=0,
            )
    except aiohttp.WSServerHandshakeError as error:
        raise _refused(error.status) from error
    except (aiohttp.ClientError, OSError) as error:
        raise Unserved("relay", "it cannot be reached") from error
    except TimeoutError as error:
        raise Unserved("relay", f"it did not answer within {deadline_s:g} s") from error
    try:
        yield ws
    finally:
        await finish(ws, within_s=close_s)


def _refused(status: int) -> Busy | Unserved:
    if status == 403:
        return Declined("relay", "it does not carry this for others", "try another relay")
    if status == 429:
        return Busy("relay", "it carries as much as it takes", "try another relay")
    if status == 404:
        return Unserved("relay", "it does not carry for that node")
    return Unserved("relay", f"it answered {status}")


async def finish(
    ws: WebSocket, code: int = wire.DONE, reason: str = "", *, within_s: float = CLOSE_S
) -> None:
    """Close a WebSocket, and its connection in any case. Idempotent; takes at most `within_s`.

    What was sent before still arrives, if the other end reads it within that time.
    """
    raw = ws.get_extra_info("socket")
    try:
        async with asyncio.timeout(within_s):
            await ws.close(code=code, message=wire.reason(reason))
    except (OSError, TimeoutError) as error:
        _log.debug("a connection was not closed in good order: %r", error)
    finally:
        _cut(raw)


def _cut(raw: Any) -> None:
    """End a connection now, whatever it has not sent yet: closing waits for a reader that may never
    read.
    """
    if raw is not None:
        with suppress(OSError):  # it is closed already
            raw.shutdown(socket.SHUT_RDWR)


async def ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they are over."""
    waited = list(tasks)
    for task in waited:
        task.cancel()
    if waited:
        await asyncio.wait(waited)
    for task in waited:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("what ended with the rest had failed: %r", error)


async def pipe(ws: WebSocket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry bytes both ways until one end closes, and close both.

    An end in bad order resets the connection, so that nobody takes what has come for the whole.
    """
    incoming = asyncio.create_task(_from_socket(ws, writer))
    outgoing = asyncio.create_task(_to_socket(ws, reader))
    in_order = False
    try:
        await asyncio.wait({incoming, outgoing}, return_when=asyncio.FIRST_COMPLETED)
        in_order = incoming.result() if incoming.done() else outgoing.result()
        if not incoming.done():
            # While `incoming` still waits: a receive that is cancelled would cut off what was sent.
            await finish(ws, within_s=FLUSH_S)
    except OSError as error:
        _log.debug("a carried connection broke: %r", error)
    finally:
        if not in_order:
            writer.transport.abort()
        writer.close()
        await ended([incoming, outgoing])
        await finish(ws, wire.DONE if in_order else wire.BROKEN)


async def _from_socket(ws: WebSocket, writer: asyncio.StreamWriter) -> bool:
    """Whether the other end closed in good order."""
    while True:
        message = await ws.receive()
        if message.type is not WSMsgType.BINARY:
            return message.type is WSMsgType.CLOSE and ws.close_code == wire.DONE
        writer.write(message.data)
        await writer.drain()


async def _to_socket(ws: WebSocket, reader: asyncio.StreamReader) -> bool:
    while data := await reader.read(wire.CHUNK):
        await ws.send_bytes(data)
    return True
