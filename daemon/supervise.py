"""Background loops with names: each is registered where it is created, retried with backoff, and never dies unseen.

A crash is logged (with its traceback when it is ours, in one line when it is a `SwarmError`) and stays in `state()`, so
that `status` can show it. Closing cancels in reverse order of creation.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from daemon.errors import Bug, SwarmError

_log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0
# Crashed one-off tasks stay visible, but not for ever.
_CRASHES_KEPT = 32


@dataclass(frozen=True, slots=True)
class LoopState:
    """What one loop is doing: "waiting" is the pause before it is tried again; `error` is its last crash in one line."""

    state: Literal["running", "waiting", "crashed"]
    crashes: int
    error: str | None


@dataclass(slots=True)
class _Loop:
    task: asyncio.Task[None] | None = None
    state: Literal["running", "waiting", "crashed"] = "running"
    crashes: int = 0
    error: str | None = None


class Supervisor:
    """Owns background tasks. `close()` is idempotent and takes at most `close_s` seconds."""

    def __init__(self, *, first_pause_s: float = FIRST_PAUSE_S, longest_pause_s: float = LONGEST_PAUSE_S, close_s: float = 2.0) -> None:
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._close_s = close_s
        self._loops: dict[str, _Loop] = {}
        self._closing = False

    def run(self, name: str, function: Callable[[], Awaitable[None]], *, restart: bool) -> None:
        """Run `function()` in the background. With `restart` a crash is retried for ever, with pauses that double.

        Returning normally ends the loop. Raises `Bug` when a loop of that name is still alive or everything is closed.
        """
        if self._closing:
            raise Bug("supervisor", f"{name} was started while closing")
        known = self._loops.get(name)
        if known is not None and known.task is not None and not known.task.done():
            raise Bug("supervisor", f"{name} is running already")
        self._loops.pop(name, None)
        loop = self._loops[name] = _Loop()
        loop.task = asyncio.create_task(self._keep(name, loop, function, restart), name=name)
        self._forget_old_crashes()

    def state(self) -> dict[str, LoopState]:
        return {name: LoopState(loop.state, loop.crashes, loop.error) for name, loop in self._loops.items()}

    async def stop(self, name: str) -> None:
        """Cancel one loop and wait for its end; an unknown name is no error."""
        loop = self._loops.pop(name, None)
        if loop is not None and loop.task is not None:
            await self._end(name, loop.task, self._close_s)

    async def close(self) -> None:
        self._closing = True
        deadline = time.monotonic() + self._close_s
        while self._loops:
            name, loop = self._loops.popitem()
            if loop.task is not None:
                await self._end(name, loop.task, max(0.05, deadline - time.monotonic()))

    async def _keep(self, name: str, loop: _Loop, function: Callable[[], Awaitable[None]], restart: bool) -> None:
        pause = self._first_pause_s
        while True:
            began = time.monotonic()
            loop.state = "running"
            try:
                await function()
                # A loop that ended by itself has nothing left to report.
                if self._loops.get(name) is loop:
                    del self._loops[name]
                return
            except Exception as error:  # the one place where a background failure ends up: logged, kept, retried
                self._note(name, loop, error)
            if not restart:
                loop.state = "crashed"
                return
            # A run that was fine for a while starts over with a short pause.
            if time.monotonic() - began > self._longest_pause_s:
                pause = self._first_pause_s
            loop.state = "waiting"
            await asyncio.sleep(pause)
            pause = min(pause * 2, self._longest_pause_s)

    def _note(self, name: str, loop: _Loop, error: Exception) -> None:
        loop.crashes += 1
        line = str(error) if isinstance(error, SwarmError) else f"{type(error).__name__}: {error}"
        if isinstance(error, SwarmError) and not isinstance(error, Bug):
            # The same outage, retried for an hour, is one line in the log.
            level = logging.DEBUG if line == loop.error else logging.WARNING
            _log.log(level, "%s failed: %s", name, line)
        else:
            _log.error("%s crashed", name, exc_info=error)
        loop.error = line

    def _forget_old_crashes(self) -> None:
        crashed = [name for name, loop in self._loops.items() if loop.state == "crashed"]
        for name in crashed[:-_CRASHES_KEPT]:
            del self._loops[name]

    async def _end(self, name: str, task: asyncio.Task[None], within_s: float) -> None:
        task.cancel()
        _, pending = await asyncio.wait({task}, timeout=within_s)
        if pending:
            _log.error("%s did not stop within %.1f s", name, within_s)
