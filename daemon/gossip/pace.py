"""When this node speaks: when something changes, by heartbeat, and when a newcomer shows up.

    change      several changes within 50 ms are one; two announcements are 0.2 s apart at least
    heartbeat   stretched with the number of nodes, so that what a swarm costs each node stays bounded
    newcomer    answered within half a second; in a large swarm by some twenty nodes, chosen by chance
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

COALESCE_S = 0.05
PACE_S = 0.2  # between two announcements at least
ANSWER_S = 0.5  # a newcomer is answered after a random part of this
ANSWERS = 20  # nodes that answer one newcomer, about
STRETCH_AT = 100  # nodes; beyond, the heartbeat grows in proportion
LONGEST_HEARTBEAT_S = 300.0


class Pace:
    """`others` is the number of nodes that are known now."""

    def __init__(self, heartbeat_s: float, others: Callable[[], int]) -> None:
        self._heartbeat_s = heartbeat_s
        self._others = others
        self._wanted = asyncio.Event()
        self._answer: asyncio.TimerHandle | None = None
        self._random = random.Random()

    @property
    def interval_s(self) -> float:
        """Seconds between two announcements when nothing changes."""
        stretch = max(1.0, self._others() / STRETCH_AT)
        return min(LONGEST_HEARTBEAT_S, self._heartbeat_s * stretch)

    @property
    def lifetime_s(self) -> float:
        """How long an announcement counts: three heartbeats, and some time to travel."""
        return 3 * self.interval_s + 30

    def speak(self) -> None:
        """There is something to say."""
        self._wanted.set()

    def answer(self) -> None:
        """A newcomer wants to hear of us: maybe answer, in a moment."""
        if self._answer is None and self._random.random() * self._others() < ANSWERS:
            delay = self._random.random() * ANSWER_S
            self._answer = asyncio.get_running_loop().call_later(delay, self._answer_now)

    async def wait(self) -> bool:
        """Until it is time to speak: True when something changed, False when it is the heartbeat."""
        try:
            async with asyncio.timeout(self.interval_s):
                await self._wanted.wait()
        except TimeoutError:
            return False
        await asyncio.sleep(COALESCE_S)
        self._wanted.clear()
        return True

    def close(self) -> None:
        if self._answer is not None:
            self._answer.cancel()

    def _answer_now(self) -> None:
        self._answer = None
        self._wanted.set()
