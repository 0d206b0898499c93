"""What stands inside a sealed request: the question as JSON, and the frames of the answer. Pure; ceilings beside the parser.

    question  {"cid", "request"}
    frame     {} (alive, nothing yet) | {"delta"} | {"embeddings"} | {"error": {"kind", "why", "hint"}}

Requests, deltas and embeddings stand in them as daemon/engine/codec.py writes them. Frames are padded to a multiple of 64 bytes,
because the length of a token gives away text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from daemon.engine import codec
from daemon.engine.interface import Delta, EmbeddingRequest, Embeddings, Request
from daemon.errors import (
    BackendError,
    Busy,
    ContextOverflow,
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
FRAME_LIMIT = 16 << 20  # bytes; the vectors of one request
ERROR_TEXT_LIMIT = 300  # characters
TEXT_LIMIT = 8 << 10  # characters of text in one frame; longer texts become several frames

_PAD = 64
# What a serving node may say went wrong; anything else becomes the last of them.
_ERRORS: dict[str, type[SwarmError]] = {
    cls.__name__: cls
    for cls in (ContextOverflow, UsageError, NotFound, Refused, Busy, Unserved, VerificationError, NoMemory, InferenceError)
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
    pieces = [delta.text[at : at + TEXT_LIMIT] for at in range(0, len(delta.text), TEXT_LIMIT)] or [""]
    told = [Delta(text=piece) for piece in pieces[:-1]] + [replace(delta, text=pieces[-1])]
    return [_padded({"delta": codec.dump_delta(one)}) for one in told]


def embeddings_frame(embeddings: Embeddings) -> bytes:
    return _padded({"embeddings": codec.dump_embeddings(embeddings)})


def error_frame(error: SwarmError) -> bytes:
    """What the asker may know of a failure: our own troubles (files, processes, memory) are named by kind only."""
    kind = next((name for name, cls in _ERRORS.items() if isinstance(error, cls)), InferenceError.__name__)
    why, hint = (error.why, error.hint) if not isinstance(error, BackendError) else ("the serving node failed", "ask another node")
    return _padded({"error": {"kind": kind, "why": _plain(why), "hint": _plain(hint)}})


def parse_frame(frame: bytes) -> Delta | Embeddings | SwarmError | None:
    """What a frame says, the failure that ends the answer, or None for a sign of life. Raises `VerificationError` for anything else."""
    try:
        match strictjson.loads(frame, limit=FRAME_LIMIT, what="a frame"):
            case {**rest} if not rest:
                return None
            case {"delta": delta, **rest} if not rest:
                return codec.load_delta(delta)
            case {"embeddings": embeddings, **rest} if not rest:
                return codec.load_embeddings(embeddings)
            case {"error": {"kind": str(kind), "why": str(why), "hint": str(hint)}}:
                return _ERRORS.get(kind, InferenceError)("the answering node", _plain(why), _plain(hint))
    except Malformed as error:
        raise _odd() from error
    raise _odd()


def _padded(fields: dict[str, Any]) -> bytes:
    data = strictjson.dumps(fields)
    return data.ljust(-(-len(data) // _PAD) * _PAD)


def _plain(text: str) -> str:
    """Text of another node for our own error line: short, one line, nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text[:ERROR_TEXT_LIMIT])


def _odd() -> VerificationError:
    return VerificationError("sealed answer", "a frame has an unknown form", "update the older of the two nodes")
