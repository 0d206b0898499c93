"""A closed swarm on real sockets and real Kubo: members find and ask each other, strangers see an empty web server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.engine.interface import ChatRequest
from daemon.errors import NotFound, SwarmError, Unserved
from daemon.ipfs.interface import IpfsNode
from daemon.membership import ClosedSwarm, Membership, OpenSwarm
from daemon.peerapi.ping import ping
from daemon.peerapi.server import PeerApi, Route
from daemon.transfer.objects import Objects
from registry import announcement
from registry.cid import leaf_cid
from registry.envelope import key_name, sign
from registry.membership import derive
from registry.records import Address, Announcement
from tests.functional import nodes as daemons
from tests.functional.swarm_nodes import CID, Node, Script, swarm_node, text_of, until
from tests.unit.gguf_files import tiny_gguf

LAB = derive("the lab", "correct horse battery staple")
BAR = derive("the lab", "another horse battery staple")
QUESTION = ChatRequest(({"role": "user", "content": "a very private prompt"},))
MANIFEST = b"a manifest of a private model"


def a_node(home: Path, keys: Any, *, clock: Callable[[], float] = time.time, **options: Any) -> Any:
    """A swarm node of the closed swarm with those keys, of the open one for None."""
    key = Ed25519PrivateKey.generate()
    swarm: Membership = OpenSwarm()
    if keys is not None:
        swarm = ClosedSwarm(keys, node=key_name(key), clock=clock)
    return swarm_node(home, key=key, clock=clock, membership=swarm, **options)


def nodes(node: Node) -> set[str]:
    """Everybody that a node knows of."""
    return {peer.node for peer in node.table.remembered()}


# -- members ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over_ipfs", [True, False])
async def test_members_find_list_and_ask_each_other(tmp_path: Path, kubo_binary: Path, over_ipfs: bool) -> None:
    kubo = kubo_binary if over_ipfs else None
    async with (
        a_node(tmp_path / "a", LAB, kubo=kubo, direct=not over_ipfs) as a,
        a_node(tmp_path / "b", LAB, kubo=kubo, direct=not over_ipfs) as b,
    ):
        a.serves(Script(("a ", "reply")))
        a.objects[leaf_cid(MANIFEST)] = MANIFEST
        assert (await b.gossip.join(a.gossip.pages.address())).node == a.key
        await until(lambda: b.sees(a, serving=True))
        answer = await b.answers.open(CID, QUESTION)
        assert answer.answered_by == a.key
        assert await text_of(answer.deltas) == "a reply"
        objects = Objects(lambda: None, b.ways, b.http, b.membership)
        holder = b.table.peer(a.key)
        assert holder is not None
        assert await objects.get(leaf_cid(MANIFEST), [holder], limit=1000) == MANIFEST
        # What comes later comes by the way that both keep: pubsub, or HTTP.
        a.serves(Script(), leaf_cid(b"another"), "another")
        await until(lambda: any(offer.name == "another" for offer in b.table.offers()))


async def test_a_member_whose_key_is_not_known_yet_is_found(tmp_path: Path) -> None:
    async with a_node(tmp_path / "a", LAB) as a, a_node(tmp_path / "b", LAB) as b:
        assert (await b.gossip.join(Address("", http=(a.url,)))).node == a.key
        await until(lambda: nodes(a) == {b.key})


async def test_a_web_socket_takes_the_same_door() -> None:
    """aiohttp's client middleware runs for `ws_connect`, too: what relays hang on."""

    async def echo(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_bytes(await socket.receive_bytes())
        await socket.close()
        return socket

    swarm = ClosedSwarm(LAB, node="ed25519:me", clock=time.time)
    api = PeerApi([Route("GET", "/echo", echo)], membership=swarm)
    async with api.listening(["127.0.0.1"], 0) as ports:
        url = f"http://127.0.0.1:{ports.direct}/echo"
        member = aiohttp.ClientSession(middlewares=(swarm.middleware,))
        async with member, member.ws_connect(url, headers={"Swarm-Asked": "ed25519:me"}) as socket:
            await socket.send_bytes(b"hello")
            assert await socket.receive_bytes() == b"hello"
        async with aiohttp.ClientSession() as stranger:
            with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
                await stranger.ws_connect(url)


async def test_a_member_whose_clock_is_off_is_told_so(tmp_path: Path) -> None:
    """F18 in a closed swarm: to the others this node is a stranger, so only its own words can name the cause."""
    async with (
        a_node(tmp_path / "a", LAB) as a,
        a_node(tmp_path / "b", LAB, clock=lambda: time.time() + 86_400) as b,
    ):
        with pytest.raises(Unserved, match=r"our clock is 864\d\d s ahead of its own"):
            await b.gossip.join(a.gossip.pages.address())
        assert nodes(a) == nodes(b) == set()


# -- strangers ----------------------------------------------------------------------------------------------------------

REQUESTS = [
    "GET / HTTP/1.1",
    "GET /swarm/1/ping HTTP/1.1",
    "GET /swarm/1/announce HTTP/1.1",
    "POST /swarm/1/announce HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 0",
    "POST /swarm/1/chat HTTP/1.1\r\nContent-Length: 0",
    "POST /swarm/1/dialback HTTP/1.1\r\nContent-Length: 0",
    f"GET /swarm/1/object/{leaf_cid(MANIFEST)} HTTP/1.1",
    "GET /swarm/1/object/..%2f..%2fnode.key HTTP/1.1",
    "PUT /swarm/1/ping HTTP/1.1\r\nContent-Length: 0",
    "GET /api/status HTTP/1.1",
    "GET /swarm/1/ping HTTP/1.1\r\nOrigin: https://evil.example",
    "GET /swarm/1/ping HTTP/1.1\r\nAuthorization: Bearer " + "A" * 75,
    "GET /swarm/1/ping HTTP/1.1\r\nAuthorization: Basic eDp5",
    "GET /swarm/1/ping HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
    "\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
]


async def raw(port: int, request: bytes) -> bytes:
    """The first response on a new connection, byte for byte, less its date."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            size = re.search(rb"Content-Length: (\d+)", head)
            body = await reader.readexactly(int(size[1])) if size else b""
    finally:
        writer.close()
    return re.sub(rb"Date: [^\r]*\r\n", b"", head) + body


def port_of(node: Node) -> int:
    return int(node.url.rpartition(":")[2])


async def test_to_a_stranger_every_path_is_the_same_empty_server(tmp_path: Path) -> None:
    async with a_node(tmp_path / "a", LAB) as a:
        a.objects[leaf_cid(MANIFEST)] = MANIFEST
        answers = {
            await raw(port_of(a), f"{request}\r\nHost: x\r\n\r\n".encode()) for request in REQUESTS
        }
    assert answers == {
        b"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Content-Length: 14\r\n\r\n404: Not Found"
    }


async def test_a_stranger_that_sends_a_large_body_is_not_read(tmp_path: Path) -> None:
    async with a_node(tmp_path / "a", LAB) as a:
        head = b"POST /swarm/1/announce HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
        assert (await raw(port_of(a), head + b"x" * 1000)).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("keys", [None, BAR], ids=["the open swarm", "another secret"])
async def test_neither_joins_the_other(tmp_path: Path, keys: Any) -> None:
    async with a_node(tmp_path / "a", LAB) as a, a_node(tmp_path / "s", keys) as stranger:
        a.serves(Script())
        stranger.serves(Script())
        for one, other in ((stranger, a), (a, stranger)):
            for address in (other.gossip.pages.address(), Address("", http=(other.url,))):
                with pytest.raises(SwarmError) as failed:
                    await one.gossip.join(address)
                assert failed.value.exit_code in (4, 5)
                assert "no node of this swarm" in failed.value.why
        assert nodes(a) == nodes(stranger) == set()
        # Even a true page of a stranger, sent with all proofs but that of membership, is not heard.
        body = {"envelopes": [page.decode() for page in await stranger.gossip.own_news(0, ())]}
        async with aiohttp.ClientSession() as plain:
            async with plain.post(a.url + "/swarm/1/announce", json=body) as response:
                assert response.status == 404
        assert nodes(a) == set()


async def test_on_one_network_strangers_and_members_do_not_meet(tmp_path: Path, kubo_binary: Path) -> None:
    """Four Kubos that know each other: two members, two nodes of the open swarm. Each pair hears itself alone."""
    async with AsyncExitStack() as stack:

        async def node(name: str, keys: Any) -> Node:
            made = a_node(tmp_path / name, keys, kubo=kubo_binary, direct=False)
            found: Node = await stack.enter_async_context(made)
            return found

        a, b = await node("a", LAB), await node("b", LAB)
        s, t = await node("s", None), await node("t", None)
        for stranger in (s, t):
            for member in (a, b):
                address = member.gossip.pages.address()
                await ipfs_of(stranger).connect(address.ipfs[0], deadline_s=10)
        for member in (a, b):
            member.serves(Script())
        s.serves(Script())
        await b.gossip.join(a.gossip.pages.address())
        await t.gossip.join(s.gossip.pages.address())
        recorded = await overheard(ipfs_of(s), a.membership.topic, a)

        # All that a stranger can do: join, knock with the open protocol and the one that libp2p shows, write to the topic.
        with pytest.raises(SwarmError):
            await s.gossip.join(a.gossip.pages.address())
        peer_id = (await ipfs_of(a).identity()).peer_id
        assert await knock(s, peer_id, a.membership.protocol) == {404}
        with pytest.raises((SwarmError, aiohttp.ClientError)):
            await knock(s, peer_id, OpenSwarm.protocol)
        forged = await a_page(s)
        for message in (forged, recorded[:-1] + b"x", b"", b"x" * 20_000, recorded):
            await ipfs_of(s).publish(a.membership.topic, message)

        # Later news arrive on both sides, behind all that was written.
        for speaker, hearer in ((a, b), (s, t)):
            speaker.serves(Script(), leaf_cid(b"news"), "news")
            await until(lambda hearer=hearer: any(offer.name == "news" for offer in hearer.table.offers()))
        assert nodes(a) == {b.key} and nodes(b) == {a.key}
        assert nodes(s) == {t.key} and nodes(t) == {s.key}
        for word in (a.key.encode(), b"a model", b"payload", b"swarmctl"):
            assert word not in recorded
        for one in (a, b, s, t):
            assert not any(loop.state == "crashed" for loop in one.supervisor.state().values())


def ipfs_of(node: Node) -> IpfsNode:
    assert node.ipfs is not None
    return node.ipfs


async def overheard(ipfs: IpfsNode, topic: str, speaker: Node) -> bytes:
    """A message that a stranger hears on the topic of a closed swarm, once somebody has told him the topic."""
    async with contextlib.aclosing(aiter_of(ipfs, topic)) as messages:
        hearing = asyncio.ensure_future(anext(messages))
        while not hearing.done():
            speaker.gossip.changed()
            await asyncio.wait({hearing}, timeout=0.5)
        return await hearing


async def aiter_of(ipfs: IpfsNode, topic: str) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(ipfs.subscribe(topic)) as messages:  # type: ignore[type-var] # it is a generator
        async for message in messages:
            yield message.data


async def knock(stranger: Node, peer_id: str, protocol: str) -> set[int]:
    statuses = set()
    async with (
        ipfs_of(stranger).dial(protocol, peer_id) as (host, port),
        aiohttp.ClientSession() as plain,
    ):
        for path in ("/swarm/1/ping", "/"):
            async with plain.get(f"http://{host}:{port}{path}") as response:
                statuses.add(response.status)
    return statuses


async def a_page(node: Node) -> bytes:
    """A signed page of somebody who is in no swarm yet, in the clear."""
    key = Ed25519PrivateKey.generate()
    page = Announcement(key_name(key), None, 1, int(time.time()) + 60, Address(key_name(key)), (), ())
    return sign(announcement.PAYLOAD_TYPE, announcement.build(page), key)


# -- who lies on the line between two members -----------------------------------------------------------------------------


class Line:
    """A TCP line to a port, recorded: what was sent to it on each connection, and everything in both directions."""

    def __init__(self, port: int) -> None:
        self.requests: list[bytearray] = []
        self.seen = bytearray()
        self._to = port

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = bytearray()
        self.requests.append(request)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        await asyncio.gather(
            self._carry(reader, far_writer, request), self._carry(far_reader, writer, bytearray())
        )

    async def _carry(self, near: asyncio.StreamReader, far: asyncio.StreamWriter, kept: bytearray) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await near.read(65536):
                kept += data
                self.seen += data
                far.write(data)
                await far.drain()
        far.close()


async def test_a_replayed_request_is_a_strangers(tmp_path: Path) -> None:
    """R34: to the node that it was for, and to another member; and what was on the line tells nobody who they are."""
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(a_node(tmp_path / "a", LAB))
        b = await stack.enter_async_context(a_node(tmp_path / "b", LAB))
        c = await stack.enter_async_context(a_node(tmp_path / "c", LAB))
        a.serves(Script(("a ", "confidential ", "reply")))
        a.objects[leaf_cid(MANIFEST)] = MANIFEST
        c.objects[leaf_cid(MANIFEST)] = MANIFEST
        await b.gossip.join(a.gossip.pages.address())
        peer = b.table.peer(a.key)
        assert peer is not None

        line = Line(port_of(a))
        url = await stack.enter_async_context(line.open())
        through = replace(peer, address=Address(a.key, http=(url,)))
        assert await ping(b.http, url, membership=b.membership, node=a.key, deadline_s=5) == a.key
        await b.gossip.meeting.tell(through, await b.gossip.own_news(0, ()))
        objects = Objects(lambda: None, b.ways, b.http, b.membership)
        assert await objects.get(leaf_cid(MANIFEST), [through], limit=1000) == MANIFEST

        requests = [bytes(b"GET " + one) for kept in line.requests for one in bytes(kept).split(b"GET ")[1:]]
        posts = [bytes(b"POST " + one) for kept in line.requests for one in bytes(kept).split(b"POST ")[1:]]
        assert any(b"/swarm/1/ping" in one for one in requests)
        assert any(b"/swarm/1/object/" in one for one in requests)
        assert any(b"/swarm/1/announce" in one for one in posts)
        for request in (*requests, *posts):
            for victim in (a, c):
                assert (await raw(port_of(victim), request)).startswith(b"HTTP/1.1 404 "), request[:60]
        assert nodes(c) == set()
        for node in (a, b):
            assert node.key.encode() not in line.seen
        for word in (b"manifest", b"a model", b"envelopes", b"payload"):
            assert word not in line.seen


async def test_what_comes_back_from_elsewhere_is_no_members_word(tmp_path: Path) -> None:
    """A stranger that answers in a member's place, with what is right in the open swarm."""

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"node": node})

    async with AsyncExitStack() as stack:
        b = await stack.enter_async_context(a_node(tmp_path / "b", LAB))
        node = b.key
        api = PeerApi([Route("GET", "/swarm/1/ping", answer)], membership=OpenSwarm())
        ports = await stack.enter_async_context(api.listening(["127.0.0.1"], 0))
        with pytest.raises(SwarmError, match="no node"):
            await b.gossip.join(Address("", http=(f"http://127.0.0.1:{ports.direct}",)))


async def test_nobody_else_answers_for_a_model_of_the_swarm(tmp_path: Path) -> None:
    async with a_node(tmp_path / "a", LAB) as a, a_node(tmp_path / "s", None) as stranger:
        a.serves(Script())
        stranger.serves(Script(), leaf_cid(b"elsewhere"))
        with pytest.raises(NotFound):
            await stranger.answers.open(CID, QUESTION)
        with pytest.raises(NotFound):
            await a.answers.open(leaf_cid(b"elsewhere"), QUESTION)


# -- whole daemons ------------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path, kubo_binary: Path) -> Iterator[Callable[[str], daemons.Node]]:
    yield from daemons.nodes(tmp_path, kubo_binary)


def test_daemons_of_a_closed_swarm_share_a_model_and_keep_the_secret(
    daemon: Callable[[str], daemons.Node], tmp_path: Path
) -> None:
    secret = "Kd8vN2xQ-not-to-be-seen"
    a, b, stranger = daemon("a"), daemon("b"), daemon("stranger")
    a.home.mkdir()
    (a.home / "config.toml").write_text(f"[swarm]\nname = 'the lab'\nsecret = '{secret}'\n")
    b.environment |= {"SWARMCTL_SWARM_NAME": "the lab", "SWARMCTL_SWARM_SECRET": secret}
    for node in (a, b, stranger):
        node.up()
    code = a.run("publish", str(tiny_gguf(tmp_path / "tiny.gguf", 1 << 20)))["code"]
    b.join(a)
    assert daemons.until(lambda: b.run("models"), "the model of the other member")[0]["code"] == code
    b.run("pull", code)
    assert b.blobs() == a.blobs()

    refused = stranger.fails("join", a.status["addresses"][0])
    assert refused.code in (4, 5)
    assert stranger.run("models") == stranger.run("peers") == []
    assert [peer["node"] for peer in a.run("peers")] == [b.status["node"]]

    for node in (a, b):
        said = json.dumps([node.run("status"), node.run("peers"), node.run("models")])
        log = (node.home.parent / f"{node.home.name}.log").read_text()
        kept = [path.read_bytes() for path in node.home.rglob("*") if path.is_file() and path.name != "config.toml"]
        assert secret not in said + log and not any(secret.encode() in data for data in kept)
        for child in psutil.Process(node.status["pid"]).children(recursive=True):
            assert secret not in child.environ().values() and secret not in " ".join(child.cmdline())

    # A member that leaves the swarm takes nobody along.
    a.stop()
    os.remove(a.home / "config.toml")
    a.up()
    assert a.run("peers") == []
    assert a.fails("join", b.status["addresses"][0]).code in (4, 5)
