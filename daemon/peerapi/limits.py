"""Ceilings of the peer API, each per source and over all of them.

A source is an IP address (a public IPv6 address counts as its /64), a libp2p peer, or a relay of ours (`relay:NODE`). Anybody makes
as many libp2p peer ids as they like, so that all who come over libp2p together have at most half of what there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from daemon.buckets import counted_as
from daemon.errors import Busy


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates are per second and source, times in seconds.

    Of the connections, relayed streams may take three of five (see daemon/relaying/limits.py).
    """

    connections: int = 512  # at the same time, over all sources
    connections_per_source: int = 64
    header_s: float = 10.0  # to send a request's header, and between two requests
    body_s: float = 10.0  # to send a request's body
    chats: int = 64  # at the same time, over all sources
    chats_per_source: int = 8
    announce_rate: float = 20.0
    announce_burst: float = 100.0
    envelopes_rate: float = 50.0
    envelopes_burst: float = 1000.0
    objects: int = 32  # being sent at the same time, over all sources
    objects_per_source: int = 8
    idle_s: float = 30.0  # for somebody to take a piece of what is sent
    object_rate: float = 20.0
    object_burst: float = 200.0


class Places:
    """Places that are taken for a while: so many over all sources, so many for one, half of all for all libp2p peers together.

    `what` is named in the refusal.
    """

    def __init__(self, what: str, total: int, per_source: int) -> None:
        self._what = what
        self._total = total
        self._per_source = per_source
        self._taken: Counter[str] = Counter()
        self._libp2p_total = max(1, total // 2)
        self._libp2p = 0

    @property
    def taken(self) -> int:
        return self._taken.total()

    @contextmanager
    def take(self, source: str) -> Iterator[None]:
        """One place for `source`. Raises `Busy` when there is none."""
        if not self.enter(source):
            raise Busy(self._what, "this node answers as many as it takes", "ask another node")
        try:
            yield
        finally:
            self.leave(source)

    def enter(self, source: str) -> bool:
        """Take a place, to be given back by `leave`; False when there is none."""
        one = counted_as(source)
        if self._taken.total() >= self._total or self._taken[one] >= self._per_source:
            return False
        if _is_libp2p(source):
            if self._libp2p >= self._libp2p_total:
                return False
            self._libp2p += 1
        self._taken[one] += 1
        return True

    def leave(self, source: str) -> None:
        one = counted_as(source)
        self._libp2p -= _is_libp2p(source)
        self._taken[one] -= 1
        if not self._taken[one]:
            del self._taken[one]


def _is_libp2p(source: str) -> bool:
    """Whether it is a peer id: base58 has nothing but letters and digits, which no other source has."""
    return source.isalnum()
