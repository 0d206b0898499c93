"""Holds libp2p back from its relays until the rest of Kubo is there.

With static relays, connecting to them is the first deed of libp2p. Kubo's Bitswap, which starts a moment
later, never hears of a connection that is older than itself (boxo bitswap/network/bsnet `Start`), so that
nothing could be fetched from the very nodes that a home knows best; and ending such a connection costs
the reservation for up to 30 s (go-libp2p autorelay `minInterval`).

So Kubo is told an address of this process for each relay. libp2p's call is taken there and left waiting;
when Kubo answers, it is told the relay's true address and connects to it; then the waiting call is ended,
and libp2p finds that there is a connection to that peer already (go-libp2p swarm `dispatchError`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

_HELD = 8  # calls; libp2p makes one, and other processes of this machine have no business here


Take = Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]


class RelayGate:
    """One gate for one relay, `peer` being its id. Closing it twice does no harm."""

    def __init__(self, peer: str, server: asyncio.Server, held: list[asyncio.StreamWriter]) -> None:
        self.peer = peer
        self._server = server
        self._held = held

    @classmethod
    async def open(cls, relay: str) -> Self:
        """A gate before the relay with the address `relay`. Raises `OSError`."""
        held: list[asyncio.StreamWriter] = []

        def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if len(held) < _HELD:
                held.append(writer)
            else:
                writer.transport.abort()

        server = await _listen(take)
        return cls(relay.rpartition("/p2p/")[2], server, held)

    @property
    def address(self) -> str:
        """What Kubo is told."""
        port = self._server.sockets[0].getsockname()[1]
        return f"/ip4/127.0.0.1/tcp/{port}/p2p/{self.peer}"

    def close(self) -> None:
        """Let libp2p through."""
        self._server.close()
        while self._held:
            self._held.pop().transport.abort()


async def _listen(take: Take) -> asyncio.Server:
    return await asyncio.start_server(take, "127.0.0.1", 0)
