"""A small GGUF writer for tests: valid files of any size, and invalid ones byte by byte."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
ALIGNMENT = 32
I8 = 24  # ggml tensor type of one byte per element, so that a file can have any size

Entry = tuple[str, int, object]
Tensor = tuple[str, Sequence[int], int, int]  # name, shape, type, offset

METADATA: tuple[Entry, ...] = (
    ("general.architecture", STRING, "llama"),
    ("general.name", STRING, "Tiny"),
    ("general.license", STRING, "apache-2.0"),
    ("general.file_type", U32, 7),
    ("llama.context_length", U32, 512),
    ("llama.embedding_length", U32, 64),
    ("llama.block_count", U32, 2),
    ("llama.attention.head_count", U32, 4),
    ("llama.attention.head_count_kv", U32, 2),
    ("tokenizer.ggml.tokens", ARRAY, (STRING, ["<s>", "</s>", "a", "b"])),
    ("tokenizer.ggml.scores", ARRAY, (F32, [0.0, 0.0, -1.0, -2.0])),
    ("tokenizer.chat_template", STRING, "{% for m in messages %}{{ m.content }}{% endfor %}"),
)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: object) -> bytes:
    if kind == STRING:
        assert isinstance(content, str | bytes)
        return text(content)
    if kind == ARRAY:
        assert isinstance(content, tuple)
        item_kind, items = content
        return struct.pack("<IQ", item_kind, len(items)) + b"".join(value(item_kind, item) for item in items)
    return struct.pack("<" + {U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q"}[kind], content)


def tensor_info(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(
    metadata: Sequence[Entry] = METADATA,
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    keys: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """Everything before the tensor data, without the padding. The counts can be made to lie."""
    parts = [
        b"GGUF",
        struct.pack("<IQQ", version, len(tensors) if tensor_count is None else tensor_count, len(metadata) if keys is None else keys),
    ]
    parts += [text(key) + struct.pack("<I", kind) + value(kind, content) for key, kind, content in metadata]
    parts += [tensor_info(*tensor) for tensor in tensors]
    return b"".join(parts)


def padded(head: bytes, alignment: int = ALIGNMENT) -> bytes:
    return head + bytes(-len(head) % alignment)


def with_template(model: Path, target: Path, template: str) -> Path:
    """A copy of a model that can be served, with another chat template: a comment fills it up, so that all tensors stay aligned."""
    data = model.read_bytes()
    key = text("tokenizer.chat_template") + struct.pack("<I", STRING)
    begin, end = data.split(key, 1)
    (length,) = struct.unpack_from("<Q", end)
    room = (length - len(template.encode()) - len("{##}")) % ALIGNMENT
    target.write_bytes(begin + key + text(f"{{#{'.' * room}#}}{template}") + end[8 + length :])
    return target


def tiny_gguf(path: Path, size: int = 4096, *, seed: int = 0, name: str = "Tiny") -> Path:
    """A GGUF of exactly `size` bytes (at least 2048) that passes our checks; the same seed and name give the same bytes.

    It is no model that llama.cpp could run: one tensor of random bytes fills it.
    """
    metadata = [("general.name", STRING, name) if entry[0] == "general.name" else entry for entry in METADATA]
    begin = len(padded(header(metadata, [("blk.0.weight", (1,), I8, 0)])))
    if size < begin + 1:
        raise ValueError(f"a tiny GGUF has at least {begin + 1} bytes")
    head = padded(header(metadata, [("blk.0.weight", (size - begin,), I8, 0)]))
    generator = random.Random(f"{seed}")
    with path.open("wb") as file:
        file.write(head)
        left = size - begin
        while left:
            block = generator.randbytes(min(left, 1 << 20))
            file.write(block)
            left -= len(block)
    return path
