"""Background loops: restarts, crashes that show, and a bounded close."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from daemon.errors import Bug, Unavailable
from daemon.supervise import Supervisor


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_crashing_loop_is_retried_until_it_is_well_and_its_error_shows(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor(first_pause_s=0.001)
    runs = 0
    seen: list[str | None] = []
    release = asyncio.Event()

    async def loop() -> None:
        nonlocal runs
        runs += 1
        seen.append(supervisor.state()["loop"].error)
        if runs < 3:
            raise RuntimeError(f"number {runs}")
        await release.wait()

    supervisor.run("loop", loop, restart=True)
    await until(lambda: runs == 3)
    assert seen == [None, "RuntimeError: number 1", "RuntimeError: number 2"]
    assert supervisor.state()["loop"].crashes == 2
    assert "Traceback" in caplog.text
    release.set()
    await until(lambda: "loop" not in supervisor.state())
    await supervisor.close()


async def test_a_task_that_is_not_restarted_stays_visible_as_crashed() -> None:
    supervisor = Supervisor()

    async def once() -> None:
        raise KeyError("gone")

    supervisor.run("once", once, restart=False)
    await until(lambda: supervisor.state()["once"].state == "crashed")
    assert supervisor.state()["once"].error == "KeyError: 'gone'"
    await supervisor.close()
    assert supervisor.state() == {}


async def test_an_outage_is_one_line_in_the_log_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    supervisor = Supervisor(first_pause_s=0.0001, longest_pause_s=0.001)
    runs = 0

    async def loop() -> None:
        nonlocal runs
        runs += 1
        raise Unavailable("ipfs", "it is restarting")

    supervisor.run("listen", loop, restart=True)
    await until(lambda: runs > 5)
    await supervisor.close()
    assert len(caplog.records) == 1
    assert "Traceback" not in caplog.text


async def test_close_cancels_in_reverse_order_and_twice_is_fine() -> None:
    supervisor = Supervisor()
    ended: list[str] = []

    def forever(name: str) -> Callable[[], object]:
        async def loop() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(name)

        return loop

    for name in ("first", "second", "third"):
        supervisor.run(name, forever(name), restart=True)  # type: ignore[arg-type]  # the factory hides the coroutine type
    await asyncio.sleep(0)
    await supervisor.close()
    await supervisor.close()
    assert ended == ["third", "second", "first"]
    with pytest.raises(Bug):
        supervisor.run("late", forever("late"), restart=True)  # type: ignore[arg-type]  # as above


async def test_close_does_not_wait_for_a_task_that_refuses_to_stop(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor(close_s=0.05)
    release = asyncio.Event()
    done = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        done.set()

    supervisor.run("stubborn", stubborn, restart=False)
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await supervisor.close()
    assert "stubborn did not stop" in caplog.text
    release.set()
    await done.wait()


async def test_a_name_is_used_once_at_a_time_and_stop_frees_it() -> None:
    supervisor = Supervisor()

    async def loop() -> None:
        await asyncio.Event().wait()

    supervisor.run("x", loop, restart=True)
    with pytest.raises(Bug):
        supervisor.run("x", loop, restart=True)
    await supervisor.stop("x")
    supervisor.run("x", loop, restart=True)
    await supervisor.stop("unknown")
    await supervisor.close()


async def test_only_some_crashed_tasks_are_remembered() -> None:
    supervisor = Supervisor()

    async def once() -> None:
        raise Unavailable("x", "y")

    for i in range(100):
        supervisor.run(f"task {i}", once, restart=False)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert len(supervisor.state()) <= 34
    await supervisor.close()
