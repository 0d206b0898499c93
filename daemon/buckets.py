"""How much one source may send: a bounded table of token buckets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address

SOURCES_LIMIT = 4096
_NETWORK_BITS = 64  # of an IPv6 address; whoever has one address has all with the same beginning (RFC 4291, 2.5.4)


def counted_as(source: str) -> str:
    """The source that `source` counts as where a source has a share: itself, or for a public IPv6 address its /64."""
    if ":" not in source:
        return source
    try:
        address = IPv6Address(source)
    except ValueError:
        return source
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    if not address.is_global:
        return source  # all of a LAN share their beginning
    host_bits = 128 - _NETWORK_BITS
    return f"{IPv6Address(int(address) >> host_bits << host_bits)}/{_NETWORK_BITS}"


class Buckets:
    """`rate` takings per second and source (see `counted_as`), `burst` at once. `clock` is monotonic seconds.

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
        source = counted_as(source)
        left, now = self._filled(source)
        allowed = left >= cost
        self._keep(source, left - cost if allowed else left, now)
        return allowed

    def owe(self, source: str, cost: float) -> float:
        """Take `cost` in any case; gives the seconds until `source` has paid for it, 0 when it had enough."""
        source = counted_as(source)
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
