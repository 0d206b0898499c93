"""OpenAI's routes, so that its own client works unchanged.

A field is honoured, or accepted because ignoring it cannot change the answer, or refused: never silently dropped. Two extra fields
come back: `answered_by` (the node) in every answer and chunk, and what `GET /v1/models` says of a model beyond OpenAI's four fields.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from daemon.api import body, chat, sse, views
from daemon.api.body import Fields
from daemon.api.services import Answer, Answers, Services, services
from daemon.engine.interface import ChatRequest
from daemon.errors import Ambiguous, NotFound
from registry import codes, routing
from registry.errors import AmbiguousRef, Malformed
from registry.routing import SwarmModel

# These cannot change the answer: names, bookkeeping, hints about speed and price.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "parallel_tool_calls", "prediction",
)  # fmt: skip
# These would; the values that ask for nothing are accepted, since clients send them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed `POST /v1/chat/completions`."""

    model: str
    request: ChatRequest
    stream: bool
    include_usage: bool


def parse(fields: Fields) -> Asked:
    """The request, every field checked. Raises `UsageError`."""
    model = fields.required_text("model")
    limits = [fields.integer(name, 1, chat.MAX_TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    given = {
        "max_tokens": limits[0] or limits[1],
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", 0, 1_000_000),
        "min_p": fields.number("min_p", 0, 1),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "seed": fields.integer("seed", -(2**63), 2**63 - 1),
        "stop": _stop(fields),
    }
    request = chat.request(chat.messages(fields), given)
    stream = fields.flag("stream")
    include_usage = _stream_options(fields, stream)
    for name in IGNORED:
        fields.take(name)
    for name, harmless in NEUTRAL.items():
        value = fields.take(name)
        # 1 == True in Python, and n=true is no number.
        if value is not None and not any(value == same and type(value) is type(same) for same in harmless):
            raise fields.wrong(name, "is not supported yet")
    fields.done()
    return Asked(model, request, stream, include_usage)


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    found = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(found, list) or len(found) > 4 or not all(isinstance(text, str) and 0 < len(text) <= 256 for text in found):
        raise fields.wrong("stop", "must be up to 4 texts of 1 to 256 characters")
    return tuple(found)


def _stream_options(fields: Fields, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    if not stream or not isinstance(value, dict):
        raise fields.wrong("stream_options", "must be an object, and only with stream")
    options = Fields(value, "stream_options.")
    include_usage = options.flag("include_usage")
    options.flag("include_obfuscation")  # padding against traffic analysis; loopback has no use for it
    options.done()
    return include_usage


# -- routes -------------------------------------------------------------------------------------------------------------


async def list_models(request: web.Request) -> web.StreamResponse:
    known = services(request)
    return web.json_response({"object": "list", "data": [_model(known, model) for model in _served(known)]})


async def get_model(request: web.Request) -> web.StreamResponse:
    known = services(request)
    return web.json_response(_model(known, resolve(_served(known), request.match_info["id"])))


async def chat_completions(request: web.Request) -> web.StreamResponse:
    asked = parse(await body.fields(request, body.CHAT))
    answers = services(request).answers
    if asked.stream:
        return await sse.stream(request, _chunks(answers, asked))
    async with chat.asking(answers, asked.model, asked.request) as (reply, texts):
        text = "".join([text async for text in texts])
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish}
    return web.json_response({**_head(reply.answer), "object": "chat.completion", "choices": [choice], "usage": reply.counted()})


async def _chunks(answers: Answers, asked: Asked) -> AsyncIterator[sse.Event]:
    """Chunks, then `[DONE]`; an answer that fails ends in an exception, and so without both."""
    async with chat.asking(answers, asked.model, asked.request) as (reply, texts):
        head = {**_head(reply.answer), "object": "chat.completion.chunk", **({"usage": None} if asked.include_usage else {})}
        role = {"role": "assistant"}
        async for text in texts:
            yield {**head, "choices": [_choice({**role, "content": text}, None)]}
            role = {}
        yield {**head, "choices": [_choice(role, reply.finish)]}
        if asked.include_usage:
            yield {**head, "choices": [], "usage": reply.counted()}
        yield "[DONE]"


def _head(answer: Answer) -> dict[str, Any]:
    return {
        "id": "chatcmpl-" + secrets.token_hex(12),
        "created": int(time.time()),
        "model": codes.short(answer.code),
        "answered_by": answer.answered_by,
    }


def _choice(delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


# -- models -------------------------------------------------------------------------------------------------------------


def _served(known: Services) -> list[SwarmModel]:
    """Every model that somebody serves now: those can be asked."""
    return [model for model in views.swarm_models(known) if model.serving]


def _model(known: Services, model: SwarmModel) -> dict[str, Any]:
    local = next((mine for mine in known.library.models() if mine.identity.cid == model.cid), None)
    created = 0 if local is None else views.seconds(local.added)
    return {"id": model.code, "object": "model", "created": created, "owned_by": "swarmctl", **views.swarm_model(model)}


def resolve(models: Sequence[SwarmModel], wanted: str) -> SwarmModel:
    """The one model that a code (with or without `#`), CID or name means. Raises `NotFound` or `Ambiguous`."""
    try:
        found = routing.resolve(wanted, models)
    except Malformed:
        found = None  # a client asks for ids of other services, such as owner/model: not here, and no error of form
    except AmbiguousRef as error:
        raise Ambiguous("model", f"{wanted[:80]!a} means several: {', '.join(error.candidates)}", "use a longer code or the CID") from error
    if found is None:
        raise NotFound("model", f"nobody serves {wanted[:80]!a}", "GET /v1/models lists what is served")
    return found
