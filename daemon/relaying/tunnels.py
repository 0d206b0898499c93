"""The asking half of relaying: loopback ports whose connections come out at a node that a relay
carries for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import aiohttp

from daemon.errors import NotFound, SwarmError, Unserved
from daemon.listening import listening
from daemon.peerapi.kinds import MESSAGES, Kind
from daemon.peerapi.ways import Way
from daemon.relaying import wire
from daemon.relaying.pipes import WebSocket, connected, ended, pipe
from daemon.relaying.service import RelayService

_log = logging.getLogger(__name__)

OPEN_S = 10.0  # for the relay to ring the node, and for the node to come
_HERE = "this node"  # the source of what we ask through ourselves


class RelayTunnels:
    """`http` is a `pipes.session()`; `service` is what this node carries for others."""

    def __init__(self, http: aiohttp.ClientSession, service: RelayService | None = None) -> None:
        self._http = http
        self._service = service

    @asynccontextmanager
    async def through(
        self, relay: Way, node: str, *, kind: Kind = MESSAGES
    ) -> AsyncIterator[str]:
        """A base URL on loopback that leads through the peer API of `relay` to that of `node`.

        Each connection to it is a stream of its own. Raises `Unserved` when the relay does not carry for the node or the
        node does not come, `Declined` when its owner does not want it to carry this kind, `Busy` when it is at a ceiling.
        """
        path = f"{wire.TO_PATH}{wire.hex_of(node)}?kind={kind}"

        def dial() -> AbstractAsyncContextManager[WebSocket]:
            return connected(self._http, relay, path, deadline_s=OPEN_S, limit=wire.MESSAGE_LIMIT)

        async with _tunnel(dial) as base:
            yield base

    def carried_here(self, node: str) -> AbstractAsyncContextManager[str] | None:
        """The same for a node that this one carries for; None when it does not."""
        service = self._service
        if service is None or node not in service.held:
            return None
        return _tunnel(lambda: _taken(service, node))


@asynccontextmanager
async def _taken(service: RelayService, node: str) -> AsyncIterator[WebSocket]:
    try:
        async with service.call(node, _HERE) as (ws, _):
            yield ws
    except NotFound as error:  # it has just gone
        raise Unserved("relay", error.why) from error


@asynccontextmanager
async def _tunnel(
    dial: Callable[[], AbstractAsyncContextManager[WebSocket]],
) -> AsyncIterator[str]:
    """Each connection to the URL that this gives is carried over a socket of `dial()`, the first of
    which is opened at once.
    """
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(dial())
        carrier = _Carrier(dial, first)
        stack.push_async_callback(carrier.close)
        port = await stack.enter_async_context(listening(carrier.protocol, "127.0.0.1", 0))
        yield f"http://127.0.0.1:{port}"


class _Carrier:
    """The connections of one tunnel; each has a task, which ends with it."""

    def __init__(
        self, dial: Callable[[], AbstractAsyncContextManager[WebSocket]], first: WebSocket
    ) -> None:
        self._dial = dial
        self._unused: list[WebSocket] = [first]
        self._tasks: set[asyncio.Task[None]] = set()

    def protocol(self) -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(wire.CHUNK), self._accept)

    async def close(self) -> None:
        await ended(self._tasks)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Also when it is cancelled before it has begun.
        task.add_done_callback(lambda _: writer.close())

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._unused:
                await pipe(self._unused.pop(), reader, writer)
                return
            async with self._dial() as ws:
                await pipe(ws, reader, writer)
        except SwarmError as error:
            _log.debug("a stream could not be opened: %s", error)
            writer.transport.abort()
