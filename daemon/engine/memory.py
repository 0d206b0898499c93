"""How much memory is left for models."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_CGROUP: Final = Path("/sys/fs/cgroup")


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


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
