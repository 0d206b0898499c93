"""Asking the home router, by UPnP and NAT-PMP, to forward a TCP port to this node."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import libtorrent as lt

log = logging.getLogger(__name__)


class PortMapping:
    """One TCP port beside libtorrent's own. The session calls `attach`, `renew`, `close`, `on_*`."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.on_change: Callable[[], None] = lambda: None  # a router has agreed, or does no more
        self._session: Any = None
        self._wanted: int | None = None
        self._asked: set[int] = (
            set()
        )  # libtorrent's numbers of our requests
        self._external: dict[Hashable, int] = {}  # by way of asking: UPnP or NAT-PMP

    @property
    def mapped_port(self) -> int | None:
        """The port outside that a router forwards to ours, None where none has agreed (yet)."""
        return next(iter(self._external.values()), None)

    def map_port(self, port: int) -> None:
        """Have TCP `port` forwarded instead of the one before. Does nothing unless `enabled`."""
        if self.enabled and port != self._wanted:
            self._wanted = port
            self.renew()

    def attach(self, session: Any) -> None:
        self._session = session
        self.renew()

    def close(self) -> None:
        """Let go of the session, whose end takes the forwarding back. Idempotent."""
        self._session = None

    def renew(self) -> None:
        """Ask again, because this node has got another address."""
        if self._session is None or self._wanted is None:
            return
        for request in self._asked:
            self._session.delete_port_mapping(request)
        self._external.clear()
        asked = self._session.add_port_mapping(lt.portmap_protocol.tcp, self._wanted, self._wanted)
        self._asked = {int(request) for request in asked}

    def on_mapped(self, request: int, way: Hashable, port: int) -> None:
        if request in self._asked:
            self._external[way] = port
            self.on_change()
            log.info("the router forwards port %d to %d", port, self._wanted)

    def on_failed(self, request: int, way: Hashable, why: str) -> None:
        if request in self._asked:
            if self._external.pop(way, None) is not None:
                self.on_change()
            log.debug("port %d is not forwarded: %s", self._wanted, why)
