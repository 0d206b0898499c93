"""OpenBLAS inside llama.cpp, where set-up built it in (docs/decisions/0005): which models are read with it, and how it is told to work."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from daemon.engine.gguf import GgufHeader

# Q4_1 and Q5_1: llama.cpp unpacks their weights again for every token of a prompt. With its own kernels for the other formats it
# reads prompts as fast as OpenBLAS does, and short ones up to three times as fast.
_SLOW_ALONE: Final = frozenset({3, 7})


def reads(header: GgufHeader) -> bool:
    """Whether prompts of this model are read faster with OpenBLAS."""
    slow = sum(count for kind, count in header.elements.items() if kind in _SLOW_ALONE)
    return 2 * slow > sum(header.elements.values())


def environment() -> dict[str, str]:
    """How OpenBLAS works inside llama.cpp: it looks at these once, when it is loaded."""
    # Its threads would spin for 2**26 cycles after every product, beside those of llama.cpp that go on with the result.
    settings = {"OPENBLAS_THREAD_TIMEOUT": "12"}
    with contextlib.suppress(OSError):  # not Linux
        processor = Path("/proc/cpuinfo").read_text()
        # It takes AMD's processors with AVX-512 for older ones, and is half as fast on them.
        if "AuthenticAMD" in processor and "avx512vl" in processor:
            settings["OPENBLAS_CORETYPE"] = "SkylakeX"
    return settings
