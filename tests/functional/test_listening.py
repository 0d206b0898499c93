"""Real sockets that come while a server goes."""

from __future__ import annotations

import asyncio
import gc
import socket

import pytest

from daemon.listening import listening
from daemon.membership import OpenSwarm
from daemon.peerapi.server import PeerApi


@pytest.mark.parametrize("turns", range(5))
async def test_who_connects_while_it_stops_is_closed(turns: int) -> None:
    """`turns` of the loop lie between the connection and the end: at one of them it is accepted and has no transport yet."""
    with socket.socket() as near:
        async with PeerApi([], membership=OpenSwarm()).listening(["127.0.0.1"], 0) as ports:
            near.connect(("127.0.0.1", ports.direct))
            for _ in range(turns):
                await asyncio.sleep(0)
        near.settimeout(10)
        try:
            assert near.recv(1) == b""
        except ConnectionResetError:
            pass  # it was never accepted
    # A socket that nobody closed is a warning here, and so an error.
    gc.collect()


async def test_nobody_gets_in_afterwards_and_the_port_is_free() -> None:
    async with listening(asyncio.Protocol, "127.0.0.1", 0) as port:
        with pytest.raises(OSError):
            async with listening(asyncio.Protocol, "127.0.0.1", port):
                pass
    with socket.socket() as near:
        assert near.connect_ex(("127.0.0.1", port))
    async with listening(asyncio.Protocol, "127.0.0.1", port) as again:
        assert again == port


async def test_a_start_that_is_cancelled_leaves_no_socket() -> None:
    async def listen() -> None:
        async with listening(asyncio.Protocol, "127.0.0.1", 0):
            await asyncio.Event().wait()

    for turns in range(8):
        task = asyncio.create_task(listen())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    # A socket that nobody closed is a warning here, and so an error.
    gc.collect()
