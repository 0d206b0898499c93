"""A command on a terminal of its own, as a person has it: what is typed goes through the line discipline, Ctrl-C is a signal."""

from __future__ import annotations

import codecs
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

DEADLINE_S = 60.0
RETRY_S = 5.0
CTRL_C, CTRL_D, ENTER, UP = "\x03", "\x04", "\r", "\x1b[A"

# Ctrl-C only works on the terminal that controls the process.
_CONTROLLED = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """`shown` is everything that came so far, as text with its control characters."""

    def __init__(self, mine: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.shown = ""
        self._mine = mine
        self._seen = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def type(self, text: str) -> None:
        os.write(self._mine, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at a prompt. Python misses one that comes between a key and its waiting for the next, as a person's never does."""
        while True:
            self.type(CTRL_C)
            end, shown = time.monotonic() + RETRY_S, len(self.shown)
            while time.monotonic() < end:
                assert self._read(), "it ended at Ctrl-C"
                if "\n" in self.shown[shown:]:
                    return

    def expect(self, text: str) -> str:
        """What came up to and with `text`, which must come after what was expected before."""
        end = time.monotonic() + DEADLINE_S
        while text not in self.shown[self._seen :]:
            assert time.monotonic() < end, f"{text!r} did not come: {self.shown[self._seen :]!r}"
            assert self._read(), f"it ended without {text!r}: {self.shown[self._seen :]!r}"
        begin, self._seen = self._seen, self.shown.index(text, self._seen) + len(text)
        return self.shown[begin : self._seen]

    def ended(self) -> int:
        """The exit code, once everything was read."""
        end = time.monotonic() + DEADLINE_S
        while self._read():
            assert time.monotonic() < end, f"it did not end: {self.shown[self._seen :]!r}"
        return self.process.wait(DEADLINE_S)

    def _read(self) -> bool:
        """False at the end."""
        if not select.select([self._mine], [], [], 1)[0]:
            return True
        try:
            piece = os.read(self._mine, 65536)
        except OSError:  # Linux says EIO when the last writer is gone
            return False
        self.shown += self._decoder.decode(piece)
        return bool(piece)


@contextmanager
def terminal(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Terminal]:
    """A command that runs until the context ends."""
    mine, theirs = pty.openpty()
    # INPUTRC: the readline settings of whoever runs the tests must not matter.
    settings = {**environment, "TERM": "xterm", "INPUTRC": os.devnull}
    process = subprocess.Popen(
        [sys.executable, "-c", _CONTROLLED, *command], env=settings, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        yield Terminal(mine, process)
    finally:
        os.close(mine)  # hangs up
        process.kill()
        process.wait()
