"""One connection to the peer API: counted, and known by its source, before a byte of HTTP is read.

A connection comes straight to the port of the peer API, and its source is its IP address; or it comes to a second port, on
loopback, through Kubo (a libp2p stream) or through a relay, and its first line says whose it is. Any process of this machine
could write that line: it decides about ceilings, never about trust.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast
from weakref import WeakKeyDictionary

from daemon.peerapi.limits import Limits, Places

_LINE_LIMIT = 256  # bytes of the first line of a stream


class Connections:
    """Counts connections and knows their sources. `allowed` says which IP addresses may come, `on_direct` is told of each."""

    def __init__(
        self, limits: Limits, allowed: Callable[[str], bool], on_direct: Callable[[str], None]
    ) -> None:
        self._places = Places("connection", limits.connections, limits.connections_per_source)
        self._header_s = limits.header_s
        self._allowed = allowed
        self.on_direct = on_direct
        self._sources: WeakKeyDictionary[asyncio.BaseTransport, str] = WeakKeyDictionary()

    def source(self, transport: asyncio.BaseTransport | None) -> str:
        """Who is at the other end: an IP address, a libp2p peer id or `relay:NODE`; empty when the connection is gone."""
        return "" if transport is None else self._sources.get(transport, "")

    def direct(self, http: Callable[[], asyncio.BaseProtocol]) -> asyncio.Protocol:
        """The protocol of a connection to the port of the peer API."""
        return _Direct(self, http)

    def stream(self, http: Callable[[], asyncio.BaseProtocol]) -> asyncio.Protocol:
        """The protocol of a connection whose first line says whose it is."""
        return _Stream(self, http, self._header_s)

    def admit(self, transport: asyncio.Transport, source: str) -> bool:
        """Count a connection of `source`; False when it must be closed."""
        if not self._places.enter(source):
            return False
        self._sources[transport] = source
        return True

    def permits(self, address: str) -> bool:
        return self._allowed(address)

    def gone(self, transport: asyncio.Transport | None) -> None:
        source = None if transport is None else self._sources.pop(transport, None)
        if source is not None:
            self._places.leave(source)


class _Connection(asyncio.Protocol):
    """Hands everything to the HTTP protocol once the connection is admitted."""

    def __init__(self, connections: Connections, http: Callable[[], asyncio.BaseProtocol]) -> None:
        self._connections = connections
        self._make = http
        self._http: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def begin(self, source: str) -> bool:
        """Whether the connection was admitted; if not, it is closed."""
        assert self._transport is not None
        if not self._connections.admit(self._transport, source):
            self._transport.abort()
            return False
        self._http = cast(asyncio.Protocol, self._make())
        self._http.connection_made(self._transport)
        return True

    def data_received(self, data: bytes) -> None:
        if self._http is not None:
            self._http.data_received(data)

    def eof_received(self) -> bool | None:
        return self._http.eof_received() if self._http is not None else None

    def pause_writing(self) -> None:
        if self._http is not None:
            self._http.pause_writing()

    def resume_writing(self) -> None:
        if self._http is not None:
            self._http.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.gone(self._transport)
        if self._http is not None:
            self._http.connection_lost(error)


class _Direct(_Connection):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        name = transport.get_extra_info("peername")
        address = str(name[0]) if name else ""
        if self._connections.permits(address):
            self._connections.on_direct(address)
            self.begin(address)
        else:
            cast(asyncio.Transport, transport).abort()


class _Stream(_Connection):
    def __init__(
        self, connections: Connections, http: Callable[[], asyncio.BaseProtocol], header_s: float
    ) -> None:
        super().__init__(connections, http)
        self._header_s = header_s
        self._head = bytearray()
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        abort = cast(asyncio.Transport, transport).abort
        self._deadline = asyncio.get_running_loop().call_later(self._header_s, abort)

    def data_received(self, data: bytes) -> None:
        if self._http is not None:
            self._http.data_received(data)
            return
        self._head += data
        line, end, rest = bytes(self._head).partition(b"\n")
        if not end and len(line) <= _LINE_LIMIT:
            return
        source = line.decode("ascii", "replace")
        if not end or len(line) > _LINE_LIMIT or not source.isprintable():
            assert self._transport is not None
            self._transport.abort()
            return
        self._end_waiting()
        if self.begin(source) and rest:
            super().data_received(rest)

    def connection_lost(self, error: Exception | None) -> None:
        self._end_waiting()
        super().connection_lost(error)

    def _end_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
