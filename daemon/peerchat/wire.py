"""What stands inside a sealed request: the question as JSON, and the frames of the answer. Pure; ceilings beside the parser.

    question  {"cid", "request"}
    frame     {} (alive, nothing yet) | {"delta"} | {"vectors": {"data", "count", "prompt_tokens"}} | {"error": {"kind", "why", "hint"}}

Requests and deltas stand in them as daemon/engine/codec.py writes them; what is larger than a frame becomes several. Vectors are the
float32 of all, one after the other, in pieces in base64; the last piece alone has `count` and `prompt_tokens`. Frames are padded to
a multiple of 64 bytes, because the length of a token gives away text.
"""

from __future__ import annotations

import base64
import binascii
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from daemon.engine import codec
from daemon.engine.interface import Delta, EmbeddingRequest, Embeddings, Request
from daemon.errors import (
    BackendError,
    Busy,
    ContextOverflow,
    InferenceError,
    ModelLoadError,
    NoMemory,
    NotFound,
    Refused,
    SwarmError,
    Unserved,
    UsageError,
    VerificationError,
)
from daemon.peerchat.seal import FRAME_LIMIT
from registry import strictjson
from registry.errors import Malformed

QUESTION_LIMIT = 3 << 20  # bytes of JSON
VECTORS_LIMIT = 32 << 20  # bytes of all vectors of one request
ERROR_TEXT_LIMIT = 300  # characters
TEXT_LIMIT = 8 << 10  # characters of text in one frame; JSON takes six bytes for one at most

_PIECE = 40 << 10  # bytes of vectors in one frame; base64 adds a third
_PAD = 64
# What a serving node may say went wrong; anything else becomes the last of them.
_ERRORS: dict[str, type[SwarmError]] = {
    cls.__name__: cls
    for cls in (ContextOverflow, UsageError, NotFound, Refused, Busy, Unserved, VerificationError, NoMemory, ModelLoadError, InferenceError)
}


def question(cid: str, request: Request | EmbeddingRequest) -> bytes:
    """`request` for the model `cid`. Raises `UsageError` when it is larger than a peer accepts."""
    body = strictjson.dumps({"cid": cid, "request": codec.dump_request(request)}, sort_keys=False)
    if len(body) > QUESTION_LIMIT:
        raise UsageError("chat", "it is too long to be sent to another node", "shorten it")
    return body


def parse_question(body: bytes) -> tuple[str, Request | EmbeddingRequest]:
    """The model's CID and the request. Raises `UsageError` for anything that our own `question` would not write."""
    try:
        match strictjson.loads(body, limit=QUESTION_LIMIT, what="the question"):
            case {"cid": str(cid), "request": request, **rest} if not rest and 0 < len(cid) <= 128:
                return cid, codec.load_request(request)
    except Malformed as error:
        raise UsageError("chat", str(error), "update the older of the two nodes") from error
    raise UsageError("chat", "it does not have the fields of this version", "update the older of the two nodes")


ALIVE = b"{}".ljust(_PAD)


def frames(delta: Delta) -> list[bytes]:
    """`delta` as one or more frames; a final one is the last of the answer."""
    frame = _padded({"delta": codec.dump_delta(delta)})
    if len(frame) <= FRAME_LIMIT:
        return [frame]
    told = [*_pieces(delta), Delta(finish=delta.finish, usage=delta.usage)]
    return [_padded({"delta": codec.dump_delta(one)}) for one in told]


def _pieces(delta: Delta) -> Iterator[Delta]:
    """What a delta says, in the order of its fields, each part small enough for a frame of its own."""
    for text in _cut(delta.text):
        yield Delta(text)
    for call in delta.tool_calls:
        first, *rest = _cut(call.arguments) or [""]
        yield Delta(tool_calls=(replace(call, arguments=first),))
        yield from (Delta(tool_calls=(replace(call, id=None, name=None, arguments=text),)) for text in rest)
    for one in delta.logprobs:
        yield Delta(logprobs=(one,))


def _cut(text: str) -> list[str]:
    return [text[at : at + TEXT_LIMIT] for at in range(0, len(text), TEXT_LIMIT)]


@dataclass(frozen=True, slots=True)
class Vectors:
    """A piece of the vectors of one answer; the last says how many they are."""

    data: bytes
    count: int | None = None
    prompt_tokens: int = 0


def vector_frames(embeddings: Embeddings) -> Iterator[bytes]:
    """The last frame is the last of the answer. Raises `UsageError` when the vectors are larger than a peer accepts."""
    data = b"".join(embeddings.vectors)
    if len(data) > VECTORS_LIMIT:
        raise UsageError("request", "its vectors are too large to be sent to another node", "ask for fewer at once")
    end = max(len(data) - 1, 0) // _PIECE * _PIECE
    for at in range(0, end, _PIECE):
        yield _padded({"vectors": {"data": base64.b64encode(data[at : at + _PIECE]).decode()}})
    last = {"data": base64.b64encode(data[end:]).decode(), "count": len(embeddings.vectors), "prompt_tokens": embeddings.prompt_tokens}
    yield _padded({"vectors": last})


class VectorsJoiner:
    """The pieces of one answer, in order."""

    def __init__(self) -> None:
        self._data = bytearray()

    def take(self, piece: Vectors) -> Embeddings | None:
        """The whole when `piece` is the last. Raises `VerificationError` for vectors that are too large, have no length in common, or
        hold what is no number and no JSON could say.
        """
        self._data += piece.data
        if len(self._data) > VECTORS_LIMIT or len(piece.data) % 4 or not math.isfinite(sum(array("f", piece.data))):
            raise _odd()
        if piece.count is None:
            return None
        size, rest = divmod(len(self._data), piece.count)
        if rest or not size or size % 4 or size > codec.MAX_VECTOR:
            raise _odd()
        vectors = tuple(bytes(self._data[at : at + size]) for at in range(0, len(self._data), size))
        return Embeddings(vectors, piece.prompt_tokens)


def error_frame(error: SwarmError) -> bytes:
    """What the asker may know of a failure: our own troubles (files, processes, memory) are named by kind only."""
    kind = next((name for name, cls in _ERRORS.items() if isinstance(error, cls)), InferenceError.__name__)
    why, hint = (error.why, error.hint) if not isinstance(error, BackendError) else ("the serving node failed", "ask another node")
    return _padded({"error": {"kind": kind, "why": _plain(why), "hint": _plain(hint)}})


def parse_frame(frame: bytes) -> Delta | Vectors | SwarmError | None:
    """What a frame says, the failure that ends the answer, or None for a sign of life. Raises `VerificationError` for anything else."""
    try:
        match strictjson.loads(frame, limit=FRAME_LIMIT, what="a frame"):
            case {**rest} if not rest:
                return None
            case {"delta": delta, **rest} if not rest:
                return codec.load_delta(delta)
            case {"vectors": {"data": str(data), "count": int(count), "prompt_tokens": int(tokens)}} if _counts(count, tokens):
                return Vectors(base64.b64decode(data, validate=True), count, tokens)
            case {"vectors": {"data": str(data), **rest}} if not rest:
                return Vectors(base64.b64decode(data, validate=True))
            case {"error": {"kind": str(kind), "why": str(why), "hint": str(hint)}}:
                return _ERRORS.get(kind, InferenceError)("the answering node", _plain(why), _plain(hint))
    except (Malformed, binascii.Error) as error:
        raise _odd() from error
    raise _odd()


def _counts(count: int, tokens: int) -> bool:
    return 1 <= count <= codec.MAX_INPUTS and 0 <= tokens <= codec.MAX_TOKENS


def _padded(fields: dict[str, Any]) -> bytes:
    data = strictjson.dumps(fields)
    return data.ljust(-(-len(data) // _PAD) * _PAD)


def _plain(text: str) -> str:
    """Text of another node for our own error line: short, one line, nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text[:ERROR_TEXT_LIMIT])


def _odd() -> VerificationError:
    return VerificationError("sealed answer", "a frame has an unknown form", "update the older of the two nodes")
