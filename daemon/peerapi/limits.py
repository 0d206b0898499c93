"""Ceilings of the peer API, each per source and over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from daemon.errors import Busy


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates are per second and source, times in seconds. A source is an IP address or a libp2p peer."""

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
    """Places that are taken for a while: so many over all sources, so many for one. `what` is named in the refusal."""

    def __init__(self, what: str, total: int, per_source: int) -> None:
        self._what = what
        self._total = total
        self._per_source = per_source
        self._taken: Counter[str] = Counter()

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
        if self._taken.total() >= self._total or self._taken[source] >= self._per_source:
            return False
        self._taken[source] += 1
        return True

    def leave(self, source: str) -> None:
        self._taken[source] -= 1
        if not self._taken[source]:
            del self._taken[source]
