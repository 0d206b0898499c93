"""Cores: which of them this process may use, and how many of those the rest of the machine leaves to its workers."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_IDLE: Final = (3, 4, 7)  # columns of /proc/stat (proc(5)): idle, waiting for a disk, and stolen, which no thread of ours could change
_ENOUGH: Final = 0.7  # of a core: what is left of it by those who want it now and then


@dataclass(frozen=True, slots=True)
class Reading:
    """Seconds: by the monotonic clock, on all usable cores with nobody running, and with our workers running."""

    pids: tuple[int, ...]  # of our workers
    at: float
    idle: float
    own: float


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read(pids: Sequence[int]) -> Reading | None:
    """How it is now; None where the kernel does not tell (macOS)."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        tick = os.sysconf("SC_CLK_TCK")
        usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    columns = [line.split()[1:] for line in lines if line.partition(" ")[0] in usable]
    idle = sum(int(column[kind]) for column in columns for kind in _IDLE)
    return Reading(tuple(pids), time.monotonic(), idle / tick, sum(map(_used, pids)) / tick)


def left(before: Reading, after: Reading) -> int:
    """Cores that nobody but our workers wanted between two readings, at least one."""
    free = (after.idle - before.idle + after.own - before.own) / (after.at - before.at)
    return max(1, int(free + 1 - _ENOUGH))


def _used(pid: int) -> int:
    """Ticks of all threads of a process; 0 when it has just ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])
