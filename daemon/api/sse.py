"""Server-sent events: the one place that streams.

- The first event is awaited (a while) before anything is sent, so that what fails at once fails with a real status.
- An error after that is a `data: {"error": ...}` event, and the stream ends: nothing that looks like a proper end follows.
- Silence is filled with comments, so that neither side nor a proxy takes a slow answer for a dead one.
- A reader that stops reading is cut off; whoever makes the events is closed in every case.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from daemon.api.guard import error_body
from daemon.errors import Bug, SwarmError

log = logging.getLogger(__name__)

FIRST_S = 15.0  # how long an error may still become a status
KEEPALIVE_S = 10.0
WRITE_S = 10.0  # a reader that takes nothing for this long is gone

Event = Mapping[str, Any] | str


async def stream(request: web.Request, events: AsyncIterator[Event], headers: Mapping[str, str] | None = None) -> web.StreamResponse:
    """Send each event as one `data:` line (JSON, or text as it is) until `events` ends."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", **(headers or {})})
    pending = _next(events)
    try:
        await asyncio.wait({pending}, timeout=FIRST_S)
        if pending.done() and pending.exception() is not None and not isinstance(pending.exception(), StopAsyncIteration):
            pending.result()
        await response.prepare(request)
        while True:
            done, _ = await asyncio.wait({pending}, timeout=KEEPALIVE_S)
            if not done:
                await _write(request, response, b": still here\n\n")
                continue
            try:
                event = pending.result()
            except StopAsyncIteration:
                break
            except SwarmError as error:
                await _write(request, response, encode(error_body(request, error)))
                break
            except Exception:  # a bug in the middle of a stream: the status is gone, so it is told as an event
                log.exception("a bug while streaming %s", request.path)
                await _write(request, response, encode(error_body(request, Bug("swarmctl", "a bug", "the daemon's log says more"))))
                break
            await _write(request, response, encode(event))
            pending = _next(events)
        await response.write_eof()
    finally:
        await _cancelled(pending)
        await close(events)
    return response


def encode(event: Event) -> bytes:
    text = event if isinstance(event, str) else json.dumps(event, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


async def close(events: AsyncIterator[Any]) -> None:
    """Close an iterator that can be closed; plain iterators cannot, and need not."""
    aclose = getattr(events, "aclose", None)
    if aclose is not None:
        await aclose()


def _next(events: AsyncIterator[Event]) -> asyncio.Task[Event]:
    async def step() -> Event:
        return await anext(events)

    return asyncio.create_task(step())


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    try:
        async with asyncio.timeout(WRITE_S):
            await response.write(data)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the reader stopped reading") from None


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen here, or asyncio would report it as forgotten
