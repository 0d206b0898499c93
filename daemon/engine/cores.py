"""Cores: which of them this process may use, and how many of those the rest of the machine leaves to its workers."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Columns of /proc/stat (proc(5)): user, nice, system and two kinds of interrupts. What a hypervisor steals is not used by anybody here.
_BUSY: Final = (0, 1, 2, 5, 6)
_NOW_AND_THEN: Final = 0.3  # of a core: who wants less than this can share it


@dataclass(frozen=True, slots=True)
class Reading:
    """Seconds: by the monotonic clock, of work on all usable cores, and of work of our workers."""

    pids: tuple[int, ...]  # of our workers
    at: float
    busy: float
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
    busy = sum(int(column[kind]) for column in columns for kind in _BUSY)
    return Reading(tuple(pids), time.monotonic(), busy / tick, sum(map(_used, pids)) / tick)


def left(before: Reading, after: Reading, cores: int) -> int:
    """How many of `cores` nobody but our workers wanted between two readings, at least one."""
    others = (after.busy - before.busy - (after.own - before.own)) / (after.at - before.at)
    return min(cores, max(1, int(cores - others + _NOW_AND_THEN)))


def _used(pid: int) -> int:
    """Ticks of all threads of a process; 0 when it has just ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])
