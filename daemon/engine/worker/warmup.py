"""The first decodes of a model: whether this build of llama.cpp works here at all, and how fast which way is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from daemon.engine.worker.llama import Llama

_PROMPT: Final = 32  # tokens; a batch and single tokens take different kernels, and both must work
_TIMED: Final = 4  # single tokens
_ROWS: Final = 5
_WORTH: Final = 1.5  # by how much more threads must be faster: a core that is left alone serves everybody else


@dataclass(frozen=True, slots=True)
class Measured:
    tokens_per_second: float = 0.0  # of one answer at a small context; 0 for a model that does not write
    row_cost: float = 1.0  # see daemon/engine/worker/lookup.py: `price`


def warm_up(llama: Llama, threads: int) -> Measured:
    """Dies here, where the daemon can tell why, when llama.cpp was built for another machine."""
    token = llama.first_token() or 0
    if not llama.writes:
        llama.embed([[token] * min(_PROMPT, llama.longest_text)])
        return Measured()
    at = 0

    def timed(count: int, outputs: int) -> float:
        nonlocal at
        start = time.perf_counter()
        llama.decode([(token, at + i, 0, i >= count - outputs) for i in range(count)])
        llama.logits(count - 1)  # waits for a GPU too
        at += count
        return time.perf_counter() - start

    timed(_PROMPT, 1)
    # One token at a time reads all weights for little work: one thread may do that as fast as many, who wait for each other,
    # and leaves the other cores to whoever wants them. Where they are wanted, many threads are up to four times slower.
    best = 0.0
    alone = threads
    while True:
        llama.forget(0, 0)
        at = 0
        llama.set_threads(threads, alone)
        timed(1, 1)  # the first one makes or ends threads
        taken = min(timed(1, 1) for _ in range(2))
        if best and taken > _WORTH * best:
            alone *= 2
            llama.set_threads(threads, alone)
            timed(1, 1)
            break
        best = taken
        if alone == 1:
            break
        alone //= 2
    one = [timed(1, 1) for _ in range(_TIMED)]
    several = min(timed(_ROWS, _ROWS) for _ in range(2))
    llama.forget(0, 0)
    return Measured(_TIMED / sum(one), max(0.01, (several / min(one) - 1) / (_ROWS - 1)))
