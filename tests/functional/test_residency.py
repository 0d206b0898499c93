"""When a model has a worker: loaded on first use, unloaded when idle or when another needs the room, started again when it dies.

On the real llama.cpp and a real small model, but for what a GPU would do.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from daemon.config import Engine as Settings
from daemon.engine import cores, resident
from daemon.engine.cores import Reading
from daemon.engine.gguf import inspect
from daemon.engine.host import EngineHost
from daemon.engine.interface import Delta, EmbeddingRequest, ServeOptions
from daemon.engine.memory import estimate_embedding, estimate_memory
from daemon.engine.process import WorkerProcess
from daemon.engine.protocol import Load
from daemon.errors import InferenceError, ModelLoadError, NoMemory, Refused, Restarting, SwarmError, Unavailable
from tests.functional.engines import KEY, OTHER, File, alive, answer, ask, children, load, nothing, until, worker_of
from tests.unit.gguf_files import tiny_gguf

MODELS = (KEY, OTHER, "ef" * 32)
SMALL: dict[str, Any] = {"context": 256, "slots": 1}
Make = Callable[..., EngineHost]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Changes:
    """What `on_change` was told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, key: str) -> None:
        self.seen.append(key)


class Others:
    """Stands in for a machine on which others use so many `cores`."""

    def __init__(self, cores: float) -> None:
        self.cores = cores
        self._at = self._busy = 0.0

    def __call__(self, pids: Sequence[int]) -> Reading:
        self._at += 1
        self._busy += self.cores
        return Reading(tuple(pids), self._at, self._busy, 0.0)


@pytest_asyncio.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[EngineHost] = []

    def host(
        changes: Callable[[str], None] = nothing, free: int | None = None, others: Others | None = None, **settings: Any
    ) -> EngineHost:
        told = Settings(**{"threads": 1, "context": 256, "slots": 1, **settings})
        more: dict[str, Any] = {} if free is None else {"free_memory": functools.partial(int, free)}
        more |= {} if others is None else {"read_cores": others}
        made.append(EngineHost(told, tmp_path / "logs", changes, queue=4, **more))
        return made[-1]

    yield host
    for engine in made:
        await engine.close()


@pytest.fixture
def engine(make: Make) -> EngineHost:
    return make()


def states(engine: EngineHost) -> dict[str, str]:
    return {key: served.state for key, served in engine.models().items()}


async def begin(engine: EngineHost, path: Path, key: str = KEY, name: str = "tiny") -> AsyncIterator[Delta]:
    """An answer that has begun and goes on."""
    chat = engine.provider(key, File(path, name)).generate(ask("Count from 1 to 1000.", max_tokens=None))
    assert (await anext(chat)).text
    return chat


async def close(chat: AsyncIterator[Delta]) -> None:
    await chat.aclose()  # type: ignore[attr-defined]  # every async generator has it


# -- loaded on first use ------------------------------------------------------------------------------------------------


async def test_a_model_is_loaded_when_it_is_asked_and_once_for_all_who_ask(engine: EngineHost, model_file: Path) -> None:
    file = File(model_file)
    provider = engine.provider(KEY, file)
    assert engine.models() == {} and children() == []
    assert len(await asyncio.gather(*(answer(provider, ask(f"Name {n} colours.", max_tokens=4)) for n in range(3)))) == 3
    assert (states(engine), file.checks, len(children())) == ({KEY: "loaded"}, 1, 1)
    assert engine.provider(KEY, file) is provider


async def test_what_may_not_be_loaded_says_so_to_whoever_asks(engine: EngineHost, model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="blocked"):
        await answer(engine.provider(KEY, File(model_file, refusal=Refused("tiny", "it is blocked"))), ask())
    with pytest.raises(ModelLoadError, match=r"llama\.cpp refused"):
        await answer(engine.provider(OTHER, File(tiny_gguf(tmp_path / "tiny.gguf"))), ask())
    assert engine.models() == {} and children() == []


async def test_a_load_that_nobody_waits_for_any_more_is_cancelled(engine: EngineHost, model_file: Path) -> None:
    provider = engine.provider(KEY, File(model_file))
    asking = [asyncio.create_task(answer(provider, ask(max_tokens=2))) for _ in range(2)]
    await until(children)
    asking[0].cancel()
    assert (await asking[1])[1].usage is not None
    await engine.unload(KEY)
    asking = [asyncio.create_task(answer(provider, ask(max_tokens=2))) for _ in range(2)]
    await until(children)
    for one in asking:
        one.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    assert engine.models() == {} and children() == []


async def test_to_serve_what_a_chat_is_loading_waits_for_it_and_leaves_the_chat_alone(engine: EngineHost, model_file: Path) -> None:
    file = File(model_file)
    asking = asyncio.create_task(answer(engine.provider(KEY, file), ask(max_tokens=8)))
    await until(children)
    served = await engine.keep(KEY, file, ServeOptions())
    assert (await asking)[1].usage is not None
    assert (engine.models()[KEY].pid, file.checks) == (served.pid, 1)


# -- options ------------------------------------------------------------------------------------------------------------


async def test_a_kept_model_stays_as_it_is_unless_something_else_is_asked_for(engine: EngineHost, model_file: Path) -> None:
    first = await engine.keep(KEY, File(model_file), ServeOptions(**SMALL))
    again = await engine.keep(KEY, File(model_file), ServeOptions(**SMALL, threads=1, keep_alive=9))
    assert (again.pid, again.options.keep_alive) == (first.pid, 9)
    other = await engine.keep(KEY, File(model_file), ServeOptions(context=512, slots=2, batch=128))
    assert (other.context, other.slots, other.options.batch) == (512, 2, 128)
    assert not alive(first.pid) and alive(other.pid)
    assert (await answer(engine.provider(KEY, File(model_file)), ask(max_tokens=2)))[1].usage is not None


async def test_options_that_do_not_fit_leave_the_worker_alone(make: Make, model_file: Path, needed: int) -> None:
    engine = make(memory=needed + (50 << 20))
    first = await engine.keep(KEY, File(model_file), ServeOptions(**SMALL))
    for options in (ServeOptions(context=8193), ServeOptions(batch=257, context=256), ServeOptions(context=8192)):
        with pytest.raises(SwarmError):
            await engine.keep(KEY, File(model_file), options)
    assert engine.models()[KEY].pid == first.pid and alive(first.pid)


async def test_a_gpu_that_has_no_room_is_left_out_unless_somebody_chose_the_layers(
    engine: EngineHost, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[int] = []
    dispatch = WorkerProcess._dispatch
    start = WorkerProcess.start.__func__  # type: ignore[attr-defined]  # a classmethod has it

    async def started(cls: type[WorkerProcess], load: Load, *args: Any, **kwargs: Any) -> WorkerProcess:
        layers.append(load["gpu_layers"])
        return await start(cls, load, *args, **kwargs)  # type: ignore[no-any-return]

    def fail(worker: WorkerProcess, message: dict[str, Any]) -> None:
        if message["type"] == "stage":
            message["gpu"] = True
        if message["type"] == "ready" and layers[-1]:
            message = {"type": "failed", "why": "cudaMalloc failed: out of memory"}
        dispatch(worker, message)

    monkeypatch.setattr(WorkerProcess, "start", classmethod(started))
    monkeypatch.setattr(WorkerProcess, "_dispatch", fail)
    await engine.keep(KEY, File(model_file), ServeOptions())
    assert layers == [-1, 0] and states(engine) == {KEY: "loaded"}
    with pytest.raises(ModelLoadError, match="cudaMalloc"):
        await engine.keep(OTHER, File(model_file), ServeOptions(gpu_layers=3))
    assert layers == [-1, 0, 3]


# -- unloaded when idle -------------------------------------------------------------------------------------------------


async def test_an_idle_model_is_unloaded_and_comes_back_as_it_was(engine: EngineHost, model_file: Path) -> None:
    first = await engine.keep(KEY, File(model_file), ServeOptions(context=512, slots=2, keep_alive=0.05))
    await until(lambda: states(engine) == {KEY: "idle"})
    await until(lambda: not alive(first.pid))
    idle = engine.models()[KEY]
    assert (idle.pid, idle.memory, idle.expires) == (None, 0, None)
    assert (idle.context, idle.slots, idle.free_slots) == (512, 2, 2)
    assert idle.tokens_per_second == first.tokens_per_second > 0
    seen = [engine.models()[KEY] async for _ in engine.provider(KEY, File(model_file)).generate(ask(max_tokens=3))]
    assert all((one.state, one.context, one.slots, one.free_slots, one.expires) == ("loaded", 512, 2, 1, None) for one in seen)
    await until(lambda: states(engine) == {KEY: "idle"})


@pytest.mark.parametrize("keep_alive", [0, -1])
async def test_a_model_may_leave_after_each_answer_or_never(make: Make, model_file: Path, keep_alive: float) -> None:
    engine = make(keep_alive=keep_alive)
    await answer(engine.provider(KEY, File(model_file)), ask(max_tokens=2))
    if keep_alive:
        assert engine.models()[KEY].expires is None and states(engine) == {KEY: "loaded"}
    else:
        await until(lambda: not engine.models() and not children())


async def test_a_model_that_answers_is_not_unloaded(engine: EngineHost, model_file: Path) -> None:
    await engine.keep(KEY, File(model_file), ServeOptions(keep_alive=0, slots=2))
    chat = await begin(engine, model_file)
    await answer(engine.provider(KEY, File(model_file)), ask(max_tokens=2))  # its end is not the end of the other
    now = engine.models()[KEY]
    assert (now.state, now.expires) == ("loaded", None) and alive(now.pid)
    assert (await anext(chat)).text
    await close(chat)
    await until(lambda: states(engine) == {KEY: "idle"})


# -- memory -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def needed(model_file: Path) -> int:
    """Bytes for one model with the settings of `make`."""
    return estimate_memory(inspect(model_file), 256, 1, 256)


@pytest.fixture
def more(model_file: Path) -> int:
    """Bytes beside them as soon as it embeds."""
    return estimate_embedding(inspect(model_file), 1, 256)


async def test_the_least_recently_used_leaves_first(make: Make, model_file: Path, needed: int) -> None:
    engine = make(memory=2 * needed + (1 << 20))
    one, two, three = ((key, File(model_file, key[:2])) for key in MODELS)
    await engine.keep(*one, ServeOptions())
    await engine.keep(*two, ServeOptions())
    await answer(engine.provider(*one), ask(max_tokens=2))
    await answer(engine.provider(*three), ask(max_tokens=2))
    assert states(engine) == {one[0]: "loaded", two[0]: "idle", three[0]: "loaded"}
    await answer(engine.provider(*two), ask(max_tokens=2))  # it is still served
    assert states(engine) == {one[0]: "idle", two[0]: "loaded", three[0]: "loaded"}
    assert len(children()) == 2


async def test_a_model_that_answers_never_leaves_and_nothing_leaves_in_vain(make: Make, model_file: Path, needed: int) -> None:
    engine = make(memory=2 * needed + (1 << 20))
    chat = await begin(engine, model_file, name="talker")
    await engine.keep(OTHER, File(model_file, "idler"), ServeOptions())
    with pytest.raises(NoMemory, match=r"needs about \d+ MiB of memory, \d+ MiB are available while talker is answering"):
        await engine.keep(MODELS[2], File(model_file, "large"), ServeOptions(context=8192))
    assert states(engine) == {KEY: "loaded", OTHER: "loaded"}
    assert (await anext(chat)).text
    await close(chat)


async def test_a_model_too_large_for_the_machine_is_not_loaded(make: Make, model_file: Path) -> None:
    for engine in (make(free=100 << 20), make(memory=100 << 20)):
        with pytest.raises(NoMemory, match=r"needs about \d+ MiB of memory, 100 MiB are available;"):
            await engine.keep(KEY, File(model_file), ServeOptions())
        assert engine.models() == {}


async def test_what_loaded_models_still_need_of_free_memory_counts(make: Make, model_file: Path, needed: int) -> None:
    engine = make(free=needed + (20 << 20))  # the kernel says so again and again, and calls mapped weights free
    chat = await begin(engine, model_file)
    with pytest.raises(NoMemory, match="tiny is answering"):
        await engine.keep(OTHER, File(model_file), ServeOptions())
    await close(chat)


@linux
@pytest.mark.parametrize(("context", "slots", "batch"), [(256, 1, 64), (2048, 4, 512), (8192, 8, 256), (1024, 2, 1024)])
async def test_the_estimate_is_not_less_than_the_truth(engine: EngineHost, model_file: Path, context: int, slots: int, batch: int) -> None:
    served = await engine.keep(KEY, File(model_file), ServeOptions(context=context, slots=slots, batch=batch))
    provider = engine.provider(KEY, File(model_file))
    await answer(provider, ask("word " * (batch // 2), max_tokens=2))
    await provider.embed(EmbeddingRequest(("word " * (batch // 2 - 8),) * 2))
    status = Path(f"/proc/{served.pid}/status").read_text()
    resident = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert resident <= engine.models()[KEY].memory < 1.5 * resident


async def test_room_to_embed_is_made_when_somebody_embeds(make: Make, model_file: Path, needed: int, more: int) -> None:
    texts = EmbeddingRequest(("a cat",))
    engine = make(memory=2 * needed + more - 1)
    await engine.keep(OTHER, File(model_file, "idler"), ServeOptions())
    provider = await load(engine, model_file)
    assert engine.models()[KEY].memory == needed
    chat = await begin(engine, model_file, OTHER)
    with pytest.raises(NoMemory, match="answering"):
        await provider.embed(texts)
    await close(chat)
    for _ in range(2):
        assert (await provider.embed(texts)).vectors
        assert engine.models()[KEY].memory == needed + more
    assert states(engine) == {KEY: "loaded", OTHER: "idle"}


# -- cores --------------------------------------------------------------------------------------------------------------


async def test_threads_leave_alone_the_cores_that_others_want(make: Make, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    monkeypatch.setattr(WorkerProcess, "set_threads", lambda self, count: told.append(count))
    others = Others(0.1)
    engine = make(others=others, threads=0)
    chat = await begin(engine, model_file)
    others.cores = 1.8
    await until(lambda: told == [2])
    others.cores = 6.0
    await until(lambda: told == [2, 1])
    others.cores = 0.1
    await until(lambda: told == [2, 1, 4])
    await close(chat)


async def test_threads_that_somebody_chose_stay(make: Make, model_file: Path) -> None:
    engine = make(others=Others(1.0), threads=2)
    chat = await begin(engine, model_file)
    await close(chat)
    assert engine._supervisor.state() == {}  # nobody looks what others use


# -- dying --------------------------------------------------------------------------------------------------------------


async def test_a_killed_worker_is_an_error_and_the_next_one_answers(make: Make, model_file: Path) -> None:
    changes = Changes()
    engine = make(changes, slots=2)
    provider = await load(engine, model_file)
    chats = [await begin(engine, model_file) for _ in range(2)]
    pid = engine.models()[KEY].pid
    changes.seen.clear()
    worker_of(engine)._process.kill()
    for chat in chats:
        with pytest.raises(InferenceError, match="SIGKILL"):
            async for delta in chat:
                assert delta.finish is None
    died = engine.models()[KEY]
    assert (died.state, died.pid, died.free_slots, died.slots) == ("restarting", None, 0, 2)
    assert died.reason is not None and "SIGKILL (out of memory?)" in died.reason
    assert changes.seen == [KEY]
    assert (await answer(provider, ask(max_tokens=2)))[1].usage is not None  # it waits for the next worker
    again = engine.models()[KEY]
    assert (again.state, again.restarts, again.free_slots, again.reason) == ("loaded", 1, 2, died.reason)
    assert again.pid != pid and changes.seen[1:]


async def test_a_kept_model_comes_back_by_itself_and_another_does_not(engine: EngineHost, model_file: Path) -> None:
    await engine.keep(KEY, File(model_file), ServeOptions())
    await answer(engine.provider(OTHER, File(model_file)), ask(max_tokens=2))
    for key in (KEY, OTHER):
        worker_of(engine, key)._process.kill()
    await until(lambda: engine.models().get(KEY) and engine.models()[KEY].restarts == 1)
    assert states(engine) == {KEY: "loaded"}
    assert (await answer(engine.provider(OTHER, File(model_file)), ask(max_tokens=2)))[1].usage is not None


async def test_a_worker_that_dies_again_and_again_is_no_busy_loop(
    engine: EngineHost, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "PATIENCE_S", 0.0)
    provider = await load(engine, model_file)
    for crash in range(3):
        await until(lambda: states(engine) == {KEY: "loaded"})
        os.kill(worker_of(engine).pid, signal.SIGVTALRM)  # as a template bomb ends it
        await until(lambda: states(engine) == {KEY: "restarting"})
        with pytest.raises(Restarting, match=r"chat template.*; it is started again in \d+ s"):
            await answer(provider, ask())
        assert engine._residents[KEY]._failures == crash + 1
    await until(lambda: states(engine) == {KEY: "loaded"})
    assert engine.models()[KEY].restarts == 3
    await answer(provider, ask(max_tokens=2))
    assert engine._residents[KEY]._failures == 0


async def test_a_worker_that_speaks_nonsense_is_ended(engine: EngineHost, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await load(engine, model_file)
    dispatch = WorkerProcess._dispatch
    monkeypatch.setattr(WorkerProcess, "_dispatch", lambda worker, message: dispatch(worker, {}))
    with pytest.raises(InferenceError, match="SIGKILL"):
        await answer(engine.provider(KEY, File(model_file)), ask(max_tokens=2))
    monkeypatch.undo()
    await until(lambda: states(engine) == {KEY: "loaded"})


async def test_without_room_for_its_log_a_worker_is_not_started(tmp_path: Path, model_file: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    engine = EngineHost(Settings(), tmp_path / "logs", nothing)
    with pytest.raises(ModelLoadError, match="no folder"):
        await engine.keep(KEY, File(model_file), ServeOptions())
    await engine.close()


# -- ending -------------------------------------------------------------------------------------------------------------


async def test_unload_ends_the_process_and_its_answers(engine: EngineHost, model_file: Path) -> None:
    await load(engine, model_file)
    chat = await begin(engine, model_file)
    worker = worker_of(engine)
    assert await engine.unload(KEY)
    assert not alive(worker.pid) and not worker._folder.exists()
    with pytest.raises(InferenceError, match="stopped"):
        async for _ in chat:
            pass
    assert not await engine.unload(KEY)
    assert engine.models() == {}


async def test_what_is_stopped_while_it_is_loaded_is_not_waited_for(engine: EngineHost, model_file: Path) -> None:
    keeping = asyncio.create_task(engine.keep(KEY, File(model_file), ServeOptions()))
    asking = asyncio.create_task(answer(engine.provider(OTHER, File(model_file)), ask()))
    await until(children)
    assert await engine.unload(KEY) and await engine.unload(OTHER)
    for waiting in (keeping, asking):
        with pytest.raises(Unavailable, match="stopped"):
            await waiting
    assert engine.models() == {} and children() == []


async def test_what_is_stopped_while_it_waits_to_be_started_again_is_gone(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)
    worker_of(engine)._process.kill()
    await until(lambda: states(engine) == {KEY: "restarting"})
    asking = asyncio.create_task(answer(provider, ask()))
    await asyncio.sleep(0)
    assert await engine.unload(KEY)
    with pytest.raises(Unavailable, match="stopped"):
        await asking
    assert engine.models() == {} and children() == []


async def test_close_ends_loads_too(engine: EngineHost, model_file: Path) -> None:
    loading = [asyncio.create_task(engine.keep(key, File(model_file), ServeOptions())) for key in (KEY, OTHER)]
    await until(children)
    await engine.close()
    for one in loading:
        with pytest.raises(Unavailable):
            await one
    assert children() == []
    with pytest.raises(Unavailable, match="shutting down"):
        await engine.keep(KEY, File(model_file), ServeOptions())
    await engine.close()
