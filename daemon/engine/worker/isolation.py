"""What a worker may not do: dump core, open many files, reach the network, or let a chat template run away with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Final

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_OPEN_FILES: Final = 256


class TimedOut(BaseException):
    """The time of `limited` is over. No `Exception`, so that nobody on the way takes it for an error of his own."""


def limit_process() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))


def leave_network() -> bool:
    """Move into a network namespace without any interface. False where the platform does not let us (the caller reports it).

    Must come before any thread starts: the kernel gives a new user namespace to single-threaded processes only.
    """
    if sys.platform != "linux":
        return False
    uid, gid = os.getuid(), os.getgid()
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    if unshare(_CLONE_NEWNET) == 0:
        return True
    if unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    # Without the maps the process would be nobody; the maps may be refused, and then it is.
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


@contextlib.contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Run a stranger's program: `TimedOut` after `seconds`, `MemoryError` after `memory` more bytes (Linux), main thread only.

    Code that holds on to the interpreter without looking at signals is ended with the process (SIGVTALRM) after three
    times as much CPU time.
    """
    armed = True

    def expired(_signal: int, _frame: FrameType | None) -> None:
        if armed:
            raise TimedOut

    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, expired)
    if (used := _address_space()) is not None:
        ceilings = [one for one in before if one != resource.RLIM_INFINITY]  # whoever started the daemon may have set some
        resource.setrlimit(resource.RLIMIT_AS, (min([used + memory, *ceilings]), before[1]))
    # Again and again: Jinja takes any exception of a constant expression for "not constant".
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    signal.setitimer(signal.ITIMER_VIRTUAL, 3 * seconds)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def _address_space() -> int | None:
    """Bytes of address space in use; None where /proc does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
