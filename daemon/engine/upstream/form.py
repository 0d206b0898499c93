"""What an OpenAI-compatible server is asked, and what its refusals mean. Pure.

What stands at our own default (`Sampling`) is not sent, so that the upstream's default holds: a server that knows nothing of top_k,
min_p or repeat_penalty is told of them only when somebody asked for them, and says itself when it cannot. Nothing is dropped silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from daemon.engine.interface import Capability, ChatRequest, CompletionRequest, EmbeddingRequest, Request, Sampling
from daemon.errors import Busy, ContextOverflow, InferenceError, ModelLoadError, SwarmError, Unserved, UsageError
from registry import endpoints, strictjson
from registry.errors import Malformed

MAX_FAILURE: Final = 64 << 10  # bytes of a refusal that are read
REASON: Final = 200  # characters of the upstream's own words

_OVERFLOW_CODES: Final = frozenset({"context_length_exceeded", "exceed_context_size_error"})
_OVERFLOW: Final = re.compile(r"context (length|size|window)", re.IGNORECASE)
_EXTENSIONS: Final = ("top_k", "min_p", "repeat_penalty")

Json = dict[str, Any]


def base_url(text: str) -> str:
    """The URL that routes are appended to; without a path it is /v1. Raises `Malformed`."""
    url = endpoints.base_url(text)
    return url if url.partition("://")[2].partition("/")[2] else url + "/v1"


# --- requests ---


def capability(request: Request) -> Capability:
    return "chat" if isinstance(request, ChatRequest) else "completions"


def route(request: Request) -> str:
    return "/chat/completions" if isinstance(request, ChatRequest) else "/completions"


def body(model: str, request: Request, limit_name: str) -> Json:
    """The JSON of a streamed request; `limit_name` is what the upstream calls the ceiling of tokens."""
    told: Json = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if isinstance(request, CompletionRequest):
        told["prompt"] = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    else:
        told |= {"messages": list(request.messages), **_tools(request)}
        if request.schema is not None:
            told["response_format"] = _format(request.schema)
    return told | _sampling(request.sampling, limit_name, chat=isinstance(request, ChatRequest))


def _tools(request: ChatRequest) -> Json:
    if not request.tools:
        return {}
    tools = [{"type": "function", "function": tool.as_json()} for tool in request.tools]
    told: Json = {"tools": tools, "tool_choice": request.tool_choice}
    if request.forced_tool is not None:
        told["tool_choice"] = {"type": "function", "function": {"name": request.forced_tool}}
    return told if request.parallel_tool_calls else {**told, "parallel_tool_calls": False}


def _format(schema: Mapping[str, Any]) -> Json:
    if schema == {"type": "object"}:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema), "strict": True}}


def _sampling(sampling: Sampling, limit_name: str, *, chat: bool) -> Json:
    default = Sampling()
    names = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", *_EXTENSIONS)
    told: Json = {name: value for name in names if (value := getattr(sampling, name)) != getattr(default, name)}
    if sampling.max_tokens is not None:
        told[limit_name if chat else "max_tokens"] = sampling.max_tokens
    if sampling.stop:
        told["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        told["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.logprobs is not None:
        told |= {"logprobs": True, "top_logprobs": sampling.logprobs} if chat else {"logprobs": sampling.logprobs}
    return told


def embedding_body(model: str, request: EmbeddingRequest) -> Json:
    inputs = [one if isinstance(one, str) else list(one) for one in request.inputs]
    return {"model": model, "input": inputs, "encoding_format": "base64"}


# --- failures ---


def failure(status: int, answer: bytes, key: str | None, what: str) -> SwarmError:
    """The error for a response that is none; `what` was asked for. Of the upstream's words little is passed on, and never `key`."""
    try:
        document = strictjson.loads(answer, limit=MAX_FAILURE, what="the answer")
    except Malformed:
        document = None
    said, codes_ = _words(document, key)
    if status in (401, 403):
        return InferenceError("upstream", "it refused the key", "serve it again with --key-env NAME, the variable that holds the right one")
    if status in (405, 501) or (status == 404 and not codes_ and what != "chat"):
        return Lacking(what)
    if status == 404:
        return ModelLoadError("upstream", "it does not have the model", "swarmctl stop it, or serve it again under the right name")
    if status in (408, 429):
        return Busy("upstream", "it has as many requests as it takes", "try again soon")
    if status in (400, 413, 422):
        return _refusal(said, codes_)
    if 300 <= status < 400:
        return InferenceError("upstream", "it redirects, which is not followed", "serve it again with the URL that it really has")
    return Unserved("upstream", f"it answered {status}", "try again")


def told_failure(chunk: Mapping[str, Any], key: str | None) -> SwarmError:
    """The error that stands in a stream."""
    said, codes_ = _words(chunk, key)
    if codes_ & {"invalid_request_error", *_OVERFLOW_CODES, "400"}:
        return _refusal(said, codes_)
    if codes_ & {"rate_limit_error", "rate_limit_exceeded", "429"}:
        return Busy("upstream", "it has as many requests as it takes", "try again soon")
    return InferenceError("upstream", "it failed" + (f": {said}" if said else ""), "ask again")


class Lacking(UsageError):
    """The upstream has no route for it."""

    def __init__(self, capability: str) -> None:
        super().__init__("request", f"the upstream does not offer {capability}", "ask another model")
        self.capability = capability


def _refusal(said: str, codes_: frozenset[str]) -> UsageError:
    if codes_ & _OVERFLOW_CODES or _OVERFLOW.search(said):
        return ContextOverflow("request", "it has more tokens than the upstream's model takes", "send less")
    return UsageError("request", "the upstream refuses it" + (f": {said}" if said else ""), "change what it names")


def _words(document: Any, key: str | None) -> tuple[str, frozenset[str]]:
    """The reason in an error, made harmless, and the codes and types that it gives. Without an error object there are none."""
    error = document.get("error", document) if isinstance(document, dict) else None
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        return "", frozenset()
    message = error.get("message", error.get("detail"))
    text = message if isinstance(message, str) else ""
    if key:
        text = text.replace(key, "...")
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    codes_ = frozenset(str(error[name]) for name in ("code", "type") if isinstance(error.get(name), str | int))
    told = frozenset({"error"} if "error" in document else ())
    return clean if len(clean) <= REASON else clean[:REASON] + "...", codes_ or told
