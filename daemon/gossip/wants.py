"""Getting the pages that are missing: somebody's beat named them, and they have not come.

    first     the node itself is asked, over whatever way leads to it
    second    somebody else who may have met it
    third     everybody who listens to pubsub hears the question, and the node says the pages again when it speaks next

Then the same again, with pauses that double; a node that rests (peerapi/rests.py) is not asked itself. A moment passes before the first
question, because pages follow each other; it is longer in a large swarm, where many ask at once. A node that names pages and never
gives them costs one question a minute.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from daemon.errors import SwarmError
from daemon.gossip.meeting import Meeting
from daemon.gossip.peers import PeerTable
from registry.records import Peer

_log = logging.getLogger(__name__)

FIRST_S = 0.3  # before the first question; the second half of it by chance
SPREAD_S = 0.002  # more of it by chance, for each node that is known
PAUSE_S = 1.0  # after the first question; doubles
LONGEST_PAUSE_S = 60.0
AT_ONCE = 4  # nodes that are asked at the same time


@dataclass(slots=True)
class _Want:
    """`due` in monotonic seconds."""

    due: float
    asked: int = 0


class Wants:
    """`helpers` are nodes that may know others; `ask_everybody` puts a question to pubsub: the pages wanted, by node."""

    def __init__(
        self,
        table: PeerTable,
        meeting: Meeting,
        *,
        helpers: Callable[[], Sequence[Peer]],
        ask_everybody: Callable[[Mapping[str, Sequence[int]]], Awaitable[None]],
    ) -> None:
        self._table = table
        self._meeting = meeting
        self._helpers = helpers
        self._ask_everybody = ask_everybody
        self._wants: dict[str, _Want] = {}
        self._noted = asyncio.Event()
        self._random = random.Random()

    def note(self) -> None:
        """A page is missing."""
        self._noted.set()

    async def run_forever(self) -> None:
        while True:
            self._noted.clear()
            due, pause = self._due(time.monotonic())
            if due:
                await asyncio.gather(*(self._ask(node) for node in due))
                continue
            try:
                async with asyncio.timeout(pause):
                    await self._noted.wait()
            except TimeoutError:
                continue

    def _due(self, now: float) -> tuple[list[str], float | None]:
        """The nodes to ask about now, and else for how long there is nothing to do (None: until a page is missing)."""
        behind = self._table.behind()
        for node in self._wants.keys() - behind.keys():
            del self._wants[node]
        spread = FIRST_S / 2 + SPREAD_S * self._table.count()
        for node in behind.keys() - self._wants.keys():
            self._wants[node] = _Want(now + FIRST_S / 2 + self._random.random() * spread)
        # Who has not been asked about comes first: many that never give anything do not hold up the others.
        waiting = sorted(self._wants, key=lambda node: (self._wants[node].asked, self._wants[node].due))
        due = [node for node in waiting if self._wants[node].due <= now]
        pause = min((want.due for want in self._wants.values()), default=None)
        return due[:AT_ONCE], None if pause is None else pause - now

    async def _ask(self, node: str) -> None:
        want = self._wants[node]
        turn, want.asked = want.asked % 3, want.asked + 1
        pause = min(LONGEST_PAUSE_S, PAUSE_S * 2.0 ** min(want.asked - 1, 16))
        want.due = time.monotonic() + pause * (0.75 + self._random.random() / 2)
        try:
            if turn == 2:
                await self._ask_everybody({node: self._table.behind().get(node, ())})
            else:
                rests = self._meeting.rests.resting(node)
                await self._ask_one(node, itself=turn == 0 and not rests)
        except SwarmError as error:
            _log.debug("asking for pages of %s: %s", node[:16], error)

    async def _ask_one(self, node: str, *, itself: bool) -> None:
        if itself:
            asked = self._table.peer(node)
        else:
            helpers = [peer for peer in self._helpers() if peer.node != node]
            asked = self._random.choice(helpers) if helpers else None
        if asked is not None:
            await self._meeting.ask(asked, node)
