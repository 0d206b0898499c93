"""What a stranger announces about itself moves this node as little as it can: where it connects to, and how often."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from registry import announcement
from registry.envelope import key_name, sign
from registry.records import Address, Announcement
from tests.functional.swarm_nodes import swarm_node, until


class Victim:
    """A port whose owner has nothing to do with the swarm: it hangs up on everybody and counts them."""

    def __init__(self) -> None:
        self.callers = 0
        self.url = ""

    async def hang_up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.callers += 1
        writer.close()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Victim]:
        async with await asyncio.start_server(self.hang_up, "127.0.0.1", 0) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self


class Liar:
    """A key without a node, that announces the address of somebody else."""

    def __init__(self, url: str) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.node = key_name(self.key)
        self.url = url
        self.sequence = 0

    def beat(self) -> bytes:
        self.sequence += 1
        address = Address(self.node, http=(self.url,))
        said = Announcement(
            self.node, None, self.sequence, int(time.time()) + 600, address, (), ()
        )
        return sign(announcement.PAYLOAD_TYPE, announcement.build(said), self.key)


@pytest.mark.parametrize("network", ["public", "loopback"])
async def test_an_old_friend_is_sought_only_where_the_network_leads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, network: str
) -> None:
    """R42: whoever is remembered said itself where it is, and may have said that it is in here."""
    caplog.set_level(logging.DEBUG, "daemon.gossip.joining")
    async with Victim().listening() as victim:
        async with swarm_node(tmp_path / "a", network="public") as a:
            await a.gossip.receive(Liar(victim.url).beat())
        before = victim.callers
        async with swarm_node(tmp_path / "a", network=network):  # type: ignore[arg-type]  # given above
            await until(lambda: "an old friend cannot be reached" in caplog.text)
    assert before == 0
    assert (victim.callers > 0) == (network == "loopback")
