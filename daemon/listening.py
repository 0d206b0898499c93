"""Listening for connections in a way that loses none of them at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def listening(
    factory: Callable[[], asyncio.BaseProtocol], host: str, port: int, *, backlog: int = 100
) -> AsyncIterator[int]:
    """Give each connection a protocol of `factory` while the context lasts; gives the port. Raises `OSError` when it is taken.

    Before 3.13, asyncio forgets the socket of a connection that was accepted and has no transport yet when its server closes: it
    is never closed, and whoever is at its other end waits (CPython issue 109564). So accepting ends first.
    """
    loop = asyncio.get_running_loop()
    # Started within `try`: a start that is cancelled would leave the socket behind.
    server = await loop.create_server(factory, host, port, backlog=backlog, start_serving=False)
    try:
        await server.start_serving()
        yield server.sockets[0].getsockname()[1]
    finally:
        try:
            for listener in server.sockets:
                loop.remove_reader(listener.fileno())
            await asyncio.sleep(0)  # what was accepted gets its transport
        finally:
            server.close()
