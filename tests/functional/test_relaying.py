"""A relay that is blind: real nodes and real sockets; only the model is a script, and the relays of some tests are liars."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from daemon.engine.interface import ChatRequest
from daemon.errors import Unserved
from daemon.peerapi.ways import NEVER
from daemon.relaying.limits import RelayLimits
from daemon.transfer.objects import Objects, object_cid
from registry.cid import leaf_cid
from registry.codes import code_of_cid, short
from registry.records import Address
from tests.functional.swarm_nodes import CID, Node, Script, swarm_node, text_of, until

QUESTION = ChatRequest(({"role": "user", "content": "a very private prompt"},))


async def three(
    stack: AsyncExitStack, folder: Path, script: Script, *, limits: RelayLimits | None = None
) -> tuple[Node, Node, Node]:
    """A relay, a server that nobody can dial and that it carries for, and an asker that has joined the relay alone."""
    relay = await stack.enter_async_context(
        swarm_node(folder / "relay", relays=True, relay_limits=limits)
    )
    server = await stack.enter_async_context(
        swarm_node(folder / "server", direct=False, hold=[relay.peer()])
    )
    await until(lambda: server.holder.held == (relay.key,))
    server.serves(script)
    await server.gossip.join(relay.gossip.pages.address())
    asker = await stack.enter_async_context(swarm_node(folder / "asker"))
    await asker.gossip.join(relay.gossip.pages.address())
    await until(lambda: asker.sees(server, serving=True))
    return relay, server, asker


async def test_a_node_that_nobody_can_dial_answers_through_its_relay(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        script = Script(("the ", "answer ", "\N{SNOWMAN}"))
        relay, server, asker = await three(stack, tmp_path, script)
        peer = asker.table.peer(server.key)
        assert peer is not None and peer.address.http == () and peer.address.ipfs == ()
        answer = await asker.answers.open(CID, QUESTION)
        assert await text_of(answer.deltas) == "the answer \N{SNOWMAN}"
        assert (answer.answered_by, answer.via) == (server.key, relay.key)
        assert script.asked == [QUESTION]
        assert relay.relay.held == (server.key,) and relay.relay.carried > 0
        named = await asker.answers.open(CID, QUESTION, via=relay.key)
        assert await text_of(named.deltas) == "the answer \N{SNOWMAN}" and named.via == relay.key
        with pytest.raises(Unserved):
            await asker.answers.open(CID, QUESTION, via=NEVER)
        await until(lambda: relay.relay.streams == 0)


async def test_objects_come_through_a_relay(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        _, server, asker = await three(stack, tmp_path, Script())
        manifest = b"a signed manifest" * 1000
        server.objects[object_cid(manifest)] = manifest
        holder = asker.table.peer(server.key)
        assert holder is not None
        objects = Objects(lambda: None, asker.ways, asker.http, asker.membership)
        assert await objects.get(object_cid(manifest), [holder], limit=1 << 20) == manifest


async def test_announcements_reach_it_through_its_relay(tmp_path: Path) -> None:
    """The asker joins by an address that has nothing but the relay, and then tells what it holds."""
    async with AsyncExitStack() as stack:
        relay, server, _ = await three(stack, tmp_path, Script())
        newcomer = await stack.enter_async_context(swarm_node(tmp_path / "newcomer"))
        await newcomer.gossip.join(Address(server.key, relays=server.holder.points()))
        await relay.gossip.close()  # nobody else passes anything on
        newcomer.holds(leaf_cid(b"of the newcomer"))
        await until(lambda: server.sees(newcomer))


async def test_the_relay_learns_the_codes_and_forgets_them(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        relay, server, _ = await three(stack, tmp_path, Script())
        second = leaf_cid(b"another")
        server.holds(second, "another")
        codes = {short(code_of_cid(CID)), short(code_of_cid(second))}
        await until(lambda: relay.relay.codes().get(server.key) == codes)
        await server.holder.close()
        await until(lambda: relay.relay.codes() == {})
