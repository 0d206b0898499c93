"""Waiting for threads, and for each other: what a task may leave behind when it is cancelled is nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


class Stopped(Exception):
    """The caller was cancelled, and its work ended early. Nobody sees this."""


async def stoppable(work: Callable[[threading.Event], T]) -> T:
    """`work(stop)` on a thread. It looks at `stop` now and then and raises `Stopped`; a cancelled call returns when it has ended.

    For whatever takes long or writes: a thread that is left behind would write after everybody thinks that it was over, and
    the end of the process waits for it.
    """
    stop = threading.Event()
    thread = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([thread])
        thread.exception()  # it was stopped, and says so
        raise


async def close(iterator: AsyncIterator[Any]) -> None:
    """Close an iterator that can be closed, which ends what it waits for; plain iterators cannot, and need not."""
    aclose = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()


class KeyLocks:
    """A lock for each key: `async with locks(key)`. One is there as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __call__(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())
