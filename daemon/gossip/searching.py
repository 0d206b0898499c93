"""One search on the DHTs: who is named there is met, a few at a time, for all who wait for the same."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Set
from typing import Any

from daemon.errors import SwarmError
from registry.records import Address

_log = logging.getLogger(__name__)

MAX_TRIED = 256  # addresses of one search
AT_ONCE = 16
_HEARD_S = 0.25  # between two looks at whether it was heard of otherwise


class SharedSearch:
    """One search and those who wait for it, each until it finds what it is after itself."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.on_over: Callable[[], None] = lambda: None  # nobody can join any more
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._over = False

    async def wait(self, found: Callable[[], bool]) -> None:
        """Until `found()` or the end. The last who leaves takes the search with him."""
        mine = asyncio.get_running_loop().create_future()
        self._waiting[mine] = found
        try:
            await mine
        finally:
            del self._waiting[mine]
            if not self._waiting:
                await self._end()

    def is_over(self) -> bool:
        """Let go whoever has found it; whether nobody is left."""
        for waiter, found in self._waiting.items():
            if not waiter.done() and found():
                waiter.set_result(None)
        self._over = all(waiter.done() for waiter in self._waiting)
        if self._over:
            self.on_over()
        return self._over

    def ended(self, task: asyncio.Task[None]) -> None:
        """The search has come to its end, whichever."""
        self.on_over()
        error = None if task.cancelled() else task.exception()
        for waiter in self._waiting:
            if waiter.done():
                continue
            if error is not None:
                waiter.set_exception(error)
            else:
                waiter.set_result(None)

    async def _end(self) -> None:
        self.on_over()
        assert self.task is not None
        if not self._over:
            self.task.cancel()
        await asyncio.wait({self.task})


class Crowd:
    """Those who are named, met a few at a time, each once, until `found()`."""

    def __init__(
        self, meet: Callable[[Address], Coroutine[Any, Any, None]], found: Callable[[], bool]
    ) -> None:
        self._meet = meet
        self._found = found
        self._known: set[Address] = set()
        self._waiting: deque[Address] = deque()
        self._wake = asyncio.Event()

    def add(self, address: Address) -> None:
        if address not in self._known and len(self._known) < MAX_TRIED:
            self._known.add(address)
            self._waiting.append(address)
            self._wake.set()

    async def gather(self, hints: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Run `hints`, which `add`, and meet everybody; returns when something was found or all is done."""
        sources = {asyncio.create_task(hint) for hint in hints}
        meetings: set[asyncio.Task[None]] = set()
        wake = asyncio.create_task(self._wake.wait())
        try:
            while (sources or meetings or self._waiting) and not self._found():
                while self._waiting and len(meetings) < AT_ONCE:
                    meetings.add(asyncio.create_task(self._try(self._waiting.popleft())))
                if wake.done():
                    self._wake.clear()
                    wake = asyncio.create_task(self._wake.wait())
                # It may also be heard of in another way.
                done, _ = await asyncio.wait(
                    {wake, *sources, *meetings},
                    timeout=_HEARD_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                sources, meetings = _without(sources, done), _without(meetings, done)
        finally:
            tasks = [wake, *sources, *meetings]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _try(self, address: Address) -> None:
        try:
            await self._meet(address)
        except SwarmError as error:
            _log.debug("who was named could not be met: %s", error)


def _without(
    tasks: Set[asyncio.Task[None]], done: Set[asyncio.Task[Any]]
) -> set[asyncio.Task[None]]:
    for task in tasks & done:
        task.result()
    return set(tasks - done)
