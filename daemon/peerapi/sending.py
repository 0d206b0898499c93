"""Sending a body to somebody who may read slowly, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

CHUNK = 64 << 10  # bytes written at once


async def send(
    request: web.Request,
    response: web.StreamResponse,
    body: bytes,
    *,
    idle_s: float,
    pace: Callable[[int], Awaitable[None]] | None = None,
) -> web.StreamResponse:
    """Write `body` as it is read, `pace` before each piece; cut off who takes nothing for `idle_s` seconds."""
    whole = memoryview(body)
    response.content_length = len(whole)
    await response.prepare(request)
    try:
        for at in range(0, len(whole), CHUNK):
            piece = whole[at : at + CHUNK]
            if pace is not None:
                await pace(len(piece))
            async with asyncio.timeout(idle_s):
                await response.write(piece)
        async with asyncio.timeout(idle_s):
            await response.write_eof()
    except TimeoutError:
        # The header is out: nothing can be said any more.
        if request.transport is not None:
            request.transport.abort()
    return response
