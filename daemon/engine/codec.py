"""Requests and answers as JSON: the one form in which they cross the pipe to a worker and, sealed, the way to a peer.

What is at its default is left out. Reading is strict - another node wrote it -: every field known, typed and under its ceiling.

    request  {"kind": "chat", "messages", "tools", "tool_choice", "forced_tool", "parallel_tool_calls", "schema", "sampling"}
             {"kind": "completion", "prompt", "sampling"} | {"kind": "embedding", "inputs"}
    delta    {"text", "tool_calls": [[index, id, name, arguments]], "logprobs": [[drawn, [candidate]]], "finish", "usage": [p, c, k]}
             a candidate is [bytes in base64, logprob]
    vectors  {"vectors": [base64 of float32], "prompt_tokens"}
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final, get_args

from daemon.engine.interface import (
    Candidate,
    ChatRequest,
    CompletionRequest,
    Delta,
    EmbeddingRequest,
    Embeddings,
    FinishReason,
    Request,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCallDelta,
    ToolChoice,
    Usage,
)
from registry import strictjson
from registry.errors import Malformed

MAX_MESSAGES: Final = 4096
MAX_TOOLS: Final = 128
MAX_CALLS: Final = 128  # in one message
MAX_INPUTS: Final = 2048  # texts to embed at once
MAX_TOKENS: Final = 2**31 - 1
MAX_TEXT: Final = 4 << 20  # characters of any one text
MAX_SCHEMA: Final = 64 << 10  # bytes of JSON, also of the parameters of one tool
MAX_STOPS: Final = 16
MAX_STOP: Final = 256  # characters
MAX_BIASES: Final = 1024
MAX_LOGPROBS: Final = 20
MAX_VECTOR: Final = 1 << 18  # bytes; 65536 dimensions
TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
ROLES: Final = frozenset({"system", "user", "assistant", "tool"})
# What may be asked for, here and in every API.
NUMBERS: Final[Mapping[str, tuple[float, float]]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.1, 10),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
}
INTEGERS: Final[Mapping[str, tuple[int, int]]] = {
    "max_tokens": (1, MAX_TOKENS),
    "top_k": (0, 1_000_000),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, MAX_LOGPROBS),
}
BIAS: Final = (-100, 100)

_MESSAGE_FIELDS: Final = frozenset({"role", "content", "tool_calls", "tool_call_id"})

Json = dict[str, Any]


# --- requests ---


def dump_request(request: Request | EmbeddingRequest) -> Json:
    match request:
        case ChatRequest():
            told = _changed(request, ChatRequest(request.messages))
            told["messages"] = list(request.messages)
            if request.tools:
                told["tools"] = [tool.as_json() for tool in request.tools]
            kind = "chat"
        case CompletionRequest():
            told = {"prompt": request.prompt if isinstance(request.prompt, str) else list(request.prompt)}
            kind = "completion"
        case EmbeddingRequest():
            return {"kind": "embedding", "inputs": [one if isinstance(one, str) else list(one) for one in request.inputs]}
    sampling = _changed(request.sampling, Sampling())
    if "logit_bias" in sampling:
        sampling["logit_bias"] = [[token, bias] for token, bias in request.sampling.logit_bias.items()]
    if "stop" in sampling:
        sampling["stop"] = list(request.sampling.stop)
    told.pop("sampling", None)
    return {"kind": kind, **told, **({"sampling": sampling} if sampling else {})}


def load_request(given: Any) -> Request | EmbeddingRequest:
    """Raises `Malformed`, which names the field."""
    _require(isinstance(given, dict), "request")
    rest: Json = {name: value for name, value in given.items() if name != "kind"}
    match given.get("kind"):
        case "chat":
            return _chat(rest)
        case "completion":
            _known(rest, {"prompt", "sampling"})
            return CompletionRequest(_prompt(rest.get("prompt"), "prompt"), _sampling(rest.get("sampling", {})))
        case "embedding":
            _known(rest, {"inputs"})
            inputs = _list(rest.get("inputs"), "inputs", MAX_INPUTS)
            _require(bool(inputs), "inputs")
            return EmbeddingRequest(tuple(_prompt(one, "inputs") for one in inputs))
    raise Malformed("the request is of no kind that is known here")


def _chat(given: Json) -> ChatRequest:
    _known(given, {field.name for field in fields(ChatRequest)})
    choice, forced = given.get("tool_choice", "auto"), given.get("forced_tool")
    tools = tuple(_tool(one) for one in _list(given.get("tools", []), "tools", MAX_TOOLS))
    names = {tool.name for tool in tools}
    _require(len(names) == len(tools), "tools")
    _require(choice in get_args(ToolChoice) and (choice != "required" or bool(tools)), "tool_choice")
    _require(forced is None or (isinstance(forced, str) and forced in names and choice == "required"), "forced_tool")
    parallel = given.get("parallel_tool_calls", True)
    _require(isinstance(parallel, bool), "parallel_tool_calls")
    messages = _list(given.get("messages"), "messages", MAX_MESSAGES)
    _require(bool(messages), "messages")
    for message in messages:
        _check_message(message)
    schema = given.get("schema")
    if schema is not None:
        check_schema(schema, "schema")
    return ChatRequest(tuple(messages), _sampling(given.get("sampling", {})), tools, choice, forced, parallel, schema)


def _check_message(message: Any) -> None:
    _require(isinstance(message, dict) and {"role", "content"} <= message.keys() <= _MESSAGE_FIELDS, "messages")
    _text(message["content"], "messages")
    _require(isinstance(message["role"], str) and message["role"] in ROLES, "messages")
    if "tool_call_id" in message:
        _require(message["role"] == "tool", "messages")
        _text(message["tool_call_id"], "messages")
    if "tool_calls" in message:
        _require(message["role"] == "assistant", "messages")
        for call in _list(message["tool_calls"], "messages", MAX_CALLS):
            _require(isinstance(call, dict) and call.keys() == {"id", "type", "function"} and call["type"] == "function", "messages")
            function = call["function"]
            _require(isinstance(function, dict) and function.keys() == {"name", "arguments"}, "messages")
            for text in (call["id"], *function.values()):
                _text(text, "messages")
            _require(TOOL_NAME.fullmatch(function["name"]) is not None, "messages")


def _tool(given: Any) -> Tool:
    _require(isinstance(given, dict) and given.keys() == {"name", "description", "parameters"}, "tools")
    name = given["name"]
    _require(isinstance(name, str) and TOOL_NAME.fullmatch(name) is not None, "tools")
    check_schema(given["parameters"], "tools")
    return Tool(name, _text(given["description"], "tools"), given["parameters"])


def check_schema(schema: Any, name: str) -> None:
    """A JSON schema that is an object and under its ceiling; whether it can be followed is the worker's to say."""
    _require(isinstance(schema, dict) and len(strictjson.dumps(schema)) <= MAX_SCHEMA, name)


def _sampling(given: Any) -> Sampling:
    _require(isinstance(given, dict), "sampling")
    _known(given, {field.name for field in fields(Sampling)})
    found: Json = {}
    for name, (low, high) in NUMBERS.items():
        if name in given:
            found[name] = _number(given[name], low, high, name)
    for name, (least, most) in INTEGERS.items():
        if given.get(name) is not None:
            found[name] = _integer(given[name], least, most, name)
    if "stop" in given:
        stops = _list(given["stop"], "stop", MAX_STOPS)
        _require(all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP for stop in stops), "stop")
        found["stop"] = tuple(stops)
    if "logit_bias" in given:
        pairs = _list(given["logit_bias"], "logit_bias", MAX_BIASES)
        _require(all(isinstance(pair, list) and len(pair) == 2 for pair in pairs), "logit_bias")
        found["logit_bias"] = {_integer(t, 0, MAX_TOKENS, "logit_bias"): _number(b, *BIAS, "logit_bias") for t, b in pairs}
    return Sampling(**found)


def _prompt(given: Any, name: str) -> str | tuple[int, ...]:
    if isinstance(given, list):
        _require(0 < len(given) <= MAX_TEXT, name)
        return tuple(_integer(token, 0, MAX_TOKENS, name) for token in given)
    return _text(given, name)


# --- answers ---


def dump_delta(delta: Delta) -> Json:
    told: Json = {"text": delta.text} if delta.text else {}
    if delta.tool_calls:
        told["tool_calls"] = [[call.index, call.id, call.name, call.arguments] for call in delta.tool_calls]
    if delta.logprobs:
        told["logprobs"] = [[_candidate(one.drawn), [_candidate(other) for other in one.likeliest]] for one in delta.logprobs]
    if delta.finish is not None:
        usage = delta.usage or Usage(0, 0)
        told |= {"finish": delta.finish, "usage": [usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens]}
    return told


def load_delta(given: Any) -> Delta:
    """Raises `Malformed`."""
    _require(isinstance(given, dict), "delta")
    _known(given, {"text", "tool_calls", "logprobs", "finish", "usage"})
    finish, usage = given.get("finish"), None
    if finish is not None:
        _require(finish in get_args(FinishReason), "finish")
        counts = _list(given.get("usage"), "usage", 3)
        _require(len(counts) == 3, "usage")
        usage = Usage(*(_integer(count, 0, MAX_TOKENS, "usage") for count in counts))
    return Delta(
        text=_text(given.get("text", ""), "text"),
        tool_calls=tuple(_call_delta(one) for one in _list(given.get("tool_calls", []), "tool_calls", MAX_CALLS)),
        logprobs=tuple(_logprob(one) for one in _list(given.get("logprobs", []), "logprobs", MAX_TEXT)),
        finish=finish,
        usage=usage,
    )


def dump_embeddings(embeddings: Embeddings) -> Json:
    return {"vectors": [_base64(vector) for vector in embeddings.vectors], "prompt_tokens": embeddings.prompt_tokens}


def load_embeddings(given: Any) -> Embeddings:
    """Raises `Malformed`."""
    _require(isinstance(given, dict), "vectors")
    _known(given, {"vectors", "prompt_tokens"})
    vectors = tuple(_bytes(one, MAX_VECTOR, "vectors") for one in _list(given.get("vectors"), "vectors", MAX_INPUTS))
    _require(len({len(vector) for vector in vectors}) <= 1 and all(vector and len(vector) % 4 == 0 for vector in vectors), "vectors")
    return Embeddings(vectors, _integer(given.get("prompt_tokens"), 0, MAX_TOKENS, "prompt_tokens"))


def _candidate(candidate: Candidate) -> list[Any]:
    return [_base64(candidate.bytes), candidate.logprob]


def _load_candidate(given: Any) -> Candidate:
    pair = _list(given, "logprobs", 2)
    _require(len(pair) == 2, "logprobs")
    return Candidate(_bytes(pair[0], MAX_TEXT, "logprobs"), _number(pair[1], -1e9, 1e-3, "logprobs"))


def _logprob(given: Any) -> TokenLogprob:
    pair = _list(given, "logprobs", 2)
    _require(len(pair) == 2, "logprobs")
    likeliest = _list(pair[1], "logprobs", MAX_LOGPROBS)
    return TokenLogprob(_load_candidate(pair[0]), tuple(_load_candidate(one) for one in likeliest))


def _call_delta(given: Any) -> ToolCallDelta:
    parts = _list(given, "tool_calls", 4)
    _require(len(parts) == 4, "tool_calls")
    index, call_id, name, arguments = parts
    _require(call_id is None or (isinstance(call_id, str) and len(call_id) <= 64), "tool_calls")
    _require(name is None or (isinstance(name, str) and TOOL_NAME.fullmatch(name) is not None), "tool_calls")
    return ToolCallDelta(_integer(index, 0, MAX_CALLS, "tool_calls"), call_id, name, _text(arguments, "tool_calls"))


# --- single values ---


def _changed(given: Any, default: Any) -> Json:
    """The fields of a dataclass that differ from those of `default`."""
    names = [field.name for field in fields(given)]
    return {name: value for name in names if (value := getattr(given, name)) != getattr(default, name)}


def _known(given: Mapping[str, Any], names: set[str]) -> None:
    unknown = sorted(given.keys() - names)
    if unknown:
        raise Malformed(f"{ascii(unknown[0][:40])[1:-1]} is no field that is known here")


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise Malformed(f"{name} is not valid")


def _list(given: Any, name: str, most: int) -> Sequence[Any]:
    _require(isinstance(given, list) and len(given) <= most, name)
    found: Sequence[Any] = given
    return found


def _text(given: Any, name: str) -> str:
    _require(isinstance(given, str) and len(given) <= MAX_TEXT, name)
    return str(given)


def _integer(given: Any, low: int, high: int, name: str) -> int:
    _require(isinstance(given, int) and not isinstance(given, bool) and low <= given <= high, name)
    return int(given)


def _number(given: Any, low: float, high: float, name: str) -> float:
    _require(isinstance(given, int | float) and not isinstance(given, bool) and low <= given <= high and math.isfinite(given), name)
    return float(given)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(given: Any, most: int, name: str) -> bytes:
    try:
        data = base64.b64decode(_text(given, name), validate=True)
    except (binascii.Error, ValueError):
        raise Malformed(f"{name} is not valid") from None
    _require(len(data) <= most, name)
    return data
