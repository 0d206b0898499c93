"""What stands inside a sealed chat: the question as JSON, and the frames of the answer. Pure; ceilings beside the parser.

    question  {"cid", "messages": [{"role", "content"}], and the sampling fields of `ChatRequest`}
    frame     {} (alive, nothing yet) | {"text"} | {"text", "finish", "usage": [prompt, completion]} | {"error": {"kind", "why", "hint"}}

Frames are padded to a multiple of 64 bytes, because the length of a token gives away text.
"""

from __future__ import annotations

import math
from typing import Any

from daemon.engine.interface import ChatRequest, Delta, Usage
from daemon.errors import (
    BackendError,
    Busy,
    InferenceError,
    NoMemory,
    NotFound,
    Refused,
    SwarmError,
    Unserved,
    UsageError,
    VerificationError,
)
from registry import strictjson
from registry.errors import Malformed

QUESTION_LIMIT = 3 << 20  # bytes of JSON
MESSAGES_LIMIT = 4096
STOPS_LIMIT = 16
STOP_LIMIT = 256  # characters
TOKENS_LIMIT = 2**31 - 1
ERROR_TEXT_LIMIT = 300  # characters
TEXT_LIMIT = 8 << 10  # characters of text in one frame; longer texts become several frames

_PAD = 64
_ROLES = frozenset({"system", "user", "assistant", "tool"})
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}
_FIELDS = frozenset({"cid", "messages", "max_tokens", "top_k", "seed", "stop", *_RANGES})
_FINISHES = ("stop", "length", "tool_calls")
# What a serving node may say went wrong; anything else becomes the last of them.
_ERRORS: dict[str, type[SwarmError]] = {
    cls.__name__: cls for cls in (UsageError, NotFound, Refused, Busy, Unserved, VerificationError, NoMemory, InferenceError)
}


def question(cid: str, request: ChatRequest) -> bytes:
    """`request` for the model `cid`. Raises `UsageError` when it is larger than a peer accepts."""
    body = strictjson.dumps(
        {
            "cid": cid,
            "messages": [{"role": message["role"], "content": message["content"]} for message in request.messages],
            "max_tokens": request.max_tokens,
            "top_k": request.top_k,
            "seed": request.seed,
            "stop": list(request.stop),
            **{name: getattr(request, name) for name in _RANGES},
        }
    )
    if len(body) > QUESTION_LIMIT or len(request.messages) > MESSAGES_LIMIT:
        raise UsageError("chat", "it is too long to be sent to another node", "shorten it")
    return body


def parse_question(body: bytes) -> tuple[str, ChatRequest]:
    """The model's CID and the chat. Raises `UsageError` for anything that our own `question` would not write."""
    try:
        fields = strictjson.loads(body, limit=QUESTION_LIMIT, what="the question")
    except Malformed as error:
        raise UsageError("chat", str(error)) from error
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise UsageError("chat", "it does not have the fields of this version", "update the older of the two nodes")
    _require(isinstance(fields["cid"], str) and 0 < len(fields["cid"]) <= 128, "cid")
    messages = fields["messages"]
    _require(isinstance(messages, list) and 0 < len(messages) <= MESSAGES_LIMIT, "messages")
    for message in messages:
        _require(isinstance(message, dict) and message.keys() == {"role", "content"}, "messages")
        _require(isinstance(message["role"], str) and isinstance(message["content"], str), "messages")
        _require(message["role"] in _ROLES, "messages")
    stops = fields["stop"]
    _require(isinstance(stops, list) and len(stops) <= STOPS_LIMIT, "stop")
    _require(all(isinstance(stop, str) and 0 < len(stop) <= STOP_LIMIT for stop in stops), "stop")
    for name, (low, high) in _RANGES.items():
        number = fields[name]
        _require(_is_number(number) and low <= number <= high, name)
    _require(fields["max_tokens"] is None or _is_int(fields["max_tokens"], 1, TOKENS_LIMIT), "max_tokens")
    _require(_is_int(fields["top_k"], -1, TOKENS_LIMIT), "top_k")
    _require(fields["seed"] is None or _is_int(fields["seed"], -(1 << 63), 1 << 63), "seed")
    return fields["cid"], ChatRequest(
        messages=tuple(messages),
        max_tokens=fields["max_tokens"],
        top_k=fields["top_k"],
        seed=fields["seed"],
        stop=tuple(stops),
        **{name: float(fields[name]) for name in _RANGES},
    )


ALIVE = b"{}".ljust(_PAD)


def frames(delta: Delta) -> list[bytes]:
    """`delta` as one or more frames; a final one is the last of the answer."""
    pieces = [delta.text[at : at + TEXT_LIMIT] for at in range(0, len(delta.text), TEXT_LIMIT)] or [""]
    fields: list[dict[str, Any]] = [{"text": piece} for piece in pieces]
    if delta.finish is not None:
        usage = delta.usage or Usage(0, 0)
        fields[-1] |= {"finish": delta.finish, "usage": [usage.prompt_tokens, usage.completion_tokens]}
    return [_padded(field) for field in fields]


def error_frame(error: SwarmError) -> bytes:
    """What the asker may know of a failure: our own troubles (files, processes, memory) are named by kind only."""
    kind = next((name for name, cls in _ERRORS.items() if isinstance(error, cls)), InferenceError.__name__)
    why, hint = (error.why, error.hint) if not isinstance(error, BackendError) else ("the serving node failed", "ask another node")
    return _padded({"error": {"kind": kind, "why": _plain(why), "hint": _plain(hint)}})


def parse_frame(frame: bytes) -> Delta | SwarmError | None:
    """A delta, the failure that ends the answer, or None for a sign of life. Raises `VerificationError` for anything else."""
    try:
        fields = strictjson.loads(frame, limit=64 << 10, what="a frame")
    except Malformed as error:
        raise _odd() from error
    match fields:
        case {**rest} if not rest:
            return None
        case {"error": {"kind": str(kind), "why": str(why), "hint": str(hint)}}:
            return _ERRORS.get(kind, InferenceError)("the answering node", _plain(why), _plain(hint))
        case {"text": str(text), "finish": str(finish), "usage": [int(prompt), int(completion)]} if finish in _FINISHES:
            return Delta(text, finish, Usage(prompt, completion))  # type: ignore[arg-type]  # mypy does not narrow by `in`
        case {"text": str(text), **rest} if not rest:
            return Delta(text)
    raise _odd()


def _padded(fields: dict[str, Any]) -> bytes:
    data = strictjson.dumps(fields)
    return data.ljust(-(-len(data) // _PAD) * _PAD)


def _plain(text: str) -> str:
    """Text of another node for our own error line: short, one line, nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text[:ERROR_TEXT_LIMIT])


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise UsageError("chat", f"{name} is not valid")


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _odd() -> VerificationError:
    return VerificationError("sealed answer", "a frame has an unknown form", "update the older of the two nodes")
