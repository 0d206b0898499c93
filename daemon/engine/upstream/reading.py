"""How the answers of an OpenAI-compatible server are read: events, deltas, vectors, lists of models. Pure; ceilings beside the parsers.

What is not of the form that OpenAI's API has raises `Malformed`. Fields that are not known are left alone, as every client does.
"""

from __future__ import annotations

import base64
import binascii
import math
import secrets
from array import array
from collections.abc import Mapping
from typing import Any, Final, get_args

from daemon.engine import codec
from daemon.engine.interface import (
    Candidate,
    ChatRequest,
    Delta,
    Embeddings,
    FinishReason,
    Request,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from daemon.engine.upstream.form import told_failure
from daemon.errors import InferenceError
from registry import strictjson
from registry.errors import Malformed

MAX_EVENT: Final = 1 << 20  # bytes
MAX_MODELS: Final = 4096
MAX_TOKEN: Final = 1024  # bytes of one token
DONE: Final = b"[DONE]"


class EventReader:
    """Server-sent events, of which only the data counts. Whatever has no end is refused by its size."""

    def __init__(self) -> None:
        self._line = b""
        self._data: bytearray | None = None  # of the event that has begun

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that `data` completes. Raises `Malformed` for an event of more than `MAX_EVENT` bytes."""
        *lines, self._line = (self._line + data).split(b"\n")
        found: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                piece = line[5:].removeprefix(b" ")
                if self._data is None:
                    self._data = bytearray(piece)
                else:
                    self._data += b"\n" + piece
            elif not line and self._data is not None:
                found.append(bytes(self._data))
                self._data = None
            if len(self._data or b"") > MAX_EVENT:
                raise Malformed("an event is too large")
        if len(self._line) > MAX_EVENT:
            raise Malformed("an event is too large")
        return found

    def end(self) -> list[bytes]:
        """What stands there when the stream ends without an empty line."""
        return self.feed(b"\n\n")


class AnswerReader:
    """The events of one answer, in order."""

    def __init__(self, request: Request) -> None:
        self.finish: FinishReason | None = None
        self._usage: Usage | None = None
        self._chat = isinstance(request, ChatRequest)
        self._logprobs = request.sampling.logprobs is not None
        self._calls = 0

    def take(self, event: bytes, key: str | None) -> Delta | None:
        """What an event adds. Raises `Malformed` for one that is none, and the error that it tells (without `key`)."""
        chunk = strictjson.loads(event, limit=MAX_EVENT, what="an event")
        _require(isinstance(chunk, dict))
        if chunk.get("error"):
            raise told_failure(chunk, key)
        if isinstance(chunk.get("usage"), dict):
            self._usage = _usage(chunk["usage"])
        choices = chunk.get("choices", [])
        _require(isinstance(choices, list) and len(choices) <= 1)
        return self._choice(choices[0]) if choices else None

    def end(self) -> Delta:
        """The last delta. Raises `InferenceError` when the answer was cut off."""
        if self.finish is None:
            raise InferenceError("upstream", "it ended its answer without saying how", "ask again")
        return Delta(finish=self.finish, usage=self._usage or Usage(0, 0))

    def _choice(self, choice: Any) -> Delta | None:
        _require(isinstance(choice, dict) and choice.get("index", 0) == 0)
        said = choice.get("delta") or {} if self._chat else {"content": choice.get("text")}
        _require(isinstance(said, dict))
        # A refusal takes the place of the text.
        texts = [said.get("content"), said.get("refusal")]
        _require(all(text is None or isinstance(text, str) for text in texts))
        logprobs = _logprobs(choice.get("logprobs")) if self._logprobs else ()
        calls = said.get("tool_calls")
        calls = [] if calls is None else calls
        _require(isinstance(calls, list) and len(calls) <= codec.MAX_CALLS)
        delta = Delta("".join(text or "" for text in texts), tuple(self._call(call) for call in calls), logprobs)
        self._note_finish(choice.get("finish_reason"))
        return delta if delta != Delta() else None

    def _call(self, call: Any) -> ToolCallDelta:
        _require(isinstance(call, dict))
        function, index = call.get("function") or {}, call.get("index")
        _require(isinstance(function, dict))
        if index is None:
            # Some servers number no calls: one that has a name is the next.
            index = self._calls if function.get("name") else self._calls - 1
        _require(isinstance(index, int) and 0 <= index <= min(self._calls, codec.MAX_CALLS - 1))
        arguments = function.get("arguments")
        arguments = "" if arguments is None else arguments
        _require(isinstance(arguments, str))
        if index < self._calls:
            return ToolCallDelta(index, arguments=arguments)
        self._calls += 1
        call_id, name = call.get("id") or f"call_{secrets.token_hex(12)}", function.get("name")
        _require(isinstance(call_id, str) and len(call_id) <= 64 and isinstance(name, str) and bool(codec.TOOL_NAME.fullmatch(name)))
        return ToolCallDelta(index, call_id, name, arguments)

    def _note_finish(self, reason: Any) -> None:
        if reason is None:
            return
        if reason == "content_filter":
            raise InferenceError("upstream", "it withheld the answer: its content filter said no", "ask another model")
        reason = "tool_calls" if reason == "function_call" else reason
        _require(reason in get_args(FinishReason))
        # A forced call ends as "stop" at some servers, OpenAI's among them.
        self.finish = "tool_calls" if reason == "stop" and self._calls else reason


def embeddings(document: Any, count: int) -> Embeddings:
    """The `count` vectors of an answer, in order and of length 1. Raises `Malformed`."""
    _require(isinstance(document, dict) and isinstance(document.get("data"), list) and len(document["data"]) == count)
    found: dict[int, bytes] = {}
    for entry in document["data"]:
        _require(isinstance(entry, dict) and isinstance(entry.get("index"), int) and 0 <= entry["index"] < count)
        found[entry["index"]] = _vector(entry.get("embedding"))
    _require(len(found) == count and len({len(vector) for vector in found.values()}) == 1)
    usage = document.get("usage")
    return Embeddings(tuple(found[number] for number in range(count)), _usage(usage if isinstance(usage, dict) else {}).prompt_tokens)


def models(document: Any) -> list[str]:
    """The ids of a list of models, and behind them the names that a node of the swarm gives beside its codes. Raises `Malformed`."""
    _require(isinstance(document, dict) and isinstance(document.get("data"), list) and len(document["data"]) <= MAX_MODELS)
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in document["data"]]
    _require(all(isinstance(one, str) for one in ids))
    names = [entry["name"] for entry in document["data"] if isinstance(entry.get("name"), str)]
    return [*map(str, ids), *(name for name in names if name not in ids)]


def _vector(given: Any) -> bytes:
    try:
        # Both are little-endian: what crosses the net by definition, and every machine that this runs on.
        numbers = array("f", base64.b64decode(given, validate=True)) if isinstance(given, str) else array("f", given)
        length = math.hypot(*numbers)
    except (TypeError, ValueError, OverflowError, binascii.Error):
        raise _odd() from None
    _require(0 < len(numbers) * 4 <= codec.MAX_VECTOR and math.isfinite(length))
    if length and abs(length - 1) > 1e-4:
        numbers = array("f", (number / length for number in numbers))
    return numbers.tobytes()


def _usage(given: Mapping[str, Any]) -> Usage:
    details = given.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    return Usage(*(_count(value) for value in (given.get("prompt_tokens"), given.get("completion_tokens"), cached)))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value <= codec.MAX_TOKENS else 0


def _logprobs(given: Any) -> tuple[TokenLogprob, ...]:
    """Of a chat (`content`), or of OpenAI's completions (`tokens`, `token_logprobs`, `top_logprobs`)."""
    if not given:
        return ()
    _require(isinstance(given, dict))
    if isinstance(given.get("content"), list):
        return tuple(TokenLogprob(_candidate(one), tuple(_candidate(other) for other in _others(one))) for one in given["content"])
    tokens, values, tops = (given.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs"))
    _require(all(isinstance(one, list) for one in (tokens, values, tops)) and len(tokens) == len(values) and len(tops) in (0, len(tokens)))
    found = []
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        top = (tops[place] if tops else None) or {}
        _require(isinstance(top, dict) and len(top) <= codec.MAX_LOGPROBS + 1)
        likeliest = sorted((_candidate({"token": text, "logprob": one}) for text, one in top.items()), key=lambda one: -one.logprob)
        found.append(TokenLogprob(_candidate({"token": token, "logprob": value}), tuple(likeliest[: codec.MAX_LOGPROBS])))
    return tuple(found)


def _others(given: Any) -> list[Any]:
    others = given.get("top_logprobs") or [] if isinstance(given, dict) else None
    _require(isinstance(others, list))
    return list(others or [])[: codec.MAX_LOGPROBS]


def _candidate(given: Any) -> Candidate:
    _require(isinstance(given, dict) and isinstance(given.get("token"), str) and isinstance(given.get("logprob"), int | float))
    given_bytes = given.get("bytes")
    _require(given_bytes is None or (isinstance(given_bytes, list) and len(given_bytes) <= MAX_TOKEN))
    try:
        data = given["token"].encode() if given_bytes is None else bytes(given_bytes)
    except (TypeError, ValueError):
        raise _odd() from None
    _require(len(data) <= MAX_TOKEN)
    return Candidate(data, float(max(-1e9, min(0.0, given["logprob"]))))


def _require(holds: bool) -> None:
    if not holds:
        raise _odd()


def _odd() -> Malformed:
    return Malformed("it is not of the form that OpenAI's API has")
