"""One client for every server that is measured: chats over OpenAI's streaming API, and what they saw of it."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

Route = Literal["chat/completions", "completions"]

# Each begins differently, so that only what a template puts before it can come from a cache.
_SUBJECTS = (
    "otter lighthouse harvest violin glacier caravan printer orchard submarine beehive tailor volcano ferry bakery compass library "
    "windmill circus railway astronaut potter desert fisherman clock telescope market garden mountain bridge theatre island museum"
).split()
_PLACES = "in the north|by the sea|under the hills|behind the old town|near a wide river|at the edge of a forest|on a farm".split("|")


def question(number: int) -> str:
    """A prompt of about 60 tokens that asks for more text than anybody waits for; no two numbers below 224 give the same."""
    subject, place = _SUBJECTS[number % len(_SUBJECTS)], _PLACES[number // len(_SUBJECTS) % len(_PLACES)]
    return (
        f"{subject.capitalize()} story number {number}: write a very long and detailed story about the {subject} {place}. Describe the "
        "people there, what they do every day, the weather, the food and the work, one after the other. Do not stop before you have "
        "written at least one thousand words. Begin now."
    )


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server answers. `extra` is what it alone needs in a request."""

    url: str
    model: str
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds from the request to the first text and to the end."""

    ttft: float
    seconds: float
    tokens: int
    prompt: int | None  # tokens, where the server tells
    finish: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Crowd:
    """Chats that were asked at the same moment."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second, all chats together, prompts included in the time."""
        return sum(answer.tokens for answer in self.answers) / self.seconds

    @property
    def ttft(self) -> float:
        return statistics.median(answer.ttft for answer in self.answers)


async def ask(
    session: aiohttp.ClientSession, target: Target, route: Route, prompt: str, max_tokens: int, system: str | None = None
) -> Answer:
    """One streamed answer. Raises `AssertionError` when it is cut off or refused."""
    body: dict[str, Any] = {
        "model": target.model, "max_tokens": max_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        **target.extra,
    }  # fmt: skip
    if route == "completions":
        body["prompt"] = prompt if system is None else f"{system}\n\n{prompt}"
    else:
        body["messages"] = [{"role": "user", "content": prompt}]
        if system is not None:
            body["messages"].insert(0, {"role": "system", "content": system})
    pieces: list[str] = []
    first, finish, usage, done = 0.0, None, None, False
    began = time.perf_counter()
    async with session.post(f"{target.url}/v1/{route}", json=body, headers=target.headers) as response:
        assert response.status == 200, f"{target.url} answered {response.status}: {(await response.text())[:500]}"
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                done = True
                break
            event = json.loads(line[6:])
            assert "error" not in event, event
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text = choice["text"] if route == "completions" else choice["delta"].get("content")
                if text:
                    first = first or time.perf_counter()
                    pieces.append(text)
                finish = choice.get("finish_reason") or finish
    ended = time.perf_counter()
    assert done and finish in ("stop", "length"), f"an answer of {target.url} was cut off after {len(pieces)} pieces"
    assert pieces, f"{target.url} answered nothing"
    tokens = usage["completion_tokens"] if usage else len(pieces)
    return Answer(first - began, ended - began, tokens, usage and usage["prompt_tokens"], finish, "".join(pieces))


async def crowd(target: Target, route: Route, prompts: Sequence[str], max_tokens: int) -> Crowd:
    """All of `prompts` at once, each on a connection of its own."""
    async with client() as session:
        began = time.perf_counter()
        answers = await asyncio.gather(*(ask(session, target, route, prompt, max_tokens) for prompt in prompts))
        return Crowd(tuple(answers), time.perf_counter() - began)


async def stream(target: Target, route: Route, prompts: Sequence[str], max_tokens: int, together: int) -> list[Answer]:
    """All of `prompts`, `together` of them at any time."""
    gate = asyncio.Semaphore(together)

    async def one(session: aiohttp.ClientSession, prompt: str) -> Answer:
        async with gate:
            return await ask(session, target, route, prompt, max_tokens)

    async with client() as session:
        return list(await asyncio.gather(*(one(session, prompt) for prompt in prompts)))


def client() -> aiohttp.ClientSession:
    """A connection for each request: a server that closes an idle one at the wrong moment would fail the next request."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=600))
