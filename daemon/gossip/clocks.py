"""Whether our clock is off, from how the words of others are dated.

- What counts is each node's last word, once, in a window of `WINDOW_S`: nobody gains by saying something often.
- Only words whose signature holds come here (registry/announcement.py).
- An old word of a node that is alive was recorded by somebody and said again: it says nothing.
- Ours is called off when `SUSPECT` nodes at least, and more of them than not, have another time.

Whoever makes up many keys can still have the majority: it is a reason to look at the clock, and nothing depends on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from registry.errors import Misdated

WINDOW_S = 15 * 60.0
SUSPECT = 3  # nodes
NODES_KEPT = 256  # the last that spoke


class Clocks:
    """`alive` says whether a node announced itself with a good time; `clock` gives monotonic seconds."""

    def __init__(self, alive: Callable[[str], bool], clock: Callable[[], float]) -> None:
        self._alive = alive
        self._clock = clock
        # By node, the last that spoke at the end: when, and whether its time was wrong.
        self._last: OrderedDict[str, tuple[float, bool]] = OrderedDict()

    @property
    def ours_is_off(self) -> bool:
        since = self._clock() - WINDOW_S
        wrong = [is_wrong for when, is_wrong in self._last.values() if when >= since]
        return sum(wrong) >= max(SUSPECT, len(wrong) // 2 + 1)

    def dated_right(self, node: str) -> None:
        self._note(node, wrong=False)

    def dated_wrong(self, error: Misdated) -> None:
        if error.long_ago and self._alive(error.node):
            return
        self._note(error.node, wrong=True)

    def _note(self, node: str, *, wrong: bool) -> None:
        self._last[node] = (self._clock(), wrong)
        self._last.move_to_end(node)
        if len(self._last) > NODES_KEPT:
            self._last.popitem(last=False)
