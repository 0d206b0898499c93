"""Several ways at once, and the first of them that works.

A runner returns what it holds open and what it found, `(AsyncExitStack, ...)`, or nothing that must be closed.

    running -> won     what it holds is the caller's
            -> lost    cancelled; what it holds is closed in the background, by `Losers`
            -> failed  its reason is told when nobody wins
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine, Iterable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from daemon.errors import Declined, SwarmError, Unserved, VerificationError

T = TypeVar("T")
_log = logging.getLogger(__name__)

RACES_ENDING = 64  # whose losers may be on their way out at the same time
_END_S = 5.0  # for a loser to clean up before it is broken off


class Losers:
    """Owns what lost a race until it is closed, so that nobody waits for it with an answer in hand."""

    def __init__(self) -> None:
        self._ending: set[asyncio.Task[None]] = set()

    def take(self, tasks: Collection[asyncio.Task[Any]]) -> None:
        """Cancel these, and close what they opened nevertheless."""
        for task in tasks:
            task.cancel()
        if not tasks:
            return
        ending = asyncio.create_task(_end(tasks), name="end the losers of a race")
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def room(self) -> None:
        """Wait while more than `RACES_ENDING` races are ending."""
        while len(self._ending) >= RACES_ENDING:
            await asyncio.wait(self._ending, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Wait for all of them, which takes seconds at most. Idempotent."""
        while self._ending:
            await asyncio.wait(self._ending)


async def first(runners: Iterable[Coroutine[Any, Any, T]], losers: Losers) -> T:
    """What the first runner to succeed returns, at once; the others are `losers`.

    When all fail with a `SwarmError`: raises the only one, else `Unserved` with every reason (`Declined` if that was one of
    them). Any other exception at once. Whoever is cancelled holds nothing open.
    """
    tasks = [asyncio.create_task(runner) for runner in runners]
    lost = set(tasks)
    try:
        winner = await _winner(tasks)
        for task in lost - {winner}:
            task.cancel()  # none goes on while there is no room
        await losers.room()
        lost.remove(winner)
        return winner.result()
    finally:
        losers.take(lost)


async def _winner(tasks: Collection[asyncio.Task[T]]) -> asyncio.Task[T]:
    """The first that succeeds. Raises as `first` does."""
    failures: list[SwarmError] = []
    running = set(tasks)
    while running:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in (one for one in tasks if one in done):
            error = task.exception()
            if error is None:
                return task
            if not isinstance(error, SwarmError):
                raise error
            failures.append(error)
    raise _nobody(failures)


def _nobody(failures: list[SwarmError]) -> SwarmError:
    """One error for all of them."""
    if len(failures) == 1:
        return failures[0]
    if failures and all(isinstance(failure, VerificationError) for failure in failures):
        return failures[0]
    reasons = dict.fromkeys(failure.why for failure in failures)
    declined = any(isinstance(failure, Declined) for failure in failures)
    why = "; ".join(reasons) or "there is no way to it"
    return (Declined if declined else Unserved)("peer", why, "check that it runs, and its address")


async def _end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Until tasks that were cancelled have ended, and nothing of theirs is open."""
    _, late = await asyncio.wait(tasks, timeout=_END_S)
    if late:
        for task in late:
            task.cancel()  # its own clean-up hangs
        _, late = await asyncio.wait(late, timeout=_END_S)
    for task in late:
        _log.error("a way that was given up does not end: %s", task)
    await asyncio.gather(*(_close(task) for task in tasks if task not in late))


async def _close(task: asyncio.Task[Any]) -> None:
    """Close what a task that has ended holds open. What it failed with is nobody's concern unless it is a fault of ours."""
    if task.cancelled():
        return
    error = task.exception()
    if error is None:
        match task.result():
            case (AsyncExitStack() as stack, *_):
                error = await _closed(stack)
    if error is not None and not isinstance(error, SwarmError):
        _log.error("a way that was given up failed", exc_info=error)


async def _closed(stack: AsyncExitStack) -> Exception | None:
    """What closing it failed with."""
    try:
        async with asyncio.timeout(_END_S):
            await stack.aclose()
    except Exception as error:  # told by the caller, whatever it is: the other losers are closed, too
        return error
    return None


class Race:
    """Lets those that wait start when nobody else is left."""

    def __init__(self, runners: int) -> None:
        self._running = runners
        self._waiting = 0
        self._alone = asyncio.Event()

    async def wait(self, delay_s: float) -> None:
        if not delay_s:
            return
        self._waiting += 1
        self._look()
        try:
            async with asyncio.timeout(delay_s):
                await self._alone.wait()
        except TimeoutError:
            pass  # the head start of the others is over
        finally:
            self._waiting -= 1

    def failed_or_won(self) -> None:
        self._running -= 1
        self._look()

    def _look(self) -> None:
        if self._waiting and self._waiting >= self._running:
            self._alone.set()
