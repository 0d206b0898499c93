"""Nodes that could not be reached are left alone for a while: the address that they announce may be somebody else's.

    reached            it is told and asked as ever
    not reached        it rests for `FIRST_S`, twice as long after each further failure, up to `LONGEST_S`
    it comes to us     or is met at another address: the rest is over

That it is heard of through others ends no rest: a key that announces the address of a stranger would only have to go on speaking
for every node to go on calling there. So each node calls there once, and then less and less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """`clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
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
        pause_s = FIRST_S if before is None else min(2 * before.pause_s, LONGEST_S)
        self._rests[node] = _Rest(self._clock() + pause_s, pause_s)
        if len(self._rests) > NODES_KEPT:
            del self._rests[next(iter(self._rests))]

    @contextmanager
    def trying(self, node: str) -> Iterator[None]:
        """What is done with the node meanwhile says whether it can be reached; any error means that it cannot."""
        try:
            yield
        except Exception:
            self.begin(node)
            raise
        self.end(node)
