"""What the daemon and a worker say to each other: JSON objects behind a 4-byte big-endian length, over two pipes.

To the worker: `load` (first, once), then `ask`, `cancel`, `threads`. The worker ends when its pipe does.
From the worker: `stage` while it loads, then `ready` or `failed`; then `deltas` (pairs of a request and what came of it in one
step; its last one has a finish), and for single requests `embeddings` or `error`. Requests and answers stand in them as
daemon/engine/codec.py writes them.
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any, BinaryIO, Final, TypedDict

MAX_FRAME: Final = 32 << 20  # bytes; far above any chat that fits a context
# What a worker has room for, and what is counted for it before it is loaded.
GUESSES: Final = 8  # rows with logits in one decode, beyond those of the slots
TEXTS: Final = 64  # texts that are embedded together
_LENGTH = struct.Struct(">I")

Message = dict[str, Any]


class ProtocolError(Exception):
    """The other side sent something that is no frame."""


class Load(TypedDict):
    """How a worker loads its one model."""

    path: str
    context: int
    slots: int
    threads: int
    batch: int
    gpu_layers: int
    blas: bool  # read prompts with the one that llama.cpp was built with, if any
    template: str | None


def encode(message: Message) -> bytes:
    """One frame. Raises `ProtocolError` when it would be too large."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a frame of {len(body)} bytes")
    return _LENGTH.pack(len(body)) + body


def read(stream: BinaryIO) -> Message | None:
    """The next message of a blocking stream; None at its end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    body = stream.read(_length(head))
    return _decode(body) if len(body) == _length(head) else None


async def receive(stream: asyncio.StreamReader) -> Message | None:
    """The next message; None when the other side is gone."""
    try:
        head = await stream.readexactly(_LENGTH.size)
        return _decode(await stream.readexactly(_length(head)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _length(head: bytes) -> int:
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME:
        raise ProtocolError(f"a frame of {length} bytes")
    return int(length)


def _decode(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except ValueError as error:
        raise ProtocolError("a frame that is not JSON") from error
    if not isinstance(message, dict):
        raise ProtocolError("a frame that is no object")
    return message
