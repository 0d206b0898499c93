"""Nodes that could not be reached are left alone for a while: the address that they announce may be somebody else's.

    reached            it is told and asked as ever
    not reached        it rests for `FIRST_S`, twice as long after each further failure, up to `LONGEST_S`
    it comes to us     or is met at another address: the rest is over

That it is heard of through others ends no rest: a key that announces the address of a stranger would only have to go on speaking
for every node to go on calling there. So each node calls there once, and then less and less.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

FIRST_S = 5.0
LONGEST_S = 30 * 60.0
NODES_KEPT = 4096  # as many as the table of peers has


@dataclass(frozen=True, slots=True)
class _Rest:
    """`until` in monotonic seconds."""

    until: float
    pause_s: float


class Rests:
    """`clock` gives monotonic seconds. A rest is longer or shorter by chance, by up to `spread` of it: so that not all who lost the
    same node come to it at once.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        first_s: float = FIRST_S,
        longest_s: float = LONGEST_S,
        spread: float = 0.0,
    ) -> None:
        self._clock = clock
        self._first_s = first_s
        self._longest_s = longest_s
        self._spread = spread
        self._rests: dict[str, _Rest] = {}  # by node, the last that failed at the end

    def resting(self, node: str) -> bool:
        rest = self._rests.get(node)
        return rest is not None and self._clock() < rest.until

    def end(self, node: str) -> None:
        """The node itself was reached, or came to us."""
        self._rests.pop(node, None)

    def begin(self, node: str) -> None:
        """It could not be reached."""
        before = self._rests.pop(node, None)
        pause_s = self._first_s if before is None else min(2 * before.pause_s, self._longest_s)
        chance = random.uniform(1 - self._spread, 1 + self._spread)
        self._rests[node] = _Rest(self._clock() + pause_s * chance, pause_s)
        if len(self._rests) > NODES_KEPT:
            del self._rests[next(iter(self._rests))]

    def keep_only(self, nodes: Container[str]) -> None:
        """Forget how often all others have failed."""
        self._rests = {node: rest for node, rest in self._rests.items() if node in nodes}

    def next_end_s(self) -> float | None:
        """In how many seconds the next rest is over; None when nobody rests."""
        now = self._clock()
        return min((rest.until - now for rest in self._rests.values() if rest.until > now), default=None)

    @contextmanager
    def trying(self, node: str) -> Iterator[None]:
        """What is done with the node meanwhile says whether it can be reached; any error means that it cannot."""
        try:
            yield
        except Exception:
            self.begin(node)
            raise
        self.end(node)
