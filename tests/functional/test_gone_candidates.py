"""Candidates that are gone, on real sockets: a question goes to whoever is there, and no prompt to whoever is not."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.answering import answers as under_test
from daemon.engine.interface import ChatRequest
from daemon.errors import Unserved
from daemon.listening import listening
from registry import announcement
from registry.envelope import key_name, sign
from registry.records import Address, Announcement, Offer, SealKey
from tests.functional.swarm_nodes import CID, Node, Script, swarm_node, text_of, until

QUESTION = ChatRequest(({"role": "user", "content": "a private prompt"},))


class Silent(asyncio.Protocol):
    """Takes connections, notes what comes, and says nothing: a machine that hangs."""

    def __init__(self) -> None:
        self.connections = 0
        self.heard = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.connections += 1

    def data_received(self, data: bytes) -> None:
        self.heard += data


async def announced_at(port: int, node: Node, seeders: int, seal_keys: tuple[SealKey, ...]) -> str:
    """A node that serves the model better than all others, and whose peer API is at that port."""
    key = Ed25519PrivateKey.generate()
    name = key_name(key)
    offer = Offer(name, CID, None, None, None, "a model", 1000, True, free_slots=9, seeders=seeders)
    address = Address(name, http=(f"http://127.0.0.1:{port}",))
    said = Announcement(name, None, 1, int(time.time()) + 300, address, seal_keys, (offer,), 0, (1,))
    await node.gossip.receive(sign(announcement.PAYLOAD_TYPE, announcement.build(said), key))
    return name


async def test_a_node_that_hangs_and_one_that_is_gone_do_not_hold_a_question_up(tmp_path: Path) -> None:
    hangs = Silent()
    async with AsyncExitStack() as stack:
        alive = await stack.enter_async_context(swarm_node(tmp_path / "alive"))
        asker = await stack.enter_async_context(swarm_node(tmp_path / "asker"))
        port = await stack.enter_async_context(listening(lambda: hangs, "127.0.0.1", 0))
        async with listening(Silent, "127.0.0.1", 0) as closed:
            pass
        seal = (alive.seal_keys.public(),)
        first = await announced_at(port, asker, 90, seal)
        second = await announced_at(closed, asker, 80, seal)
        alive.serves(Script(("an ", "answer")))
        await asker.gossip.join(alive.gossip.pages.address())
        await until(lambda: asker.sees(alive, serving=True))
        answer = await asker.answers.open(CID, QUESTION)
        assert answer.answered_by == alive.key
        assert await text_of(answer.deltas) == "an answer"
        # Both were tried, and asked nothing but who they are.
        assert hangs.connections and b"POST" not in hangs.heard
        assert {node for node, stats in asker.table.stats().items() if stats.failures} == {first, second}


async def test_when_all_hang_each_is_tried_again_with_patience_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "QUICK_S", 0.2)
    monkeypatch.setattr(under_test, "CONNECT_S", 0.4)
    hangs = Silent()
    async with swarm_node(tmp_path / "asker") as asker, listening(lambda: hangs, "127.0.0.1", 0) as port:
        seal = (asker.seal_keys.public(),)
        names = [await announced_at(port, asker, seeders, seal) for seeders in (9, 8)]
        with pytest.raises(Unserved) as raised:
            await asker.answers.open(CID, QUESTION)
        assert all(name[:16] in raised.value.why for name in names)
        assert hangs.connections >= 4 and b"POST" not in hangs.heard  # gossip tries them, too
