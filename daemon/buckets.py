"""How much one source may send: a bounded table of token buckets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

SOURCES_LIMIT = 4096


class Buckets:
    """`rate` takings per second and source, `burst` at once. `clock` is monotonic seconds.

    When there are more sources than the table holds, the one not heard for longest starts afresh.
    """

    def __init__(self, *, rate: float, burst: float, clock: Callable[[], float], limit: int = SOURCES_LIMIT) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._limit = limit
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, source: str, cost: float = 1.0) -> bool:
        """Whether `source` may go on; False costs nothing."""
        left, now = self._filled(source)
        allowed = left >= cost
        self._keep(source, left - cost if allowed else left, now)
        return allowed

    def owe(self, source: str, cost: float) -> float:
        """Take `cost` in any case; gives the seconds until `source` has paid for it, 0 when it had enough."""
        left, now = self._filled(source)
        self._keep(source, left - cost, now)
        return max(0.0, (cost - left) / self._rate)

    def _filled(self, source: str) -> tuple[float, float]:
        now = self._clock()
        left, then = self._left.pop(source, (self._burst, now))
        return min(self._burst, left + (now - then) * self._rate), now

    def _keep(self, source: str, left: float, now: float) -> None:
        self._left[source] = (left, now)
        if len(self._left) > self._limit:
            self._left.popitem(last=False)
