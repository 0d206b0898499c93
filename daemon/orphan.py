"""A child process that cannot outlive its parent, however the parent dies.

`python -I -S orphan.py PARENT CMD...` becomes CMD (Linux: same pid, the kernel kills it when PARENT is gone) or watches it
(elsewhere: CMD runs below a small watcher that polls). A SIGKILLed daemon can tell nobody, so the child must notice by itself.
Run as a file, it needs the standard library only and starts in about 20 ms.

The kernel's promise has two holes, and both are closed here. It is asked for after the fork, so a parent that died before
is never reported: hence the check of the parent's pid afterwards. And it belongs to the *thread* that forked, not to the
process: so the child must be started from a thread that stays (asyncio forks on the thread of the loop).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 0.2


def command(argv: list[str]) -> list[str]:
    """The command line that runs `argv` as a child that dies with this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv]


def die_with_parent(parent: int | None = None) -> None:
    """From now on this process is killed when its parent is gone.

    Call it first thing in the child. Give the pid of the parent where it is known: without it a parent that died before this
    call goes unnoticed here, and the child needs another sign (the end of its standard input).
    """
    if parent is None:
        parent = os.getppid()
    if sys.platform == "linux":
        _ask_kernel()
    else:
        threading.Thread(target=_watch, args=(parent,), name="parent watch", daemon=True).start()
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _ask_kernel() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _run_watched(parent: int, argv: list[str]) -> int:
    """Where the kernel makes no promise: stay between the two, pass a stop on, and kill CMD when `parent` goes."""
    early: list[int] = []
    forward: Callable[[int], object] = early.append  # until there is somebody to pass it on to
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: forward(received))
    child = subprocess.Popen(argv)
    forward = child.send_signal
    for received in early:
        child.send_signal(received)
    while os.getppid() == parent:
        try:
            code = child.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            continue
        return code if code >= 0 else 128 - code
    child.kill()
    child.wait()
    return 128 + signal.SIGKILL


def main(arguments: list[str]) -> int:
    parent, argv = int(arguments[0]), arguments[1:]
    try:
        if sys.platform != "linux":
            return _run_watched(parent, argv)
        die_with_parent(parent)
        os.execv(argv[0], argv)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
