"""Answers of a real node beside llama.cpp's own server and the server of llama-cpp-python, in turn, in one run.

Prints medians and ratios; asserts only that every answer is whole. `SWARMCTL_BENCH_RUNS`, `SWARMCTL_BENCH_CHATS` ("1 4 8 16"),
`SWARMCTL_BENCH_TOKENS` and `SWARMCTL_BENCH_REQUESTS` change its size.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import pytest

from tests.bench.load import Answer, Crowd, Route, Target, ask, client, crowd, question, stream
from tests.bench.rivals import CORES, GEMMA, Ours, llama_server, python_server
from tests.conftest import CACHE, MODEL
from tests.functional.nodes import nodes

T = TypeVar("T")
RUNS = int(os.environ.get("SWARMCTL_BENCH_RUNS", "3"))
CHATS = [int(word) for word in os.environ.get("SWARMCTL_BENCH_CHATS", "1 4 8 16").split()]
TOKENS = int(os.environ.get("SWARMCTL_BENCH_TOKENS", "64"))
REQUESTS = int(os.environ.get("SWARMCTL_BENCH_REQUESTS", "1000"))
CONTEXT = 4096
REST_S = 1.0  # whoever looks at what others use of the machine sees none of the one before
OURS, LLAMA, UNIFIED, PYTHON = "swarmctl", "llama-server", "llama-server -kvu", "llama_cpp.server"

# Asks at a steady pace until its input ends; prints the milliseconds of each answer.
PROBE = """
import http.client, json, select, sys, time
host, port, path, interval = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
connection, taken, due = http.client.HTTPConnection(host, port), [], time.monotonic()
while not select.select([sys.stdin], [], [], max(0, due - time.monotonic()))[0]:
    began = time.perf_counter()
    connection.request("GET", path)
    connection.getresponse().read()
    taken.append((time.perf_counter() - began) * 1000)
    due = max(due + interval, time.monotonic())
print(json.dumps(taken))
"""


@dataclass(frozen=True, slots=True)
class Model:
    path: Path
    route: Route


SMOLLM2 = Model(CACHE / "models" / MODEL, "chat/completions")
GEMMA_270M = Model(GEMMA, "completions")  # a base model: it has no chat template
MODELS = [pytest.param(SMOLLM2, id="SmolLM2"), pytest.param(GEMMA_270M, id="Gemma")]
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture
def ours(tmp_path: Path, kubo_binary: Path) -> Iterator[Ours]:
    for make_node in nodes(tmp_path, kubo_binary):
        yield Ours(make_node("node"))


@pytest.mark.parametrize("model", MODELS)
async def test_tokens_per_second(tmp_path: Path, ours: Ours, model: Model) -> None:
    heading(f"{model.path.stem}: {TOKENS} tokens for each of N chats, median of {RUNS}")
    measured: defaultdict[int, defaultdict[str, list[Crowd]]] = defaultdict(lambda: defaultdict(list))
    async with python_server(model.path, CONTEXT, tmp_path / "python.log") as python:
        for count in CHATS:
            async with contextlib.AsyncExitStack() as servers:
                llama, unified = [
                    await servers.enter_async_context(llama_server(model.path, count, CONTEXT, tmp_path / "llama.log", unified=unified))
                    for unified in (False, True)
                ]
                with ours.serve(model.path, count, CONTEXT) as own:
                    targets = {OURS: own, LLAMA: llama, UNIFIED: unified, PYTHON: python}
                    await in_turn(targets, functools.partial(one_crowd, model.route, count), measured[count])
    compare(measured)


async def one_crowd(route: Route, count: int, target: Target, turn: int) -> Crowd:
    first = 100 * turn + count  # other prompts in every turn and for every number of chats
    found = await crowd(target, route, [question(first + number) for number in range(count)], TOKENS)
    for answer in found.answers:
        whole(answer, TOKENS)
    return found


@pytest.mark.parametrize("model", MODELS)
async def test_prefix_hit(tmp_path: Path, ours: Ours, model: Model) -> None:
    """The second question behind the same 1024 tokens."""
    heading(f"{model.path.stem}: TTFT behind a system prompt, 4 slots, median of {RUNS}")
    measured: defaultdict[str, list[tuple[Answer, Answer]]] = defaultdict(list)

    async def twice(target: Target, turn: int) -> tuple[Answer, Answer]:
        async with client() as session:
            new, hit = [whole(await ask(session, target, model.route, question(number), 8, rules(turn)), 8) for number in (0, 1)]
            return new, hit

    async with llama_server(model.path, 4, CONTEXT, tmp_path / "llama.log", unified=True) as llama:
        with ours.serve(model.path, 4, CONTEXT) as own:
            await in_turn({OURS: own, UNIFIED: llama}, twice, measured)
    for name, pairs in measured.items():
        new, hit = (1000 * statistics.median(pair[which].ttft for pair in pairs) for which in (0, 1))
        print(f"  {name:<18} new {new:7.0f} ms   hit {hit:7.0f} ms   ({pairs[0][0].prompt} tokens)")
    own_hit, their_hit = (statistics.median(pair[1].ttft for pair in measured[name]) for name in (OURS, UNIFIED))
    ratio("TTFT of a hit", own_hit, their_hit, UNIFIED)


async def test_event_loop_delay(tmp_path: Path, ours: Ours) -> None:
    """How long a request that needs nothing waits while 8 chats stream: the loop's delay, HTTP, and the wait for a core."""
    heading(f"{SMOLLM2.path.stem}: GET /healthz 50 times a second while 8 chats stream")
    async with llama_server(SMOLLM2.path, 8, CONTEXT, tmp_path / "llama.log", unified=True) as llama:
        with ours.serve(SMOLLM2.path, 8, CONTEXT) as own:
            for name, target, path in ((OURS, own, "/healthz"), (UNIFIED, llama, "/health")):
                async with probing(target, path) as idle:
                    await asyncio.sleep(5)
                async with probing(target, path) as busy:
                    await stream(target, SMOLLM2.route, [question(number) for number in range(16)], 192, together=8)
                for state, taken in (("idle", idle), ("8 chats", busy)):
                    print(f"  {name:<18} {state:<8} p50 {part(taken, 50):6.2f}   p99 {part(taken, 99):6.2f}   max {max(taken):6.2f} ms")


async def test_memory(ours: Ours) -> None:
    heading(f"{SMOLLM2.path.stem}: resident memory over {REQUESTS} requests of 8 tokens, 8 at a time")
    with ours.serve(SMOLLM2.path, 8, CONTEXT) as own:
        asked = 0
        for upto in (min(50, REQUESTS), REQUESTS // 2, REQUESTS):
            answers = await stream(own, SMOLLM2.route, [question(number) for number in range(asked, upto)], 8, together=8)
            for answer in answers:
                whole(answer, 8)
            asked = max(asked, upto)
            print(f"  after {asked:5} requests " + "".join(f"   {name} {size / 2**20:7.1f} MiB" for name, size in ours.memory().items()))


# --- how it is measured


async def in_turn(targets: Mapping[str, Target], measure: Callable[[Target, int], Awaitable[T]], found: defaultdict[str, list[T]]) -> None:
    """One unmeasured round, then `RUNS` rounds; who begins changes, so that what disturbs the machine hits all alike."""
    names = list(targets)
    for turn in range(-1, RUNS):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            await asyncio.sleep(REST_S)
            result = await measure(targets[name], turn + 1)
            if turn >= 0:
                found[name].append(result)


@contextlib.asynccontextmanager
async def probing(target: Target, path: str) -> AsyncIterator[list[float]]:
    """Fills the list with milliseconds when it ends."""
    host, port = target.url.removeprefix("http://").split(":")
    probe = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROBE, host, port, path, "0.02", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    taken: list[float] = []
    yield taken
    output, _ = await probe.communicate(b"")  # without any input Python 3.11 leaves the pipe open
    taken += json.loads(output)


def whole(answer: Answer, most: int) -> Answer:
    """An answer ends where it was told to, or earlier by the model's own decision."""
    assert 1 <= answer.tokens <= most
    assert answer.finish == "stop" or answer.tokens == most, answer
    return answer


def rules(turn: int) -> str:
    """A system prompt of about 1024 tokens, another for every turn from its first words on."""
    return f"Rules of house {turn}. " + " ".join(
        f"Rule {number}: whoever works in room {number * 7 + turn} reads the notes of the day before, and writes down what was done."
        for number in range(36)
    )


# --- how it is told


def heading(text: str) -> None:
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"\n\n{text}")
    print(f"  {CORES} threads, context {CONTEXT}, llama-cpp-python {version('llama-cpp-python')}, load {load}, {time.strftime('%H:%M:%S')}")


def compare(measured: Mapping[int, Mapping[str, Sequence[Crowd]]]) -> None:
    print("  tokens/s, TTFT p50 in ms, tokens per answer, tokens per prompt")
    print("  chats " + "".join(f"{name:>26}" for name in (OURS, LLAMA, UNIFIED, PYTHON)))
    for count, found in measured.items():
        print(f"  {count:5} " + "".join(f"{cell(found[name]):>26}" for name in (OURS, LLAMA, UNIFIED, PYTHON)))
    for count, found in measured.items():
        for rival in (LLAMA, UNIFIED, PYTHON):
            ratio(f"{count:2} chats, tokens/s", rate(found[OURS]), rate(found[rival]), rival)
            ratio(f"{count:2} chats, TTFT", ttft(found[OURS]), ttft(found[rival]), rival)


def cell(crowds: Sequence[Crowd]) -> str:
    answers = [answer for found in crowds for answer in found.answers]
    tokens = statistics.mean(answer.tokens for answer in answers)
    return f"{rate(crowds):.1f} {1000 * ttft(crowds):6.0f} {tokens:5.1f} {answers[0].prompt or '?':>4}"


def rate(crowds: Sequence[Crowd]) -> float:
    return statistics.median(found.rate for found in crowds)


def ttft(crowds: Sequence[Crowd]) -> float:
    return statistics.median(found.ttft for found in crowds)


def ratio(what: str, own: float, theirs: float, rival: str) -> None:
    print(f"  {what}: {own / theirs:.2f} of {rival}'s")


def part(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]
