"""Nothing of a cancelled task goes on, and locks are there only while somebody needs them."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from daemon.waiting import KeyLocks, Stopped, stoppable


async def test_a_cancelled_call_returns_when_its_thread_has_ended() -> None:
    began, ended = threading.Event(), threading.Event()

    def work(stop: threading.Event) -> None:
        began.set()
        stop.wait(10)
        ended.set()
        raise Stopped

    task = asyncio.create_task(stoppable(work))
    await asyncio.to_thread(began.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_results_and_errors_come_through() -> None:
    assert await stoppable(lambda stop: stop.is_set()) is False

    def fail(stop: threading.Event) -> None:
        raise ValueError("what it says")

    with pytest.raises(ValueError, match="what it says"):
        await stoppable(fail)


async def test_one_at_a_time_for_each_key_and_nothing_is_left() -> None:
    locks = KeyLocks()
    inside: list[str] = []

    async def hold(key: str) -> None:
        async with locks(key):
            assert key not in inside
            inside.append(key)
            await asyncio.sleep(0)
            inside.remove(key)

    await asyncio.gather(*(hold(key) for key in "abab" * 5))
    async with locks("a"):
        assert not locks("b").locked()
        assert locks("a").locked()
    gc.collect()
    assert len(locks._locks) == 0
