"""Reading what OpenAI's clients send.

A field is honoured, or accepted because ignoring it cannot change the answer, or refused: never silently dropped. What may be
asked for stands in daemon/engine/codec.py; here are only the names that OpenAI has for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from daemon.api.body import Fields
from daemon.api.messages import messages
from daemon.api.openai import tools
from daemon.engine.codec import BIAS, INTEGERS, MAX_BIASES, MAX_INPUTS, MAX_LOGPROBS, MAX_STOP, MAX_STOPS, MAX_TOKENS, NUMBERS
from daemon.engine.interface import ChatRequest, CompletionRequest, EmbeddingRequest, Sampling

MAX_CHOICES: Final = 8  # `n`
MAX_PROMPTS: Final = 64  # of one completion, and prompts times `n`
MAX_PROMPT_TOKENS: Final = 1 << 20  # of one prompt that comes as tokens; no model has such a context
LEGACY_LOGPROBS: Final = 5
LEGACY_MAX_TOKENS: Final = 16  # of a completion that does not say

# These cannot change the answer: names, bookkeeping, hints about speed and price.
IGNORED: Final = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "prediction",
)  # fmt: skip
# These would; the values that ask for nothing are accepted, since clients send them.
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
}
_INSTEAD: Final = {"functions": "; use tools", "function_call": "; use tool_choice"}

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Streaming:
    wanted: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class AskedChat:
    """A parsed `POST /v1/chat/completions`: as many requests as choices."""

    model: str
    requests: tuple[ChatRequest, ...]
    streaming: Streaming


@dataclass(frozen=True, slots=True)
class AskedCompletion:
    """A parsed `POST /v1/completions`: `n` requests for each prompt, one after the other."""

    model: str
    requests: tuple[CompletionRequest, ...]
    n: int
    echo: bool
    streaming: Streaming


@dataclass(frozen=True, slots=True)
class AskedEmbeddings:
    """A parsed `POST /v1/embeddings`."""

    model: str
    request: EmbeddingRequest
    encoding: Literal["float", "base64"]
    dimensions: int | None


def chat(fields: Fields) -> AskedChat:
    """The request, every field checked. Raises `UsageError`."""
    model, streaming, count = fields.required_text("model"), _streaming(fields), _count(fields)
    limits = [fields.integer(name, *INTEGERS["max_tokens"]) for name in ("max_completion_tokens", "max_tokens")]
    sampling = _sampling(fields, {"max_tokens": limits[0] or limits[1], "logprobs": _chat_logprobs(fields)})
    asked = tools.read(fields)
    request = ChatRequest(
        messages(fields),
        sampling,
        tools=asked.tools,
        tool_choice=asked.choice,
        forced_tool=asked.forced,
        # Who names the function wants one call of it.
        parallel_tool_calls=fields.flag("parallel_tool_calls", True) and asked.forced is None,
        schema=tools.response_format(fields),
    )
    for name in IGNORED:
        fields.take(name)
    for name, harmless in NEUTRAL.items():
        value = fields.take(name)
        if value is not None and value not in harmless:
            raise fields.wrong(name, f"is not supported{_INSTEAD.get(name, '')}")
    fields.done()
    return AskedChat(model, tuple(replace(request, sampling=one) for one in _draws(sampling, count)), streaming)


def completion(fields: Fields) -> AskedCompletion:
    """The request, every field checked. Raises `UsageError`."""
    model, streaming, count = fields.required_text("model"), _streaming(fields), _count(fields)
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    if best_of not in (None, count):
        raise fields.wrong("best_of", "must be as many as n: what is drawn is given")
    prompts = _prompts(fields, "prompt", MAX_PROMPTS)
    if len(prompts) * count > MAX_PROMPTS:
        raise fields.wrong("n", f"times the number of prompts must be at most {MAX_PROMPTS}")
    logprobs = fields.integer("logprobs", 0, LEGACY_LOGPROBS)
    max_tokens = fields.integer("max_tokens", *INTEGERS["max_tokens"]) or LEGACY_MAX_TOKENS
    sampling = _sampling(fields, {"max_tokens": max_tokens, "logprobs": logprobs})
    echo = fields.flag("echo")
    if fields.take("suffix") not in (None, ""):
        raise fields.wrong("suffix", "is not supported: the models here only go on with a text")
    if echo and (logprobs is not None or not all(isinstance(prompt, str) for prompt in prompts)):
        raise fields.wrong("echo", "is for prompts that are text, and not with logprobs")
    fields.take("user")
    fields.done()
    requests = tuple(CompletionRequest(prompt, one) for prompt in prompts for one in _draws(sampling, count))
    return AskedCompletion(model, requests, count, echo, streaming)


def embeddings(fields: Fields) -> AskedEmbeddings:
    """The request, every field checked. Raises `UsageError`."""
    model, inputs = fields.required_text("model"), _prompts(fields, "input", MAX_INPUTS)
    encoding, dimensions = fields.take("encoding_format"), fields.integer("dimensions", 1, MAX_TOKENS)
    if encoding not in (None, "float", "base64"):
        raise fields.wrong("encoding_format", "must be float or base64")
    fields.take("user")
    fields.done()
    return AskedEmbeddings(model, EmbeddingRequest(inputs), encoding or "float", dimensions)


def _draws(sampling: Sampling, count: int) -> list[Sampling]:
    """One for each choice: with a seed each has its own, the first one the given."""
    if sampling.seed is None:
        return [sampling] * count
    low, high = INTEGERS["seed"]
    return [replace(sampling, seed=low + (sampling.seed - low + index) % (high - low + 1)) for index in range(count)]


def _sampling(fields: Fields, given: Mapping[str, Any]) -> Sampling:
    found: dict[str, Any] = {name: fields.number(name, low, high) for name, (low, high) in NUMBERS.items()}
    found |= {name: fields.integer(name, *INTEGERS[name]) for name in ("top_k", "seed")}
    found |= {**given, "stop": stop(fields), "logit_bias": _logit_bias(fields)}
    return Sampling(**{name: value for name, value in found.items() if value is not None})


def stop(fields: Fields) -> tuple[str, ...] | None:
    value = fields.take("stop")
    found = [value] if isinstance(value, str) else value
    if found is None:
        return None
    if not isinstance(found, list) or len(found) > MAX_STOPS or not all(isinstance(t, str) and 0 < len(t) <= MAX_STOP for t in found):
        raise fields.wrong("stop", f"must be up to {MAX_STOPS} texts of 1 to {MAX_STOP} characters")
    return tuple(found)


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    value = fields.take("logit_bias")
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise fields.wrong("logit_bias", f"must be an object of at most {MAX_BIASES} token ids and their bias")
    if not all(token.isascii() and token.isdigit() and len(token) <= 10 and int(token) <= MAX_TOKENS for token in value):
        raise fields.wrong("logit_bias", 'must have token ids as its names, such as "50256"')
    biases = fields.within("logit_bias", value)
    found: dict[int, float] = {}
    for token in value:
        bias = biases.number(token, *BIAS)
        if bias is None:
            raise biases.wrong(token, "is missing")
        found[int(token)] = bias
    return found


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top and not wanted:
        raise fields.wrong("top_logprobs", "needs logprobs")
    return (top or 0) if wanted else None


def _count(fields: Fields) -> int:
    return fields.integer("n", 1, MAX_CHOICES) or 1


def _streaming(fields: Fields) -> Streaming:
    stream, value = fields.flag("stream"), fields.take("stream_options")
    if value is None:
        return Streaming(stream, include_usage=False)
    if not stream:
        raise fields.wrong("stream_options", "is only for stream")
    options = fields.within("stream_options", value)
    include_usage = options.flag("include_usage")
    options.flag("include_obfuscation")  # padding against traffic analysis; loopback has no use for it
    options.done()
    return Streaming(stream, include_usage)


def _prompts(fields: Fields, name: str, most: int) -> tuple[Prompt, ...]:
    """A text, tokens, or a list of either."""
    value = fields.take(name)
    several = isinstance(value, list) and len(value) > 0 and isinstance(value[0], str | list)
    found: Sequence[Any] = value if several else [value]
    if len(found) > most:
        raise fields.wrong(name, f"has more than {most} entries")
    return tuple(_prompt(fields, f"{name}[{place}]" if several else name, one) for place, one in enumerate(found))


def _prompt(fields: Fields, name: str, value: Any) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise fields.wrong(name, "must not be empty")
        return value
    if not isinstance(value, list) or not value:
        raise fields.wrong(name, "must be text, tokens, or a list of either")
    if len(value) > MAX_PROMPT_TOKENS or not all(type(token) is int and 0 <= token <= MAX_TOKENS for token in value):
        raise fields.wrong(name, f"must be at most {MAX_PROMPT_TOKENS} token ids, which are whole numbers")
    return tuple(value)
