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
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
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
    lines = _Lines(response, limits.silence_s)
    first = asyncio.create_task(_next(events))
    tasks: list[asyncio.Task[Any]] = [first]
    try:
        await asyncio.wait({first}, timeout=limits.first_s)
        if first.done() and first.exception() is not None and not isinstance(first.exception(), StopAsyncIteration):
            first.result()
        await response.prepare(request)
        tasks.append(asyncio.create_task(lines.fill_silence()))
        # Tokens come by the thousand: only the first event has a task of its own.
        coming: Awaitable[Event] = first
        while True:
            try:
                event = await coming
            except StopAsyncIteration:
                break
            except SwarmError as error:
                await lines.write(encode(error_body(request, error)))
                break
            except Exception:  # a bug in the middle of a stream: the status is gone, so it is told as an event
                log.exception("a bug while streaming %s", request.path)
                await lines.write(encode(error_body(request, Bug("swarmctl", "a bug", "the daemon's log says more"))))
                break
            await lines.write(encode(event))
            coming = anext(events)
        await response.write_eof()
    finally:
        for task in tasks:
            await _cancelled(task)
        await close(events)
    return response


def encode(event: Event) -> bytes:
    text = event if isinstance(event, str) else json.dumps(event, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class _Lines:
    """What is written to a response, and a comment whenever that was nothing for `silence_s`."""

    def __init__(self, response: web.StreamResponse, silence_s: float) -> None:
        self._response = response
        self._silence_s = silence_s
        self._turn = asyncio.Lock()  # a client that does not read holds up comments too
        self._last = time.monotonic()

    async def write(self, data: bytes) -> None:
        async with self._turn:
            await self._response.write(data)
            self._last = time.monotonic()

    async def fill_silence(self) -> None:
        while True:
            left = self._last + self._silence_s - time.monotonic()
            if left <= 0:
                await self.write(b": still here\n\n")
            else:
                await asyncio.sleep(left)


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen here, or asyncio would report it as forgotten
