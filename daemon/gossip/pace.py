"""When this node speaks: when something changes, by heartbeat, and when a newcomer shows up.

    change      several changes within 50 ms are one; two announcements are 0.2 s apart at least
    heartbeat   stretched with the number of nodes, so that what a swarm costs each node stays bounded
    newcomer    answered within half a second; in a large swarm by some twenty nodes, chosen by chance

With the default heartbeat a node that falls silent is gone within 40 s in a swarm of up to `STRETCH_AT` nodes.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Literal

Occasion = Literal["change", "newcomer", "heartbeat"]

HEARTBEAT_S = 12.0
COALESCE_S = 0.05
PACE_S = 0.2  # between two announcements at least
ANSWER_S = 0.5  # a newcomer is answered after a random part of this
ANSWERS = 20  # nodes that answer one newcomer, about
STRETCH_AT = 200  # nodes; beyond, the heartbeat grows in proportion
LONGEST_HEARTBEAT_S = 290.0  # three of them are less than an announcement may live
BEATS_LIVED = 3  # heartbeats that an announcement counts, so that two may be lost
TRAVEL_S = 3.0  # and some time to travel


class Pace:
    """`others` is the number of nodes that are known now."""

    def __init__(self, heartbeat_s: float, others: Callable[[], int]) -> None:
        self._heartbeat_s = heartbeat_s
        self._others = others
        self._wanted = asyncio.Event()
        self._newcomer = False
        self._answer: asyncio.TimerHandle | None = None
        self._random = random.Random()

    @property
    def interval_s(self) -> float:
        """Seconds between two announcements when nothing changes."""
        return interval_s(self._heartbeat_s, self._others())

    @property
    def lifetime_s(self) -> float:
        """How long an announcement counts."""
        return lifetime_s(self.interval_s)

    def speak(self) -> None:
        """Something may have changed."""
        self._wanted.set()

    def greet(self) -> None:
        """Somebody has just come near: say that we are there, changed or not."""
        self._newcomer = True
        self._wanted.set()

    def answer(self) -> None:
        """A newcomer wants to hear of us: maybe answer, in a moment."""
        if self._answer is None and self._random.random() * self._others() < ANSWERS:
            delay = self._random.random() * ANSWER_S
            self._answer = asyncio.get_running_loop().call_later(delay, self._answer_now)

    async def wait(self) -> Occasion:
        """Until it is time to speak, and why."""
        try:
            async with asyncio.timeout(self.interval_s):
                await self._wanted.wait()
        except TimeoutError:
            return "heartbeat"
        await asyncio.sleep(COALESCE_S)
        self._wanted.clear()
        newcomer, self._newcomer = self._newcomer, False
        return "newcomer" if newcomer else "change"

    def close(self) -> None:
        if self._answer is not None:
            self._answer.cancel()

    def _answer_now(self) -> None:
        self._answer = None
        self.greet()


def interval_s(heartbeat_s: float, others: int) -> float:
    """The heartbeat among that many other nodes, so that all of them together send a bounded number of beats."""
    return max(heartbeat_s, min(LONGEST_HEARTBEAT_S, heartbeat_s * others / STRETCH_AT))


def lifetime_s(interval_s: float) -> float:
    """How long an announcement counts that is renewed every `interval_s`."""
    return BEATS_LIVED * interval_s + TRAVEL_S
