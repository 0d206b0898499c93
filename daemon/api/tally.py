"""What an operator wants to know of the answers: how many wait, come, ended and how, and their tokens; how late the loop wakes.

Nothing here grows with the number of models, peers or clients.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Iterator
from typing import Final

from aiohttp import web

from daemon.engine.interface import Usage
from daemon.errors import Busy, CallerError

_STEP_S: Final = 0.1  # between two looks at the loop
_WINDOW_S: Final = 60.0

OUTCOMES: Final = ("done", "refused", "failed", "cancelled")


class Tally:
    """Counts since the start of what was asked over this API. `refused`: the question was wrong or there was no room for it."""

    def __init__(self) -> None:
        self.waiting = 0  # for the first piece of their answer
        self.running = 0
        self.ended: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.tokens: Counter[str] = Counter({"prompt": 0, "cached": 0, "completion": 0})

    @contextlib.contextmanager
    def answer(self) -> Iterator[Counted]:
        """One answer, from the question to its end."""
        counted = Counted(self)
        self.waiting += 1
        outcome = "failed"
        try:
            yield counted
            outcome = "done"
        except (CallerError, Busy):
            outcome = "refused"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            if counted.begun:
                self.running -= 1
            else:
                self.waiting -= 1
            self.ended[outcome] += 1


class Counted:
    """One answer of a tally."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.begun = False

    def begin(self) -> None:
        if not self.begun:
            self.begun = True
            self._tally.waiting -= 1
            self._tally.running += 1

    def used(self, usage: Usage) -> None:
        self._tally.tokens.update(prompt=usage.prompt_tokens, cached=usage.cached_tokens, completion=usage.completion_tokens)


class LoopDelay:
    """How late the event loop wakes who sleeps, over the last minute."""

    def __init__(self) -> None:
        self._late: deque[float] = deque(maxlen=round(_WINDOW_S / _STEP_S))

    def p99(self) -> float:
        """Seconds; 0 before the first look."""
        late = sorted(self._late)
        return late[int(len(late) * 0.99)] if late else 0.0

    async def watch(self) -> None:
        """Without end."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _STEP_S
            await asyncio.sleep(_STEP_S)
            self._late.append(max(0.0, loop.time() - due))


TALLY = web.AppKey("tally", Tally)
DELAY = web.AppKey("delay", LoopDelay)
