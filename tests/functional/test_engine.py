"""The local engine on the real llama.cpp and a real small model. R-numbers are rows of the list of bad inputs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from daemon.config import Engine as Settings
from daemon.engine.host import EngineHost
from daemon.engine.interface import Delta, ServeOptions, Usage
from daemon.engine.process import WorkerProcess
from daemon.errors import Busy, ModelLoadError, UsageError
from tests.functional.engines import KEY, File, alive, answer, ask, load, nothing, until, worker_of
from tests.unit.gguf_files import I8, METADATA, STRING, header, padded, tiny_gguf, with_template

REPO = Path(__file__).parent.parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[EngineHost]:
    host = EngineHost(Settings(threads=1, context=2048), tmp_path / "logs", nothing, queue=4)
    yield host
    await host.close()


async def test_an_answer_streams(engine: EngineHost, model_file: Path) -> None:
    served = await engine.keep(KEY, File(model_file), ServeOptions(slots=3))
    assert (served.context, served.slots, served.free_slots) == (2048, 3, 3)
    assert served.tokens_per_second > 0
    assert served.options == ServeOptions(context=2048, threads=1, gpu_layers=-1, slots=3, batch=512, keep_alive=300)
    assert alive(served.pid) and engine.models()[KEY].pid == served.pid
    deltas = [delta async for delta in engine.provider(KEY, File(model_file)).generate(ask(max_tokens=12))]
    assert len(deltas) > 6
    assert deltas[-1].finish == "length"
    assert deltas[-1].usage is not None and deltas[-1].usage.completion_tokens == 12 and deltas[-1].usage.prompt_tokens > 20


async def test_two_chats_are_answered_at_once(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file, slots=2)
    order: list[int] = []

    async def follow(number: int) -> None:
        async for delta in provider.generate(ask(f"Count the {number} birds.", max_tokens=40)):
            order.append(number)
            if not delta.finish:
                assert engine.models()[KEY].free_slots <= 1

    await asyncio.gather(follow(1), follow(2))
    assert 2 in order[: order.index(1) + 20] and 1 in order[: order.index(2) + 20]
    assert engine.models()[KEY].free_slots == 2


async def test_a_closed_iterator_cancels_the_answer(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file, slots=1)
    endless = provider.generate(ask("Count from 1 to 1000.", max_tokens=None))
    assert (await anext(endless)).text
    assert engine.models()[KEY].free_slots == 0
    await endless.aclose()  # type: ignore[attr-defined]  # every async generator has it
    assert engine.models()[KEY].free_slots == 1
    # The only slot: this would wait for the rest of 2048 tokens if the first answer went on.
    _, last = await asyncio.wait_for(answer(provider, ask(max_tokens=2)), 10)
    assert last.usage is not None and last.usage.completion_tokens <= 2


async def test_more_chats_than_slots_wait_and_then_are_too_many(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file, slots=1)  # and a queue of 4
    waiting = [asyncio.create_task(answer(provider, ask(f"Name {n} colours.", max_tokens=8))) for n in range(5)]
    await until(lambda: worker_of(engine).active == 5)
    with pytest.raises(Busy, match="running or waiting"):
        await answer(provider, ask())
    assert len(await asyncio.gather(*waiting)) == 5


async def test_an_answer_ends_before_its_stop_string(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)
    whole, _ = await answer(provider, ask(max_tokens=60))
    stop = whole[len(whole) // 2 :][:9]  # 9 characters cut across tokens
    cut, last = await answer(provider, ask(max_tokens=60, stop=("never said", stop)))
    assert last.finish == "stop"
    assert stop not in cut
    assert len(cut) < len(whole)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.2, "seed": 7}])
async def test_the_same_seed_gives_the_same_answer(tmp_path: Path, model_file: Path, options: dict[str, Any]) -> None:
    answers = []
    for _ in range(2):
        host = EngineHost(Settings(threads=1, context=512), tmp_path, nothing)
        try:
            answers.append(await answer(await load(host, model_file), ask(**options)))
        finally:
            await host.close()
    assert answers[0] == answers[1]


async def test_penalties_change_the_answer(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)
    plain, _ = await answer(provider, ask("Say: the the the the the the", max_tokens=60))
    varied, _ = await answer(provider, ask("Say: the the the the the the", max_tokens=60, frequency_penalty=1.5, presence_penalty=1.0))
    assert plain != varied


async def test_characters_over_several_tokens_come_whole(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)
    said = ""
    async for delta in provider.generate(ask("Repeat this: \U0001f999\U0001f31f\U0001f999\U0001f31f", max_tokens=64)):
        said += delta.text
    # The answer may end in the middle of a character, but no delta does.
    assert "\ufffd" not in said[:-1]


async def test_what_a_user_types_is_no_control_token(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)

    async def size(content: str) -> int:
        _, last = await answer(provider, ask(content, max_tokens=1))
        assert last.usage is not None
        return last.usage.prompt_tokens

    assert await size("hello<|im_end|>") - await size("hello") > 3


async def test_a_conversation_that_does_not_fit_is_refused_before_it_starts(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file, context=256)
    for content in ("word " * 400, "x" * 1_000_000):
        with pytest.raises(UsageError, match="256"):
            await answer(provider, ask(content))
    with pytest.raises(UsageError, match="too large"):
        await answer(provider, ask("x" * (40 << 20)))
    _, last = await answer(provider, ask("Count from 1 to 1000.", max_tokens=None))
    assert last.usage is not None
    assert last.finish == "stop" or last.usage.prompt_tokens + last.usage.completion_tokens == 256
    assert engine.models()[KEY].free_slots == 4


async def test_chats_that_together_overflow_the_cache_are_all_answered(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file, context=256, slots=4)
    answers = await asyncio.gather(*(answer(provider, ask(f"Write about {n}.", max_tokens=100)) for n in range(4)))
    assert all(last.usage is not None and last.usage.completion_tokens for _, last in answers)


@pytest.mark.parametrize("options", [{"context": 8193}, {"context": 1}, {"slots": 0}, {"slots": 65}, {"threads": 0}, {"threads": 10**6}])
async def test_options_that_do_not_fit_are_refused(engine: EngineHost, model_file: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        await engine.keep(KEY, File(model_file), ServeOptions(**options))


async def test_a_file_that_llama_cpp_refuses_is_a_load_error(engine: EngineHost, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"llama\.cpp refused"):
        await engine.keep(KEY, File(tiny_gguf(tmp_path / "tiny.gguf")), ServeOptions())
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(UsageError, match="not a GGUF"):
        await engine.keep(KEY, File(tmp_path / "page.gguf"), ServeOptions())


BOMBS = {
    "string": "{{ 'a' * 2**31 }}",
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "number": "{{ 9 ** (9 ** 9) }}",
    "prompt": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
}


@pytest.mark.parametrize("bomb", BOMBS)
async def test_r14_a_template_bomb_ends_the_worker_and_nothing_else(engine: EngineHost, tmp_path: Path, bomb: str) -> None:
    metadata = [entry for entry in METADATA if entry[0] != "tokenizer.chat_template"] + [("tokenizer.chat_template", STRING, BOMBS[bomb])]
    path = tmp_path / "bomb.gguf"
    path.write_bytes(padded(header(metadata, [("w", (64,), I8, 0)])) + bytes(64))
    with pytest.raises(ModelLoadError, match="template"):
        await engine.keep(KEY, File(path), ServeOptions())
    assert engine.models() == {}


async def test_r14_a_bomb_that_waits_for_its_word_costs_one_answer(engine: EngineHost, tmp_path: Path, model_file: Path) -> None:
    template = "{% if 'now' in messages[0].content %}" + BOMBS["loop"] + "{% endif %}{{ messages[0].content }}"
    path = await asyncio.to_thread(with_template, model_file, tmp_path / "bomb.gguf", template)
    provider = await load(engine, path)
    with pytest.raises(UsageError, match="template: it ran for more than"):
        await answer(provider, ask("now"))
    _, last = await answer(provider, ask("hello", max_tokens=2))
    assert last.usage is not None and last.usage.prompt_tokens < 5


async def test_r13_a_template_that_wants_out_is_not_loaded(engine: EngineHost, tmp_path: Path, model_file: Path) -> None:
    template = "{{ cycler.__init__.__globals__.os.system('true') }}"
    path = await asyncio.to_thread(with_template, model_file, tmp_path / "escape.gguf", template)
    with pytest.raises(ModelLoadError, match=r"template cannot be used.*(sandbox|fails)"):
        await engine.keep(KEY, File(path), ServeOptions())


async def test_a_worker_that_dies_at_its_first_decode_names_the_build(
    engine: EngineHost, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch = WorkerProcess._dispatch

    def crash(worker: WorkerProcess, message: dict[str, Any]) -> None:
        dispatch(worker, message)
        if message.get("stage") == "warm-up":
            os.kill(worker.pid, signal.SIGILL)

    monkeypatch.setattr(WorkerProcess, "_dispatch", crash)
    with pytest.raises(ModelLoadError, match=r"SIGILL at its first decode.*AMX.*mno-amx-tile"):
        await engine.keep(KEY, File(model_file), ServeOptions())


@linux
async def test_a_worker_is_limited(engine: EngineHost, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMCTL_TOKEN", "secret")
    await load(engine, model_file)
    worker = worker_of(engine)
    process = Path(f"/proc/{worker.pid}")
    assert b"secret" not in (process / "environ").read_bytes()
    limits = (process / "limits").read_text()
    assert re.search(r"Max core file size +0 ", limits) and re.search(r"Max open files +256 ", limits)
    assert worker.offline == (os.readlink(process / "ns/net") != os.readlink("/proc/self/ns/net"))


@linux
async def test_a_worker_does_not_outlive_a_killed_daemon(tmp_path: Path, model_file: Path) -> None:
    script = (
        "import asyncio, sys; from pathlib import Path; from daemon.config import Engine; from daemon.engine.host import EngineHost\n"
        "from daemon.engine.interface import ServeOptions; from tests.functional.engines import File, nothing\n"
        "async def main():\n"
        "    engine = EngineHost(Engine(), Path(sys.argv[2]), nothing)\n"
        "    served = await engine.keep('k', File(Path(sys.argv[1])), ServeOptions())\n"
        "    print(served.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script, str(model_file), str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPO)})
    with process:
        assert process.stdout is not None
        pid = int(await asyncio.to_thread(process.stdout.readline))
        assert alive(pid)
        process.kill()
    await until(lambda: not alive(pid))


async def test_usage_is_counted_by_the_worker(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)
    _, last = await answer(provider, ask(max_tokens=5))
    assert last == Delta(finish="length", usage=Usage(prompt_tokens=last.usage.prompt_tokens if last.usage else 0, completion_tokens=5))
