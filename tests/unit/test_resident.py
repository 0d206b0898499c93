"""One model whose worker comes and goes, with a worker in Python: what happens when things happen at the same moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from daemon.engine import resident as module
from daemon.engine.interface import CAPABILITIES, ServeOptions, Source
from daemon.engine.process import WorkerProcess
from daemon.engine.resident import LONGEST_PAUSE_S, Loaded, Resident
from daemon.errors import ModelLoadError, Unavailable


class Named:
    name = "tiny"


class Worker:
    """`WorkerProcess` as far as a resident uses it."""

    pid, context, slots, tokens_per_second, capabilities, gone = 1, 256, 1, 1.0, CAPABILITIES, None
    on_gone: Callable[[str], None]

    async def stop(self) -> None:
        pass


class Engine:
    """What starts workers. `begin(n)` is awaited by the n-th start."""

    def __init__(self) -> None:
        self.starts = 0
        self.workers: list[Worker] = []
        self.changed: Callable[[], None] = lambda: None
        self.resident = Resident("ab", cast(Source, Named()), self.start, self.nothing, lambda one: None, lambda key: self.changed())

    async def begin(self, number: int) -> None:
        """Nothing by default."""

    async def nothing(self, resident: Resident) -> None:
        """Room to embed."""

    async def start(self, resident: Resident, asked: ServeOptions) -> Loaded:
        self.starts += 1
        await self.begin(self.starts)
        self.workers.append(Worker())
        return Loaded(cast(WorkerProcess, self.workers[-1]), asked, 1, 0, automatic=True, threads=1)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0)


async def test_who_asks_while_a_load_is_given_up_gets_the_next_one() -> None:
    engine, over = Engine(), asyncio.Event()

    async def begin(number: int) -> None:
        if number == 1:
            try:
                await asyncio.Event().wait()
            finally:
                await over.wait()  # its worker takes a while to end

    engine.begin = begin  # type: ignore[method-assign]
    first = asyncio.create_task(engine.resident.load())
    await until(lambda: engine.starts == 1)
    first.cancel()
    await asyncio.sleep(0)
    second = asyncio.create_task(engine.resident.load())
    await asyncio.sleep(0)
    over.set()
    await second
    assert engine.resident.loaded is not None and engine.starts == 2
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_who_asks_while_it_is_stopped_is_told() -> None:
    engine = Engine()

    async def begin(number: int) -> None:
        await asyncio.Event().wait()

    engine.begin = begin  # type: ignore[method-assign]
    asking = asyncio.create_task(engine.resident.load())
    await until(lambda: engine.starts == 1)
    assert await engine.resident.stop()
    with pytest.raises(Unavailable, match="stopped"):
        await asking
    assert engine.starts == 1


async def test_what_is_stopped_at_the_moment_it_is_loaded_is_not_kept() -> None:
    engine = Engine()
    stopping: list[asyncio.Task[bool]] = []
    engine.changed = lambda: stopping.append(asyncio.create_task(engine.resident.stop()))
    with pytest.raises(Unavailable, match="stopped"):
        await engine.resident.load_with(ServeOptions())
    assert await stopping[0] and engine.resident.loaded is None


async def test_the_pause_stays_short_after_any_number_of_failures() -> None:
    engine = Engine()

    async def begin(number: int) -> None:
        raise ModelLoadError("the model", "it is broken")

    engine.begin = begin  # type: ignore[method-assign]
    engine.resident._failures = 5000
    with pytest.raises(ModelLoadError):
        await engine.resident.load()
    assert engine.resident._retry_at is not None
    assert 0 < engine.resident._retry_at - asyncio.get_running_loop().time() <= LONGEST_PAUSE_S


async def test_a_restart_that_was_stopped_before_it_began_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.0)
    engine = Engine()
    for served in (1, 2):
        await engine.resident.load_with(ServeOptions())
        engine.resident.keep()
        engine.workers[-1].on_gone("it died")
        if served == 1:
            assert await engine.resident.stop()
    await until(lambda: engine.starts == 3)
    await engine.resident.stop()
