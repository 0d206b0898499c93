"""What one worker makes of requests, on the real llama.cpp and a real small model."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from daemon.engine.gguf import inspect
from daemon.engine.interface import (
    CAPABILITIES,
    ChatRequest,
    CompletionRequest,
    Delta,
    EmbeddingRequest,
    Sampling,
    TokenLogprob,
    Usage,
)
from daemon.engine.process import WorkerProcess
from daemon.engine.protocol import Load
from daemon.engine.worker.answering import Chat
from daemon.engine.worker.llama import Llama, Row
from daemon.engine.worker.sampling import Sampler
from daemon.engine.worker.scheduler import Scheduler
from daemon.engine.worker.text import AnswerText
from daemon.errors import ContextOverflow, ModelLoadError, UsageError
from tests.unit.gguf_files import I8, METADATA, STRING, bert_gguf, header, padded, tiny_gguf

pytestmark = pytest.mark.asyncio(loop_scope="module")  # one worker for all: what one test asked is in the cache of the next
COLOURS = "Red, green, blue, red, green, blue, red, green, blue, red,"
PARIS = 7042  # the token " Paris"
STORY = "Tell me a story about a lighthouse."


async def start(path: Path, folder: Path) -> WorkerProcess:
    found = await asyncio.to_thread(inspect, path)
    load = Load(path=str(path), context=2048, slots=4, threads=1, batch=512, gpu_layers=0, blas=True, template=found.chat_template)
    return await WorkerProcess.start(load, folder / "worker.log", queue=16, timeout=60)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> AsyncIterator[WorkerProcess]:
    started = await start(model_file, tmp_path_factory.mktemp("worker"))
    yield started
    await started.stop()


def go_on(prompt: str | tuple[int, ...], **options: Any) -> CompletionRequest:
    return CompletionRequest(prompt, Sampling(**{"temperature": 0.0, "max_tokens": 16, **options}))


def chat(content: str, **options: Any) -> ChatRequest:
    return ChatRequest(({"role": "user", "content": content},), Sampling(**{"temperature": 0.0, "max_tokens": 16, **options}))


async def answer(worker: WorkerProcess, request: ChatRequest | CompletionRequest) -> tuple[str, Delta, tuple[TokenLogprob, ...]]:
    deltas = [delta async for delta in worker.generate(request)]
    assert deltas[-1].usage is not None
    return "".join(delta.text for delta in deltas), deltas[-1], tuple(one for delta in deltas for one in delta.logprobs)


def usage(last: Delta) -> Usage:
    assert last.usage is not None
    return last.usage


async def test_a_text_is_continued_without_a_template(worker: WorkerProcess) -> None:
    text, last, _ = await answer(worker, go_on("The capital of France is", max_tokens=4))
    assert text.startswith(" Paris")
    assert (usage(last).prompt_tokens, usage(last).completion_tokens, last.finish) == (5, 4, "length")


async def test_tokens_are_continued_like_their_text(worker: WorkerProcess) -> None:
    text, _, said = await answer(worker, go_on("The capital of France is", logprobs=0))
    assert "".join(one.drawn.bytes.decode() for one in said) == text
    # "<|im_start|>", "user" and the rest are single tokens, which only their number can name for sure.
    chatted, _, _ = await answer(worker, go_on("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"))
    as_tokens, last, _ = await answer(worker, go_on((1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198)))
    assert (chatted, usage(last).prompt_tokens) == (as_tokens, 10)


@pytest.mark.parametrize(
    ("request_", "error", "why"),
    [
        (go_on((1, 49152)), UsageError, "no token 49152, only 0 to 49151"),
        (go_on("Hi", logit_bias={49152: 1.0}), UsageError, "logit_bias.*no token 49152"),
        (go_on("word " * 3000), ContextOverflow, "it has 3001 tokens and the context 2048"),
        (go_on("x" * 1_000_000), ContextOverflow, "cannot fit 2048 tokens"),
        (go_on((1,) * 2048), ContextOverflow, "2048"),
        (go_on(""), UsageError, "empty"),
    ],
)
async def test_a_prompt_that_cannot_be_read_is_refused(
    worker: WorkerProcess, request_: CompletionRequest, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        await answer(worker, request_)
    assert (await answer(worker, go_on("Hi", max_tokens=1)))[1].finish


async def test_what_is_in_the_cache_is_told(worker: WorkerProcess) -> None:
    question = "What is it that keeps the ships away from the rocks in a night without stars and without a moon, and why does it?"
    _, first, _ = await answer(worker, chat(question))
    _, second, _ = await answer(worker, chat(question + " Make it short."))
    assert usage(first).cached_tokens < 40
    assert usage(first).prompt_tokens - 8 < usage(second).cached_tokens < usage(second).prompt_tokens


async def test_chats_that_come_together_read_what_they_share_once(worker: WorkerProcess) -> None:
    system = "You know everything about lighthouses. " * 20
    answers = await asyncio.gather(*(answer(worker, chat(system + f"Question {n}: why?", max_tokens=2)) for n in range(4)))
    cached = sorted(usage(last).cached_tokens for _, last, _ in answers)
    assert cached[0] < 40 and cached[1] > 140
    assert len({usage(last).prompt_tokens for _, last, _ in answers}) == 1


async def test_a_bias_forbids_and_forces(worker: WorkerProcess) -> None:
    free, _, said = await answer(worker, go_on("The capital of France is", logprobs=1))
    forbidden, _, _ = await answer(worker, go_on("The capital of France is", logit_bias={PARIS: -100}))
    assert said[0].drawn.bytes == b" Paris" and free.startswith(" Paris") and "Paris" not in forbidden
    forced, _, _ = await answer(worker, go_on("The capital of France is", max_tokens=5, logit_bias={PARIS: 100}))
    assert forced == " Paris" * 5


async def test_penalties_keep_an_answer_from_repeating_itself(worker: WorkerProcess) -> None:
    plain, _, _ = await answer(worker, go_on(COLOURS))
    assert plain.count("blue") == 3
    for penalty in ({"repeat_penalty": 3.0}, {"frequency_penalty": 2.0}):
        penalised, _, _ = await answer(worker, go_on(COLOURS, **penalty))
        assert penalised.count("blue") == 1


async def test_other_seeds_draw_other_answers(worker: WorkerProcess) -> None:
    # That one seed draws the same from the same logits is tests/unit/test_sampling.py's: where its prompt lies in the cache
    # changes how llama.cpp rounds, and so now and then what is drawn.
    seeds = (-(2**63), 1, 2**63 - 1, None, None)
    drawn = [await answer(worker, go_on("Once upon a time", temperature=1.0, seed=seed)) for seed in seeds]
    assert len({text for text, _, _ in drawn}) > 2


async def test_logprobs_are_the_model_s_own(worker: WorkerProcess) -> None:
    # Whatever is drawn in the end, and however likely that was made.
    for options in ({}, {"temperature": 2.0, "top_k": 1}, {"logit_bias": {PARIS: 5.0}}):
        _, _, said = await answer(worker, go_on("The capital of France is", logprobs=20, **options))
        assert len(said) == 16
        for one in said:
            found = [other.logprob for other in one.likeliest]
            assert found == sorted(found, reverse=True) and len(found) == 20
            assert sum(map(math.exp, found)) <= 1.0001
            assert one.drawn in one.likeliest
    _, _, said = await answer(worker, go_on("The capital of France is", logprobs=2, temperature=2.0, seed=3, top_k=0, top_p=1.0, min_p=0.0))
    assert any(one.drawn not in one.likeliest and one.drawn.logprob < one.likeliest[-1].logprob for one in said)
    assert (await answer(worker, go_on("The capital of France is")))[2] == ()


async def test_logprobs_come_with_their_text(worker: WorkerProcess) -> None:
    llamas = go_on("Here are many llamas: " + "\U0001f999" * 8, max_tokens=40, logprobs=0)
    deltas = [delta async for delta in worker.generate(llamas)]
    pieces = [(delta.text, b"".join(one.drawn.bytes for one in delta.logprobs)) for delta in deltas[:-1]]
    # The end may be half a character.
    assert all(text.encode() == data for text, data in pieces[:-1])
    assert any(len(delta.logprobs) > 1 for delta in deltas), "no character lies over several tokens"
    free, _, said = await answer(worker, chat(STORY, max_tokens=24, logprobs=0))
    stop = said[9].drawn.bytes.decode() + said[10].drawn.bytes.decode()
    cut, last, kept = await answer(worker, chat(STORY, max_tokens=24, logprobs=0, stop=(stop,)))
    assert last.finish == "stop" and cut == free[: free.index(stop)]
    assert b"".join(one.drawn.bytes for one in kept).decode() == cut


async def test_an_answer_that_repeats_itself_is_not_changed_by_guesses(worker: WorkerProcess) -> None:
    # Whatever this machine thinks of guessing: four at once guess less than one alone.
    alone, last, said = await answer(worker, go_on(COLOURS, max_tokens=50, logprobs=1))
    assert alone.startswith(" green, blue, red, green, blue, red,") and usage(last).completion_tokens == len(said) == 50
    assert all(one.drawn == one.likeliest[0] for one in said)
    together = await asyncio.gather(*(answer(worker, go_on(COLOURS, max_tokens=50)) for _ in range(4)))
    assert {text for text, _, _ in together} == {alone}


async def test_guesses_save_decodes_and_change_nothing(model_file: Path) -> None:
    """In this process and with a made-up price of a row: on a small model guesses rarely pay, but they must be right wherever they do."""
    load = Load(path=str(model_file), context=512, slots=1, threads=1, batch=64, gpu_layers=0, blas=True, template=None)

    def run(row_cost: float) -> tuple[str, int]:
        llama = Llama(load)
        decodes, text = 0, ""
        decode = llama.decode

        def counted(rows: Sequence[Row]) -> bool:
            nonlocal decodes
            decodes += 1
            return decode(rows)

        def said(more: str, _: object) -> None:
            nonlocal text
            text += more

        llama.decode = counted  # type: ignore[method-assign]
        tokens = llama.tokenise(COLOURS, control=False)
        scheduler = Scheduler(llama, 1, row_cost)
        sampling = Sampling(temperature=0)
        chat = Chat(1, tokens, len(tokens), 80, Sampler(sampling, 1), AnswerText(()), said, lambda *_: None, lambda _: None)
        scheduler.submit(chat)
        while scheduler.busy:
            scheduler.step()
        return text, decodes

    plain, steps = await asyncio.to_thread(run, 10.0)
    guessed, fewer = await asyncio.to_thread(run, 0.02)
    assert guessed == plain and steps == 1 + 80 and fewer < 40


async def test_texts_become_vectors_of_their_meaning(worker: WorkerProcess) -> None:
    texts = ("A cat sleeps on the sofa.", "A kitten is sleeping on the couch.", "Interest rates rose by two percent.")
    found = await worker.embed(EmbeddingRequest(texts))
    cat, kitten, rates = (np.frombuffer(vector, "<f4") for vector in found.vectors)
    assert len(cat) == 576 and found.prompt_tokens == 24
    assert cat @ kitten > cat @ rates
    assert all(abs(float(np.linalg.norm(vector)) - 1) < 1e-5 for vector in (cat, kitten, rates))
    # Together or alone, by text or by tokens.
    alone = await worker.embed(EmbeddingRequest((texts[1],)))
    assert float(np.frombuffer(alone.vectors[0], "<f4") @ kitten) > 0.9999


async def test_many_texts_do_not_stop_an_answer(worker: WorkerProcess) -> None:
    talk = worker.generate(chat("Count from 1 to 1000.", max_tokens=None))
    assert (await anext(talk)).text
    embedding = asyncio.create_task(worker.embed(EmbeddingRequest(tuple("word " * 260 + str(n) for n in range(4)))))
    between = 0
    while not embedding.done():
        assert (await anext(talk)).text
        between += 1
    found = await embedding
    assert between >= 3 and len(found.vectors) == 4 and found.prompt_tokens > 1040
    with contextlib.suppress(StopAsyncIteration):
        await talk.aclose()


@pytest.mark.parametrize(
    ("inputs", "error", "why"),
    [
        (("word " * 600,), ContextOverflow, "601 tokens, 512 can be embedded"),
        (("x" * 100_000,), ContextOverflow, "512 tokens"),
        (("fine", ""), UsageError, "empty"),
        (((1, 2, 49152),), UsageError, "no token 49152"),
    ],
)
async def test_texts_that_cannot_be_embedded_are_refused(
    worker: WorkerProcess, inputs: tuple[Any, ...], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        await worker.embed(EmbeddingRequest(inputs))
    assert worker.active == 0


async def test_a_model_that_writes_can_do_everything(worker: WorkerProcess) -> None:
    assert worker.capabilities == CAPABILITIES


async def test_a_model_that_only_embeds_says_so(tmp_path: Path) -> None:
    worker = await start(bert_gguf(tmp_path / "bert.gguf"), tmp_path)
    try:
        assert worker.capabilities == {"embeddings"} and worker.context == 64
        found = await worker.embed(EmbeddingRequest(("cat sofa", "the kitten", "cat sofa", (4, 6))))
        vectors = [np.frombuffer(vector, "<f4") for vector in found.vectors]
        assert found.prompt_tokens == 4 + 4 + 4 + 2 and len(vectors[0]) == 32
        assert np.allclose(vectors[0], vectors[2], atol=1e-5) and not np.allclose(vectors[0], vectors[1], atol=0.1)
        for request in (chat("Hi"), go_on("Hi")):
            with pytest.raises(UsageError, match=r"it cannot do (chat|completions), only embeddings"):
                await answer(worker, request)
        with pytest.raises(ContextOverflow, match="64 can be embedded"):
            await worker.embed(EmbeddingRequest(("cat " * 63,)))
    finally:
        await worker.stop()


async def test_an_architecture_from_the_future_is_named(tmp_path: Path) -> None:
    metadata = [("general.architecture", STRING, "marvin9"), *METADATA[1:]]
    path = tmp_path / "future.gguf"
    path.write_bytes(padded(header(metadata, [("w", (64,), I8, 0)])) + bytes(64))
    with pytest.raises(ModelLoadError, match="does not know the architecture 'marvin9'"):
        await start(path, tmp_path)


async def test_why_llama_cpp_refused_a_file_is_told_without_paths(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"llama\.cpp refused the file: .*\w") as caught:
        await start(tiny_gguf(tmp_path / "tiny.gguf"), tmp_path)
    assert str(tmp_path) not in str(caught.value) and "tiny.gguf" not in str(caught.value)
