"""F18: a clock that is off by a day. Its node is told why nobody listens, and answers its own user all the same."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from daemon.engine.interface import ChatRequest
from daemon.errors import NotFound, Unserved
from daemon.gossip import exchange
from registry.errors import Misdated
from tests.functional.swarm_nodes import CID, Node, Script, swarm_node, text_of, until

QUESTION = ChatRequest(({"role": "user", "content": "hi"},))
DAY = 86_400


async def three_right_and_one_wrong(stack: AsyncExitStack, folder: Path, off: int) -> tuple[list[Node], Node]:
    right = [await stack.enter_async_context(swarm_node(folder / f"right{number}")) for number in range(3)]
    wrong = await stack.enter_async_context(swarm_node(folder / "wrong", clock=lambda: time.time() + off))
    return right, wrong


@pytest.mark.parametrize("off", [DAY, -DAY])
async def test_a_node_whose_clock_is_off_learns_it_and_its_user_is_answered(tmp_path: Path, off: int) -> None:
    async with AsyncExitStack() as stack:
        right, wrong = await three_right_and_one_wrong(stack, tmp_path, off)
        for other in right:
            other.serves(Script())
            with pytest.raises(Unserved, match="the clock of one of the nodes is off"):
                await wrong.gossip.join(other.gossip.pages.address())
        assert wrong.gossip.ear.clock_is_off
        assert wrong.table.offers() == []
        # Nobody else serves it, as far as this node may believe; what it serves itself is asked.
        with pytest.raises(NotFound):
            await wrong.answers.open(CID, QUESTION)
        wrong.serves(Script(("a ", "local ", "answer")))
        answer = await wrong.answers.open(CID, QUESTION)
        assert answer.answered_by == wrong.key
        assert await text_of(answer.deltas) == "a local answer"


@pytest.mark.parametrize("off", [DAY, -DAY])
async def test_the_others_refuse_what_it_says_and_go_on(tmp_path: Path, off: int) -> None:
    async with AsyncExitStack() as stack:
        right, wrong = await three_right_and_one_wrong(stack, tmp_path, off)
        a, b, c = right
        wrong.serves(Script())
        for envelope in await wrong.gossip.own_pages():
            with pytest.raises(Misdated, match="the clock of one of the nodes is off"):
                await a.gossip.receive(envelope)
        # Over the peer API it is taken for what it is, too.
        words = exchange.Words(await wrong.gossip.own_pages())
        async with aiohttp.ClientSession() as http:
            body = exchange.body(words, exchange.BROUGHT, a.membership)
            async with http.post(a.url + exchange.PATH, data=body, headers={"Content-Type": exchange.MEDIA_TYPE}) as response:
                assert response.status == 200
        assert a.table.remembered() == []
        for other in (b, c):
            other.serves(Script())
            await a.gossip.join(other.gossip.pages.address())
        await until(lambda: a.sees(b, serving=True) and a.sees(c, serving=True))
        assert not a.gossip.ear.clock_is_off
