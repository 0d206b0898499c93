"""Server-sent events: the one place that streams.

- The first event is awaited (a while) before anything is sent, so that what fails at once fails with a real status.
- An error after that is a `data: {"error": ...}` event, and the stream ends: nothing that looks like a proper end follows.
- Silence is filled with comments, so that neither side nor a proxy takes a slow answer for a dead one.
- Whoever makes the events is closed in every case. A reader that stops reading is cut off below (server.py), as one that goes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from daemon.api.guard import error_body
from daemon.api.limits import LIMITS
from daemon.errors import Bug, SwarmError
from daemon.waiting import close

log = logging.getLogger(__name__)

Event = Mapping[str, Any] | str


async def stream(request: web.Request, events: AsyncIterator[Event], headers: Mapping[str, str] | None = None) -> web.StreamResponse:
    """Send each event as one `data:` line (JSON, or text as it is) until `events` ends."""
    limits = request.app[LIMITS]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", **(headers or {})})
    pending = _next(events)
    try:
        await asyncio.wait({pending}, timeout=limits.first_s)
        if pending.done() and pending.exception() is not None and not isinstance(pending.exception(), StopAsyncIteration):
            pending.result()
        await response.prepare(request)
        while True:
            done, _ = await asyncio.wait({pending}, timeout=limits.silence_s)
            if not done:
                await response.write(b": still here\n\n")
                continue
            try:
                event = pending.result()
            except StopAsyncIteration:
                break
            except SwarmError as error:
                await response.write(encode(error_body(request, error)))
                break
            except Exception:  # a bug in the middle of a stream: the status is gone, so it is told as an event
                log.exception("a bug while streaming %s", request.path)
                await response.write(encode(error_body(request, Bug("swarmctl", "a bug", "the daemon's log says more"))))
                break
            await response.write(encode(event))
            pending = _next(events)
        await response.write_eof()
    finally:
        await _cancelled(pending)
        await close(events)
    return response


def encode(event: Event) -> bytes:
    text = event if isinstance(event, str) else json.dumps(event, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _next(events: AsyncIterator[Event]) -> asyncio.Task[Event]:
    async def step() -> Event:
        return await anext(events)

    return asyncio.create_task(step())


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen here, or asyncio would report it as forgotten
