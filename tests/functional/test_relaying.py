"""A relay that is blind: real nodes and real sockets; only the model is a script, and the relays of
some tests are liars.
"""

from __future__ import annotations

import asyncio
import gc
import io
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.engine.interface import ChatRequest, Delta
from daemon.errors import InferenceError, PeerError, Unserved
from daemon.membership import OpenSwarm
from daemon.peerapi.server import PeerApi, Route, source_of
from daemon.peerapi.ways import NEVER, Way
from daemon.peerchat import server as chat_server
from daemon.peerchat import wire as wire_of_chats
from daemon.peerchat.provider import PeerProvider
from daemon.peerchat.seal import REQUEST_TYPE, RESPONSE_TYPE, ResponseSealer
from daemon.relaying import pipes, wire
from daemon.relaying.limits import RelayLimits
from daemon.relaying.service import RelayService
from daemon.relaying.tunnels import RelayTunnels
from daemon.transfer.objects import Objects, object_cid
from registry.cid import leaf_cid
from registry.codes import code_of_cid, short
from registry.envelope import key_name
from registry.records import Address, Peer
from registry.relaying import HoldRequest, signed
from tests.functional.liar_relay import LiarRelay, Lie, liar
from tests.functional.swarm_nodes import CID, Node, Script, swarm_node, text_of, until

QUESTION = ChatRequest(({"role": "user", "content": "a very private prompt"},))


async def three(
    stack: AsyncExitStack, folder: Path, script: Script, *, limits: RelayLimits | None = None
) -> tuple[Node, Node, Node]:
    """A relay, a server that nobody can dial and that it carries for, and an asker that has joined
    the relay alone.
    """
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
        objects = Objects(lambda: None, asker.ways, asker.http, OpenSwarm())
        assert await objects.get(object_cid(manifest), [holder], limit=1 << 20) == manifest


async def test_announcements_reach_it_through_its_relay(tmp_path: Path) -> None:
    """The asker joins by an address that has nothing but the relay, and then tells what it holds.
    """
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


# -- R34: relays that lie --------------------------------------------------------------------------


async def behind_a_liar(
    stack: AsyncExitStack, folder: Path, lie: Lie | None
) -> tuple[LiarRelay, Script, Node, Node]:
    """A liar, what answers, the server that the liar carries for, and an asker that knows it
    through the liar alone.
    """
    relay = await stack.enter_async_context(liar())
    server = await stack.enter_async_context(
        swarm_node(folder / "server", direct=False, hold=[relay.peer])
    )
    asker = await stack.enter_async_context(swarm_node(folder / "asker"))
    script = Script(("one ", "two ", "three ", "four"))
    server.serves(script)
    await until(lambda: server.holder.held == (relay.key,))
    await asker.gossip.join(Address(server.key, relays=server.holder.points()))
    await until(lambda: asker.sees(server, serving=True))
    relay.lie = lie
    return relay, script, server, asker


async def test_the_liar_can_be_honest(tmp_path: Path) -> None:
    """So that what the others catch is their lie. Unpacking and packing again changes nothing."""
    async with AsyncExitStack() as stack:
        relay, _, _, asker = await behind_a_liar(stack, tmp_path, lambda chunks: chunks)
        answer = await asker.answers.open(CID, QUESTION)
        assert (answer.via, await text_of(answer.deltas)) == (relay.key, "one two three four")


def with_its_own_key(chunks: list[bytes]) -> list[bytes]:
    sealer = ResponseSealer(bytes(32), bytes(32))
    frame = wire_of_chats.frames(Delta("a lie", finish="stop"))[0]
    return [sealer.nonce + sealer.frame(frame, last=True)]


LIES: dict[str, tuple[Lie, str]] = {
    "truncates": (lambda chunks: chunks[:-1], "cut off"),
    "reorders": (lambda chunks: [*chunks[:1], chunks[2], chunks[1], *chunks[3:]], "moved"),
    "replays": (lambda chunks: [*chunks[:2], chunks[1], *chunks[2:]], "repeated"),
    "flips a bit": (lambda chunks: [*chunks[:-1], chunks[-1][:-1] + b"?"], "changed"),
    "appends": (lambda chunks: [*chunks, chunks[-1]], "after its end"),
    "swaps the key": (with_its_own_key, "changed"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_r34_a_relay_that_lies_is_caught(tmp_path: Path, lie: str) -> None:
    change, why = LIES[lie]
    async with AsyncExitStack() as stack:
        _, script, _, asker = await behind_a_liar(stack, tmp_path, change)
        deltas = []
        with pytest.raises(PeerError, match=why):
            answer = await asker.answers.open(CID, QUESTION)
            async for delta in answer.deltas:
                deltas.append(delta)
        assert script.asked == [QUESTION]
        said = "".join(delta.text for delta in deltas)
        assert "one two three four".startswith(said)
        assert not any(delta.finish for delta in deltas)


async def test_r34_a_relay_that_drops_everything_is_given_up(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        _, _, server, asker = await behind_a_liar(stack, tmp_path, lambda chunks: [])
        with pytest.raises(Unserved):
            await asker.answers.open(CID, QUESTION)
        known = asker.table.peer(server.key)
        assert known is not None
        server.serves(Script(hang_after=0))
        silent = PeerProvider(
            known, CID, ways=asker.ways, http=asker.http, clock=time.time, stall_s=0.2
        )
        with pytest.raises(Unserved, match=r"silent|cannot be reached"):
            await anext(silent.generate(QUESTION))


@pytest.mark.parametrize("lie", ["truncates", "swaps the key", "drops everything"])
async def test_r34_an_honest_relay_is_tried_after_a_liar(tmp_path: Path, lie: str) -> None:
    """As long as nothing has been said. Questions are asked until the liar had its turn."""
    lied: list[str] = []

    def change(chunks: list[bytes]) -> Sequence[bytes]:
        lied.append(lie)
        return [] if lie == "drops everything" else LIES[lie][0](chunks[:1])

    async with AsyncExitStack() as stack:
        dishonest = await stack.enter_async_context(liar())
        honest = await stack.enter_async_context(swarm_node(tmp_path / "honest", relays=True))
        server = await stack.enter_async_context(
            swarm_node(tmp_path / "server", direct=False, hold=[dishonest.peer, honest.peer()])
        )
        asker = await stack.enter_async_context(swarm_node(tmp_path / "asker"))
        server.serves(Script())
        await until(lambda: set(server.holder.held) == {dishonest.key, honest.key})
        await asker.gossip.join(Address(server.key, relays=server.holder.points()))
        await until(lambda: asker.sees(server, serving=True))
        dishonest.lie = change
        async with asyncio.timeout(60):
            while not lied:
                answer = await asker.answers.open(CID, QUESTION)
                assert answer.via == honest.key
                assert await text_of(answer.deltas) == "the answer"


async def test_r34_a_question_is_answered_once_however_often_it_is_replayed(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        relay, script, server, asker = await behind_a_liar(stack, tmp_path, None)
        answer = await asker.answers.open(CID, QUESTION)
        assert await text_of(answer.deltas) == "one two three four"
        sent = next(bytes(asked) for asked in relay.asked if b"POST /swarm/1/chat" in asked)
        head, _, rest = sent[sent.index(b"POST /swarm/1/chat") :].partition(b"\r\n\r\n")
        size = int(re.findall(rb"Content-Length: (\d+)", head)[0])
        async with asker.http.post(
            f"{server.url}/swarm/1/chat",
            data=io.BytesIO(rest[:size]),
            headers={"Content-Type": REQUEST_TYPE},
        ) as response:
            assert (response.status, "sent before" in await response.text()) == (400, True)
        assert len(script.asked) == 1


async def test_what_passes_a_relay_has_neither_prompt_nor_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the real relay, every byte that it passes on, both ways."""
    passed: list[bytes] = []
    send_bytes = web.WebSocketResponse.send_bytes

    async def noted(ws: web.WebSocketResponse, data: bytes, compress: int | None = None) -> None:
        passed.append(data)
        await send_bytes(ws, data, compress)

    monkeypatch.setattr(web.WebSocketResponse, "send_bytes", noted)
    async with AsyncExitStack() as stack:
        _, _, asker = await three(stack, tmp_path, Script(("a very ", "secret ", "answer")))
        answer = await asker.answers.open(CID, QUESTION)
        assert await text_of(answer.deltas) == "a very secret answer"
    whole = b"".join(passed)
    assert b"POST /swarm/1/chat" in whole and RESPONSE_TYPE.encode() in whole
    for secret in (b"private prompt", b"very", b"secret", b"a model", CID.encode()):
        assert secret not in whole[whole.index(b"POST /swarm/1/chat") :]


# -- F17 and failover ------------------------------------------------------------------------------


async def test_f17_when_a_relay_dies_the_answer_breaks_and_the_next_takes_another(
    tmp_path: Path,
) -> None:
    async with AsyncExitStack() as stack:
        dying = await stack.enter_async_context(AsyncExitStack())
        first = await dying.enter_async_context(swarm_node(tmp_path / "first", relays=True))
        others = [
            await stack.enter_async_context(swarm_node(tmp_path / name, relays=True))
            for name in ("second", "third")
        ]
        hold = [first.peer(), *(other.peer() for other in others)]
        server = await stack.enter_async_context(
            swarm_node(tmp_path / "server", direct=False, hold=hold)
        )
        await until(lambda: set(server.holder.held) == {first.key, others[0].key})
        script = Script(hang_after=1)
        server.serves(script)
        asker = await stack.enter_async_context(swarm_node(tmp_path / "asker"))
        await asker.gossip.join(Address(server.key, relays=server.holder.points()))
        await until(lambda: asker.sees(server, serving=True))
        answer = await asker.answers.open(CID, QUESTION, via=first.key)
        assert (await anext(answer.deltas)).text == "the "
        await dying.aclose()
        with pytest.raises(InferenceError, match="in the middle"):
            await anext(answer.deltas)
        async with asyncio.timeout(10):
            await script.closed.wait()
        # The server takes the next relay at once; the question goes another way, sealed anew, or it
        # would be refused.
        await until(lambda: set(server.holder.held) == {other.key for other in others})
        again = Script()
        server.serves(again)
        answer = await asker.answers.open(CID, QUESTION)
        assert await text_of(answer.deltas) == "the answer"
        assert answer.via in {other.key for other in others}
        assert again.asked == [QUESTION]


async def test_leaving_a_relayed_answer_cancels_it_on_the_far_side(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        script = Script(hang_after=1)
        relay, _, asker = await three(stack, tmp_path, script)
        answer = await asker.answers.open(CID, QUESTION)
        await anext(answer.deltas)
        await answer.deltas.aclose()
        async with asyncio.timeout(10):
            await script.closed.wait()
        await until(lambda: relay.relay.streams == 0)


async def test_the_relay_itself_asks_whom_it_carries_for(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        relay, server, _ = await three(stack, tmp_path, Script())
        answer = await relay.answers.open(CID, QUESTION)
        assert await text_of(answer.deltas) == "the answer"
        assert (answer.answered_by, answer.via) == (server.key, None)
        await until(lambda: relay.relay.streams == 0)


async def test_a_named_relay_is_tried_although_the_peer_does_not_name_it(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        relay, server, asker = await three(stack, tmp_path, Script())
        peer = Peer(server.key, None, Address(server.key), 0, 0)
        async with asker.ways.to(peer, via=relay.key) as way:
            assert way.via == relay.key
        with pytest.raises(Unserved):
            async with asker.ways.to(peer, via=asker.key):
                pass


async def test_the_server_sees_the_relay_and_not_the_asker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[str] = []

    def noted(request: web.Request) -> str:
        sources.append(source_of(request))
        return sources[-1]

    monkeypatch.setattr(chat_server, "source_of", noted)
    async with AsyncExitStack() as stack:
        relay, _, asker = await three(stack, tmp_path, Script())
        answer = await asker.answers.open(CID, QUESTION, via=relay.key)
        await text_of(answer.deltas)
        assert sources == [f"relay:{relay.key}"]


async def test_a_way_that_is_cancelled_anywhere_leaves_nothing_behind(tmp_path: Path) -> None:
    """After so many turns of the loop: between the first connection and the answered ping, and once
    it is open.
    """
    async with AsyncExitStack() as stack:
        # Nobody has joined anybody, so that no gossip passes the relay.
        relay = await stack.enter_async_context(swarm_node(tmp_path / "relay", relays=True))
        server = await stack.enter_async_context(
            swarm_node(tmp_path / "server", direct=False, hold=[relay.peer()])
        )
        asker = await stack.enter_async_context(swarm_node(tmp_path / "asker"))
        await until(lambda: server.holder.held == (relay.key,))
        peer = server.peer()
        reached = asyncio.Event()

        async def go() -> None:
            async with asker.ways.to(peer):
                reached.set()
                await asyncio.Event().wait()

        turns = 0
        while not reached.is_set():
            await until(lambda: relay.relay.streams == 0)
            tasks = asyncio.all_tasks()
            task = asyncio.create_task(go())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: relay.relay.streams == 0)
            await until(partial(_all_ended, tasks))
            turns += 1
        assert turns > 10
        # A socket that nobody closed is a warning here, and so an error.
        gc.collect()


def _all_ended(before: set[asyncio.Task[object]]) -> bool:
    return not _tunnels(asyncio.all_tasks() - before)


def _tunnels(tasks: set[asyncio.Task[object]]) -> list[str]:
    """Tasks of daemon/relaying among `tasks`."""
    names = (getattr(task.get_coro(), "__qualname__", "") for task in tasks)
    ours = ("_Carrier", "pipe", "_from_socket", "_to_socket", "Stream")
    return [name for name in names if name.startswith(ours)]


# -- R35, R46: a relay is for those that asked it to be theirs -------------------------------------


@asynccontextmanager
async def a_relay(folder: Path, **limits: Any) -> AsyncIterator[Node]:
    generous = {"rate": 1e9, "burst": 1e9}
    relay_limits = RelayLimits(**{**generous, **limits})
    async with swarm_node(folder, relays=True, relay_limits=relay_limits) as node:
        yield node


class RawHolder:
    """A holder that does only what a test says."""

    def __init__(self, relay: Node, ws: aiohttp.ClientWebSocketResponse, challenge: str) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.node = key_name(self.key)
        self.relay = relay
        self.ws = ws
        self.challenge = challenge

    def request(self, **fields: Any) -> bytes:
        request = HoldRequest(self.node, self.relay.key, self.challenge, 1, 60, frozenset())
        return signed(replace(request, **fields), self.key)

    async def hold(self) -> None:
        await self.ws.send_str(self.request().decode())
        assert (await self.ws.receive_json())["held"] is True

    async def taken(self) -> aiohttp.ClientWebSocketResponse:
        """Wait to be rung, and take the call."""
        ticket = (await self.ws.receive_json())["call"]
        return await self.relay.http.ws_connect(self.relay.url + wire.TAKE_PATH + ticket)


@asynccontextmanager
async def raw_holder(relay: Node) -> AsyncIterator[RawHolder]:
    async with relay.http.ws_connect(relay.url + wire.HOLD_PATH) as ws:
        yield RawHolder(relay, ws, (await ws.receive_json())["challenge"])


def asks(relay: Node, node: str, query: str = "") -> Any:
    """The WebSocket of an asker."""
    return relay.http.ws_connect(f"{relay.url}{wire.TO_PATH}{wire.hex_of(node)}{query}")


async def refused(connecting: Any) -> int:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        async with connecting:
            pass
    return caught.value.status


async def closed(ws: aiohttp.ClientWebSocketResponse) -> int | None:
    """The code with which the other end closes; what it says before is passed over."""
    async with asyncio.timeout(10):
        while (await ws.receive()).type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            pass
    return ws.close_code


async def test_r35_r46_a_relay_goes_to_nobody_who_did_not_ask_it_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every connection that is made in this process is noted, and only ours to the relay are."""
    went: list[Any] = []
    loop = type(asyncio.get_running_loop())
    sock_connect = loop.sock_connect

    async def noted(self: Any, sock: Any, address: Any) -> None:
        went.append(address[1])
        await sock_connect(self, sock, address)

    async with a_relay(tmp_path / "relay") as relay, swarm_node(tmp_path / "third") as third:
        await relay.gossip.join(third.gossip.pages.address())
        assert relay.table.peer(third.key) is not None
        await until(lambda: third.table.peer(relay.key) is not None)
        monkeypatch.setattr(loop, "sock_connect", noted)
        async with raw_holder(relay) as holder:
            await holder.hold()
            assert await refused(asks(relay, third.key)) == 404
            assert await refused(asks(relay, relay.key)) == 404
            for target in ("127.0.0.1:80", "http:%2F%2F127.0.0.1:80", "0" * 63, "g" * 64):
                assert await refused(asks(relay, target)) == 404
            nothing = relay.http.ws_connect(relay.url + wire.TAKE_PATH + "0" * 32)
            assert await refused(nothing) == 404
        assert set(went) == {int(relay.url.rpartition(":")[2])}


async def test_r35_a_node_that_does_not_relay_refuses(tmp_path: Path) -> None:
    async with swarm_node(tmp_path / "a") as a:
        assert await refused(a.http.ws_connect(a.url + wire.HOLD_PATH)) == 403
        assert await refused(asks(a, a.key)) == 403
        async with a.http.get(a.url + wire.HOLD_PATH) as response:
            assert response.status == 403
        # One that has had enough of it lets everybody go.
    willing = [True]
    service = RelayService(
        "ed25519:" + "07" * 32,
        enabled=lambda: willing[0],
        bulk=lambda: False,
        on_change=lambda: None,
    )
    async with (
        PeerApi(service.routes(), membership=OpenSwarm()).listening(["127.0.0.1"], 0) as ports,
        aiohttp.ClientSession() as http,
        http.ws_connect(f"http://127.0.0.1:{ports.direct}{wire.HOLD_PATH}") as ws,
    ):
        challenge = (await ws.receive_json())["challenge"]
        key = Ed25519PrivateKey.generate()
        request = HoldRequest(key_name(key), "ed25519:" + "07" * 32, challenge, 1, 60)
        await ws.send_str(signed(request, key).decode())
        assert (await ws.receive_json())["held"] is True
        willing[0] = False
        service.refresh()
        assert await closed(ws) == wire.NO_RELAY
        await until(lambda: service.held == ())
        await service.close()


async def test_r46_a_request_counts_on_its_connection_alone(tmp_path: Path) -> None:
    async with a_relay(tmp_path / "relay") as relay:
        async with raw_holder(relay) as first:
            recorded = first.request()
            await first.hold()
            await first.ws.send_str(recorded.decode())
            assert await closed(first.ws) == wire.NOT_ACCEPTED
        assert relay.relay.held == ()
        async with raw_holder(relay) as thief:
            await thief.ws.send_str(recorded.decode())
            assert await closed(thief.ws) == wire.NOT_ACCEPTED
        assert relay.relay.held == ()


async def test_r46_what_a_holder_may_not_say(tmp_path: Path) -> None:
    other = "ed25519:" + "07" * 32
    async with a_relay(tmp_path / "relay", held_per_source=64, requests_burst=1000) as relay:

        async def answer(say: Callable[[RawHolder], bytes]) -> int | None:
            async with raw_holder(relay) as holder:
                await holder.ws.send_str(say(holder).decode())
                return await closed(holder.ws)

        assert await answer(lambda holder: holder.request(relay=other)) == wire.NOT_ACCEPTED
        assert await answer(lambda holder: holder.request(node=other)) == wire.NOT_ACCEPTED
        assert await answer(lambda holder: holder.request(challenge="0" * 32)) == wire.NOT_ACCEPTED
        assert await answer(lambda holder: b"{}") == wire.NOT_ACCEPTED
        assert await answer(lambda holder: b" " * 5000) == 1009
        async with raw_holder(relay) as holder:
            await holder.ws.send_bytes(holder.request())
            assert await closed(holder.ws) == wire.WRONG_KIND
        assert relay.relay.held == ()


async def test_r46_a_holder_that_says_nothing_or_does_not_renew_is_let_go(tmp_path: Path) -> None:
    async with a_relay(tmp_path / "relay", request_s=0.1) as relay:
        async with raw_holder(relay) as holder:
            assert await closed(holder.ws) == wire.LATE
        async with raw_holder(relay) as holder:
            await holder.ws.send_str(holder.request(lifetime=1).decode())
            await until(lambda: relay.relay.held == (holder.node,))
            assert await closed(holder.ws) == wire.LATE
        assert relay.relay.held == ()


async def test_r46_a_holder_that_never_takes_costs_the_asker_one_error(tmp_path: Path) -> None:
    async with a_relay(tmp_path / "relay", take_s=0.1) as relay, raw_holder(relay) as holder:
        await holder.hold()
        assert await refused(asks(relay, holder.node)) == 503
        assert relay.relay.streams == 0
        ticket = (await holder.ws.receive_json())["call"]
        assert await refused(relay.http.ws_connect(relay.url + wire.TAKE_PATH + ticket)) == 404


async def test_r46_the_same_node_again_replaces_its_older_connection(tmp_path: Path) -> None:
    async with a_relay(tmp_path / "relay") as relay:
        async with raw_holder(relay) as old, raw_holder(relay) as new:
            await old.hold()
            new.key, new.node = old.key, old.node
            await asyncio.gather(new.hold(), closed(old.ws))
            assert (old.ws.close_code, relay.relay.held) == (wire.REPLACED, (new.node,))
        await until(lambda: relay.relay.held == ())


async def test_r46_an_asker_that_never_reads_is_cut_off(tmp_path: Path) -> None:
    limits = {"idle_s": 0.3, "stream_bytes": 1 << 40}
    async with a_relay(tmp_path / "relay", **limits) as relay, raw_holder(relay) as holder:
        await holder.hold()
        asking = asyncio.create_task(asks(relay, holder.node)._coro)
        taken = await holder.taken()
        asker = await asking

        async def flood() -> None:
            while True:
                await taken.send_bytes(bytes(wire.CHUNK))

        with pytest.raises(ConnectionError):
            async with asyncio.timeout(20):
                await flood()
        await until(lambda: relay.relay.streams == 0)
        assert relay.relay.held == (holder.node,)
        await taken.close()
        await asker.close()


async def test_r46_a_stream_ends_at_its_ceilings(tmp_path: Path) -> None:
    limits = {"stream_bytes": 100_000, "stream_s": 0.5, "streams_per_asker": 1}
    async with a_relay(tmp_path / "relay", **limits) as relay, raw_holder(relay) as holder:
        await holder.hold()

        async def stream(send: Callable[[Any], Awaitable[None]]) -> tuple[int | None, int | None]:
            asking = asyncio.create_task(asks(relay, holder.node)._coro)
            async with await holder.taken() as taken, await asking as asker:
                assert await refused(asks(relay, holder.node)) == 429
                await send(asker)
                codes = await asyncio.gather(closed(asker), closed(taken))
            await until(lambda: relay.relay.streams == 0)
            return codes[0], codes[1]

        async def too_much(asker: Any) -> None:
            for _ in range(4):
                await asker.send_bytes(bytes(wire.CHUNK))

        async def many_empty(asker: Any) -> None:
            for _ in range(4000):
                await asker.send_bytes(b"")

        assert await stream(too_much) == (wire.OVER_LIMIT,) * 2
        assert await stream(many_empty) == (wire.OVER_LIMIT,) * 2
        assert await stream(lambda asker: asker.send_str("text")) == (wire.WRONG_KIND,) * 2
        assert await stream(lambda asker: asker.ping()) == (wire.WRONG_KIND,) * 2
        assert await stream(lambda asker: asyncio.sleep(0)) == (wire.OVER_LIMIT,) * 2


async def test_r46_ceilings_are_answered_by_429(tmp_path: Path) -> None:
    limits = {"held": 3, "held_per_source": 2, "requests_burst": 3, "requests_rate": 0.001}
    async with a_relay(tmp_path / "relay", **limits) as relay, AsyncExitStack() as stack:
        holders = [await stack.enter_async_context(raw_holder(relay)) for _ in range(2)]
        for holder in holders:
            await holder.hold()
        assert await refused(relay.http.ws_connect(relay.url + wire.HOLD_PATH)) == 429
        assert await refused(asks(relay, holders[0].node, "?kind=bytes")) == 403
        assert await refused(asks(relay, holders[0].node, "?kind=all")) == 400
        # Two of three requests are spent.
        for sequence in (2, 3):
            await holders[0].ws.send_str(holders[0].request(sequence=sequence).decode())
        assert await closed(holders[0].ws) == wire.TOO_MANY


async def test_r46_nobody_comes_to_a_relay_through_a_relay(tmp_path: Path) -> None:
    """Or two relays could carry for each other without end."""
    async with AsyncExitStack() as stack:
        relay, _, _ = await three(stack, tmp_path, Script())
        second = await stack.enter_async_context(
            swarm_node(tmp_path / "second", relays=True, hold=[relay.peer()])
        )
        await until(lambda: second.holder.held == (relay.key,))
        asker = await stack.enter_async_context(swarm_node(tmp_path / "outside"))
        peer = Peer(second.key, None, Address(second.key, relays=second.holder.points()), 0, 0)
        async with asker.ways.to(peer) as way:
            assert way.via == relay.key
            assert await refused(asker.http.ws_connect(way.url + wire.HOLD_PATH)) == 403


async def test_a_holder_that_is_gone_without_a_word_is_noticed(tmp_path: Path) -> None:
    """Its connection stays and nobody answers on it."""
    async with a_relay(tmp_path / "relay", heartbeat_s=0.2) as relay, AsyncExitStack() as stack:
        port = int(relay.url.rpartition(":")[2])
        ws = await stack.enter_async_context(
            relay.http.ws_connect(relay.url + wire.HOLD_PATH, autoping=False)
        )
        holder = RawHolder(relay, ws, (await ws.receive_json())["challenge"])
        await holder.hold()
        assert relay.relay.held == (holder.node,) and port
        await until(lambda: relay.relay.held == ())


async def test_candidates_that_do_not_relay_are_passed_over(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        unwilling = await stack.enter_async_context(swarm_node(tmp_path / "unwilling"))
        nowhere = Peer(unwilling.key, None, Address(unwilling.key), 0, 0)
        key = "ed25519:" + "07" * 32
        gone = Peer(key, None, Address(key, http=("http://127.0.0.1:9",)), 0, 0)
        async with swarm_node(
            tmp_path / "server", direct=False, hold=[nowhere, gone, unwilling.peer()]
        ) as server:
            willing = await stack.enter_async_context(
                swarm_node(tmp_path / "willing", relays=True)
            )
            assert server.holder.held == () and server.holder.points() == ()
        hold = [nowhere, gone, unwilling.peer(), willing.peer()]
        async with swarm_node(tmp_path / "server", direct=False, hold=hold) as server:
            await until(lambda: server.holder.held == (willing.key,))
            assert server.holder.points() == (f"{wire.hex_of(willing.key)}@{willing.url}",)
            await server.holder.close()
            await server.holder.close()
            assert server.holder.held == ()
            await until(lambda: willing.relay.held == ())


async def test_relays_that_agree_and_carry_nothing_are_none_of_ours(tmp_path: Path) -> None:
    """As many as this node wants, and the first to be asked; each rests longer every time."""
    async with AsyncExitStack() as stack:
        liars = [await stack.enter_async_context(liar(carries=False)) for _ in range(2)]
        honest = await stack.enter_async_context(swarm_node(tmp_path / "honest", relays=True))
        hold = [*(one.peer for one in liars), honest.peer()]
        server = await stack.enter_async_context(
            swarm_node(tmp_path / "server", direct=False, hold=hold)
        )
        await until(lambda: server.holder.held == (honest.key,))
        assert all(one.calls for one in liars)
        assert server.holder.points() == (f"{wire.hex_of(honest.key)}@{honest.url}",)
        liars[0].carries = True
        await until(lambda: set(server.holder.held) == {honest.key, liars[0].key})


async def test_among_those_that_nobody_joined_chance_decides(tmp_path: Path) -> None:
    """Or the first in the list would be everybody's relays."""
    async with AsyncExitStack() as stack:
        relays = [
            await stack.enter_async_context(swarm_node(tmp_path / str(number), relays=True))
            for number in range(4)
        ]
        hold = [relay.peer() for relay in relays]
        chosen: set[str] = set()
        joined = relays[3].key
        for number in range(30):
            home = tmp_path / f"home {number}"
            async with swarm_node(home, direct=False, hold=hold, hold_first=[joined]) as server:
                await until(lambda: len(server.holder.held) == 2)
                assert joined in server.holder.held
                chosen |= set(server.holder.held)
            if len(chosen) == 4:
                break
        assert len(chosen) == 4  # by chance it is not, once in 60,000 times


async def test_a_relay_that_redirects_sends_nobody_anywhere() -> None:
    node = "ed25519:" + "07" * 32
    came: list[str] = []

    async def elsewhere(request: web.Request) -> web.StreamResponse:
        came.append(request.path)
        return web.Response(status=302, headers={"Location": "/inwards"})

    routes = [
        Route("GET", wire.TO_PATH + "{node}", elsewhere),
        Route("GET", "/inwards", elsewhere),
    ]
    api = PeerApi(routes, membership=OpenSwarm())
    async with api.listening(["127.0.0.1"], 0) as ports, pipes.session(OpenSwarm()) as http:
        way = Way(f"http://127.0.0.1:{ports.direct}")
        with pytest.raises(Unserved):
            async with RelayTunnels(http).through(way, node):
                pass
    assert came == [wire.TO_PATH + wire.hex_of(node)]


# -- over libp2p -----------------------------------------------------------------------------------


async def test_server_and_relay_meet_over_libp2p_alone(tmp_path: Path, kubo_binary: Path) -> None:
    """The asker has no IPFS and reaches the relay by its URL; the server reaches it over libp2p
    streams.
    """
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(
            swarm_node(tmp_path / "relay", kubo=kubo_binary, relays=True)
        )
        known = relay.peer()
        hold = [replace(known, address=replace(known.address, http=()))]
        server = await stack.enter_async_context(
            swarm_node(tmp_path / "server", kubo=kubo_binary, direct=False, hold=hold)
        )
        await until(lambda: server.holder.held == (relay.key,))
        assert server.holder.points()[0].partition("@")[2].startswith("/ip4/127.0.0.1/")
        server.serves(Script())
        await server.gossip.join(replace(relay.gossip.pages.address(), http=()))
        asker = await stack.enter_async_context(swarm_node(tmp_path / "asker"))
        await asker.gossip.join(replace(relay.gossip.pages.address(), ipfs=()))
        await until(lambda: asker.sees(server, serving=True))
        answer = await asker.answers.open(CID, QUESTION)
        assert await text_of(answer.deltas) == "the answer"
        assert (answer.answered_by, answer.via) == (server.key, relay.key)
        assert relay.ipfs is not None and server.ipfs is not None
        # And with libp2p on both legs.
        second = await stack.enter_async_context(
            swarm_node(tmp_path / "second", kubo=kubo_binary, direct=False)
        )
        await second.gossip.join(replace(relay.gossip.pages.address(), http=()))
        await until(lambda: second.sees(server, serving=True))
        answer = await second.answers.open(CID, QUESTION, via=relay.key)
        assert (await text_of(answer.deltas), answer.via) == ("the answer", relay.key)
