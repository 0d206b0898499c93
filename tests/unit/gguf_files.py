"""A small GGUF writer for tests: valid files of any size, and invalid ones byte by byte."""

from __future__ import annotations

import math
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


BERT_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁cat", "▁kitten", "▁sofa", "▁rate", "▁rose", "▁the")


def bert_gguf(path: Path, *, context: int = 64) -> Path:
    """A tiny BERT with random weights that llama.cpp runs: it embeds `BERT_WORDS`, whose rows are random too, and never writes."""
    width, wide = 32, 64
    metadata: list[Entry] = [
        ("general.architecture", STRING, "bert"),
        ("general.name", STRING, "Tiny BERT"),
        ("bert.context_length", U32, context),
        ("bert.embedding_length", U32, width),
        ("bert.feed_forward_length", U32, wide),
        ("bert.block_count", U32, 1),
        ("bert.attention.head_count", U32, 4),
        ("bert.attention.layer_norm_epsilon", F32, 1e-12),
        ("bert.attention.causal", BOOL, False),
        ("bert.pooling_type", U32, 1),
        ("tokenizer.ggml.model", STRING, "bert"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, list(BERT_WORDS))),
        ("tokenizer.ggml.token_type", ARRAY, (I32, [3, 2, 3, 3, *[1] * (len(BERT_WORDS) - 4)])),
        ("tokenizer.ggml.token_type_count", U32, 2),
        *((f"tokenizer.ggml.{name}_token_id", U32, at) for at, name in enumerate(("padding", "unknown", "bos", "seperator"))),
    ]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (width, len(BERT_WORDS)),
        "position_embd.weight": (width, context),
        "token_types.weight": (width, 2),
        **{f"blk.0.attn_{part}.weight": (width, width) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_up.weight": (width, wide),
        "blk.0.ffn_down.weight": (wide, width),
        **{
            f"{norm}.{part}": (width,)
            for norm in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm")
            for part in ("weight", "bias")
        },
    }
    tensors: list[Tensor] = []
    data = b""
    generator = random.Random("bert")
    for name, shape in shapes.items():
        tensors.append((name, shape, 0, len(data)))
        data += struct.pack(
            f"<{math.prod(shape)}f", *(generator.gauss(1.0 if "norm.w" in name else 0.0, 0.3) for _ in range(math.prod(shape)))
        )
        data += bytes(-len(data) % ALIGNMENT)
    path.write_bytes(padded(header(metadata, tensors)) + data)
    return path
