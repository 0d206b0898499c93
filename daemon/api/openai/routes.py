"""The routes that answer: chats, completions and embeddings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from aiohttp import web

from daemon.api import body, sse
from daemon.api.asking import asking
from daemon.api.openai import requests, shapes
from daemon.api.openai.requests import Streaming
from daemon.api.openai.shapes import ChatChoice, TextChoice
from daemon.api.services import services
from daemon.api.tally import TALLY
from daemon.engine.interface import ChatRequest, CompletionRequest, Usage
from daemon.errors import InferenceError

_FLOAT = 4  # bytes

Choice = ChatChoice | TextChoice


async def chat_completions(request: web.Request) -> web.StreamResponse:
    asked = requests.chat(await body.fields(request, body.CHAT))
    logprobs = asked.requests[0].sampling.logprobs is not None

    def choice(index: int) -> ChatChoice:
        return ChatChoice(index, logprobs=logprobs)

    kind: shapes.Kind = "chat.completion.chunk" if asked.streaming.wanted else "chat.completion"
    return await _answer(request, kind, asked.model, asked.requests, len(asked.requests), asked.streaming, choice)


async def completions(request: web.Request) -> web.StreamResponse:
    asked = requests.completion(await body.fields(request, body.CHAT))

    def choice(index: int) -> TextChoice:
        one = asked.requests[index]
        echo = one.prompt if asked.echo and isinstance(one.prompt, str) else ""
        return TextChoice(index, echo=echo, logprobs=one.sampling.logprobs)

    return await _answer(request, "text_completion", asked.model, asked.requests, asked.n, asked.streaming, choice)


async def _answer(
    request: web.Request,
    kind: shapes.Kind,
    model: str,
    wanted: Sequence[ChatRequest | CompletionRequest],
    each: int,
    streaming: Streaming,
    choice: Callable[[int], Choice],
) -> web.StreamResponse:
    known, tally, head = services(request), request.app[TALLY], shapes.Head(kind, int(time.time()))
    choices = [choice(index) for index in range(len(wanted))]

    async def events() -> AsyncIterator[sse.Event]:
        """Chunks, then `[DONE]`; an answer that fails ends in an exception, and so without both."""
        unused = {"usage": None} if streaming.include_usage else {}
        async with asking(known.answers, tally, model, wanted, each) as (asked, parts):
            async for index, delta in parts:
                for shown in choices[index].chunks(delta):
                    yield head(asked.replies[index].answer, [shown], **unused)
            if streaming.include_usage:
                yield head(asked.first.answer, [], usage=shapes.usage(asked.usage()))
            yield "[DONE]"

    if streaming.wanted:
        return await sse.stream(request, events())
    async with asking(known.answers, tally, model, wanted, each) as (asked, parts):
        async for index, delta in parts:
            choices[index].add(delta)
    return web.json_response(head(asked.first.answer, [one.whole() for one in choices], usage=shapes.usage(asked.usage())))


async def embeddings(request: web.Request) -> web.StreamResponse:
    asked = requests.embeddings(await body.fields(request, body.CHAT))
    with request.app[TALLY].answer() as counted:
        found = await services(request).answers.embed(asked.model, asked.request)
        counted.begin()
        counted.used(Usage(found.embeddings.prompt_tokens, 0))
    vectors = found.embeddings.vectors
    if len(vectors) != len(asked.request.inputs):
        raise InferenceError("embeddings", "not every input became a vector", "ask again")
    own = len(vectors[0]) // _FLOAT
    if asked.dimensions not in (None, own):
        raise body.WrongField("dimensions", f"must be {own}: this model's vectors mean nothing when they are cut", "leave it out")
    response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
    await response.prepare(request)
    for piece in shapes.embeddings(found, asked.encoding):
        await response.write(piece)
        await asyncio.sleep(0)  # a write to a client that reads on does not give way
    await response.write_eof()
    return response
