"""How much memory a model needs, and how much is left."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from daemon.engine import blas
from daemon.engine.gguf import GgufHeader
from daemon.engine.protocol import GUESSES, TEXTS

# What a worker has beside the model: Python, llama.cpp, and the texts of a vocabulary.
_PROCESS: Final = 100 << 20
_BLAS_ROWS: Final = 32  # fewer are multiplied without unpacking
_CGROUP: Final = Path("/sys/fs/cgroup")


def estimate_memory(header: GgufHeader, context: int, slots: int, batch: int) -> int:
    """Bytes that a worker needs for `context` tokens of KV cache (f16), `slots` answers and `batch` tokens in one decode.

    Weights, the process itself, and the context that answers. Sliding windows count in full, because the worker keeps them in full.
    """
    outputs = slots + GUESSES
    needed = header.tensor_bytes + _PROCESS + (_unpacked(header, outputs) if blas.reads(header) else 0)
    return needed + _context_bytes(header, context, max(batch, outputs), 2 * outputs)


def estimate_embedding(header: GgufHeader, slots: int, batch: int) -> int:
    """Bytes more once the worker embeds: a second context of one batch of KV cache, with the logits of every token in it, twice."""
    batch = max(batch, slots + GUESSES)
    return _context_bytes(header, batch, batch, 2 * batch + TEXTS)


def _context_bytes(header: GgufHeader, cells: int, batch: int, logits: int) -> int:
    """KV cache, activations (f32), attention mask (f16), and rows of logits (f32)."""
    embedding = header.integer("embedding_length")
    widest = max([embedding, *header.per_layer("feed_forward_length", 0)])
    cells = -(-cells // 256) * 256
    return cells * _kv_bytes(header) + batch * (4 * (4 * embedding + 2 * widest) + 2 * cells) + 4 * logits * header.vocabulary


def _unpacked(header: GgufHeader, logits: int) -> int:
    """The largest matrix as OpenBLAS wants it (f32); that of the output only when so many rows have logits."""
    rows = [*header.per_layer("feed_forward_length", 0), header.vocabulary if logits >= _BLAS_ROWS else 0]
    return 4 * header.integer("embedding_length") * max(rows)


def _kv_bytes(header: GgufHeader) -> int:
    """Of one token, over all layers."""
    heads = header.per_layer("attention.head_count", 1)
    kv_heads = header.per_layer("attention.head_count_kv", 0)
    if f"{header.facts.architecture}.attention.head_count_kv" not in header.values:
        kv_heads = heads
    head_size = header.integer("embedding_length") // max(heads[0], 1) if heads else 0
    per_head = header.integer("attention.key_length", head_size) + header.integer("attention.value_length", head_size)
    return 2 * sum(kv_heads) * per_head


def free_memory() -> int:
    """Bytes that a new process could use: what the kernel calls available, or less where a container has less.

    Where the kernel does not tell (macOS), all memory there is: a limit that catches only the impossible.
    """
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return min(int(found[1]) * 1024, _container_memory())
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_memory() -> int:
    """What a cgroup (version 2) leaves; file pages that can be dropped count as free."""
    unlimited = 1 << 62
    try:
        ceiling = (_CGROUP / "memory.max").read_text().strip()
        if ceiling == "max":
            return unlimited
        used = int((_CGROUP / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
        return max(int(ceiling) - used + (int(cached[1]) if cached else 0), 0)
    except (OSError, ValueError):
        return unlimited


def held_by(pid: int) -> int:
    """Bytes that a process has for itself alone: not those that it maps from files. 0 where the kernel does not tell."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0  # not Linux, or it has just ended
    return int(found[1]) * 1024 if found else 0
