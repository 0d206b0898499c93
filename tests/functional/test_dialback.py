"""Dialling back over real sockets: who is dialled, what counts as reached, and what strangers may ask and answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from daemon.config import Network
from daemon.errors import Unserved, VerificationError
from daemon.ipfs.interface import Connection
from daemon.listening import listening
from daemon.membership import ClosedSwarm, Membership, OpenSwarm
from daemon.peerapi import dialback
from daemon.peerapi.dialback import PATH, DialBack, Verdict, ask
from daemon.peerapi.ping import Ping
from daemon.peerapi.server import PeerApi, Ports, Route
from daemon.peerapi.ways import Way
from registry.membership import derive

ME = "ed25519:" + "ab" * 32
OTHER = "ed25519:" + "cd" * 32
OPEN = OpenSwarm()
JSON = {"Content-Type": "application/json"}
HOME = "127.0.0.2"  # of a node that asks; the others are at 127.0.0.1


class FakeIpfs:
    """What is asked of an `IpfsNode` here."""

    def __init__(self, *connections: Connection) -> None:
        self._connections = list(connections)

    async def connections(self) -> list[Connection]:
        return self._connections


@asynccontextmanager
async def judge(
    network: Network = "loopback",
    *,
    ipfs: FakeIpfs | None = None,
    membership: Membership = OPEN,
    host: str = "127.0.0.1",
) -> AsyncIterator[Ports]:
    """A node that dials others back."""
    node: Any = ipfs
    async with aiohttp.ClientSession(middlewares=(membership.middleware,)) as http:
        rooms = (DialBack(network, lambda: node, http, membership), Ping(OTHER, membership))
        routes = [route for room in rooms for route in room.routes()]
        async with PeerApi(routes, membership=membership).listening([host], 0) as ports:
            yield ports


@asynccontextmanager
async def peer_api(node: str = ME, *, host: str = HOME, membership: Membership = OPEN) -> AsyncIterator[int]:
    """The port of a peer API that says to be `node`."""
    api = PeerApi(Ping(node, membership).routes(), membership=membership)
    async with api.listening([host], 0) as ports:
        yield ports.direct


class Listener(asyncio.Protocol):
    """Says something to whoever connects, and counts them."""

    def __init__(self, says: bytes = b"") -> None:
        self.says = says
        self.came = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.came += 1
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.says)


@asynccontextmanager
async def listener(says: bytes = b"", *, host: str = HOME, port: int = 0) -> AsyncIterator[tuple[Listener, int]]:
    heard = Listener(says)
    async with listening(lambda: heard, host, port, backlog=16) as bound:
        yield heard, bound


def session(host: str = HOME, *, membership: Membership = OPEN) -> aiohttp.ClientSession:
    """A client whose address is `host`."""
    connector = aiohttp.TCPConnector(local_addr=(host, 0))
    return aiohttp.ClientSession(connector=connector, middlewares=(membership.middleware,))


def question(ports: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"node": ME, "ports": ports, **more}).encode()


async def answered(at: Ports, ports: dict[str, Any], *, host: str = HOME, **more: Any) -> dict[str, Any]:
    """The verdict of the judge at `at` about a node whose address is `host`."""
    url = f"http://127.0.0.1:{at.direct}{PATH}"
    async with session(host) as http, http.post(url, data=question(ports, **more), headers=JSON) as response:
        assert response.status == 200, await response.text()
        verdict: dict[str, Any] = await response.json()
        return verdict


async def through_stream(at: Ports, source: str, ports: dict[str, int]) -> dict[str, Any]:
    """The same about whoever comes through Kubo or a relay, as the first line says."""
    reader, writer = await asyncio.open_connection("127.0.0.1", at.streams)
    body = question(ports)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(f"{source}\n{head}".encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    header, _, data = answer.partition(b"\r\n\r\n")
    assert header.startswith(b"HTTP/1.1 200"), answer
    verdict: dict[str, Any] = json.loads(data)
    return verdict


NO_OPINION: dict[str, Any] = {"address": None, "port": None, "reached": []}
MULTISTREAM = b"\x13/multistream/1.0.0\n"


# -- who is dialled, and what counts ------------------------------------------------------------------------------------


async def test_each_part_is_reached_by_what_it_speaks() -> None:
    async with judge() as at, peer_api() as http, listener(MULTISTREAM) as (_, ipfs), listener() as (_, torrent):
        verdict = await answered(at, {"http": http, "ipfs": ipfs, "bittorrent": torrent})
    assert verdict["address"] == HOME
    assert set(verdict["reached"]) == {"http", "ipfs", "bittorrent"}


async def test_only_the_address_that_the_question_comes_from_is_dialled() -> None:
    """Nobody is made to knock at a third party's door, whatever the question says."""
    async with judge() as at, listener(host="127.0.0.3") as (third, port), listener(port=port) as (own, _):
        named = {"address": "127.0.0.3", "ip": "127.0.0.3", "url": f"http://127.0.0.3:{port}"}
        verdict = await answered(at, {"bittorrent": port}, **named)
        assert (verdict["address"], verdict["reached"]) == (HOME, ["bittorrent"])
        assert (third.came, own.came) == (0, 1)


async def test_a_forwarded_address_is_not_believed() -> None:
    async with judge() as at, listener(host="127.0.0.3") as (third, port), session() as http:
        told = {"X-Forwarded-For": "127.0.0.3", "Forwarded": "for=127.0.0.3", "X-Real-IP": "127.0.0.3", "Host": "127.0.0.3"}
        url = f"http://127.0.0.1:{at.direct}{PATH}"
        async with http.post(url, data=question({"bittorrent": port}), headers={**JSON, **told}) as response:
            assert (await response.json())["address"] == HOME
        assert third.came == 0


@pytest.mark.parametrize("source", ["10.0.0.1", "192.168.1.1", "8.8.8.8", "::1", "0.0.0.0", "224.0.0.1"])
async def test_a_node_of_the_loopback_dials_nobody_beyond_it(source: str) -> None:
    async with judge() as at:
        assert await through_stream(at, source, {"http": 80, "bittorrent": 81}) == NO_OPINION


@pytest.mark.parametrize("network", ["public", "lan"])
async def test_a_public_node_dials_nobody_inwards(network: Network) -> None:
    async with judge(network) as at, peer_api() as http, listener() as (own, torrent):
        verdict = await answered(at, {"http": http, "bittorrent": torrent})
        if network == "public":
            assert (verdict, own.came) == (NO_OPINION, 0)
        else:  # several nodes of a LAN may be on one machine
            assert set(verdict["reached"]) == {"http", "bittorrent"}


@pytest.mark.parametrize("source", ["10.0.0.1", "192.168.1.1", "127.0.0.1", "::ffff:127.0.0.1", "fd00::1", "169.254.1.1", "100.64.0.1"])
async def test_a_public_node_has_no_opinion_about_private_sources(source: str) -> None:
    async with judge("public") as at:
        assert await through_stream(at, source, {"bittorrent": at.direct}) == NO_OPINION


async def test_the_peer_api_of_another_node_does_not_count() -> None:
    async with judge() as at, peer_api(OTHER) as http:
        assert (await answered(at, {"http": http}))["reached"] == []


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 64 + MULTISTREAM, b"SSH-2.0-OpenSSH\r\n"])
async def test_libp2p_needs_multistream(says: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a port that takes the connection and stays silent: the judge does not wait for ever."""
    monkeypatch.setattr(dialback, "_DIAL_S", 0.3)
    async with judge() as at, listener(says) as (heard, port):
        assert (await answered(at, {"ipfs": port, "http": port}))["reached"] == []
        assert heard.came == 2


async def test_a_closed_port_is_not_reached() -> None:
    async with judge() as at:
        async with listener() as (_, port):
            pass
        assert (await answered(at, {"http": port, "ipfs": port, "bittorrent": port}))["reached"] == []


async def misbehaving(request: web.Request) -> web.StreamResponse:
    """A ping that leads elsewhere, or never ends."""
    match request.app[_HOW]:
        case "redirect":
            raise web.HTTPFound(request.app[_TO])
        case "html":
            return web.Response(text="<html>a router's page</html>", content_type="text/html")
        case "list":
            return web.json_response([ME])
        case "endless":
            response = web.StreamResponse()
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                while True:
                    await response.write(b"x" * 65536)
            return response
    await asyncio.Event().wait()
    raise AssertionError


_HOW: web.AppKey[str] = web.AppKey("how", str)
_TO: web.AppKey[str] = web.AppKey("to", str)


@asynccontextmanager
async def web_server(
    handler: Callable[[web.Request], Any], *, host: str = HOME, how: str = "", to: str = ""
) -> AsyncIterator[int]:
    app = web.Application()
    app[_HOW], app[_TO] = how, to
    app.router.add_route("*", "/{anything:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, 0)
        await site.start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("how", ["redirect", "html", "list", "endless", "silent"])
async def test_what_is_no_peer_api_is_not_reached(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialback, "_DIAL_S", 0.5)
    async with judge() as at, peer_api(host="127.0.0.3") as inward:
        to = f"http://127.0.0.3:{inward}/swarm/1/ping"
        async with web_server(misbehaving, how=how, to=to) as port:
            assert (await answered(at, {"http": port}))["reached"] == []


# -- where a question comes from ----------------------------------------------------------------------------------------

PEER = "12D3KooWAsker"


async def test_a_libp2p_peer_is_dialled_at_the_address_of_its_connection() -> None:
    direct = Connection(PEER, f"/ip4/{HOME}/tcp/4001", inbound=True, relayed=False)
    other = Connection("12D3KooWOther", "/ip4/127.0.0.9/tcp/4001", inbound=True, relayed=False)
    async with judge(ipfs=FakeIpfs(other, direct)) as at, listener() as (heard, port):
        verdict = await through_stream(at, PEER, {"bittorrent": port})
        assert (verdict["address"], verdict["reached"], heard.came) == (HOME, ["bittorrent"], 1)
        # Which port the NAT shows of a libp2p connection is not seen on the stream.
        assert verdict["port"] is None


RELAYED = Connection(PEER, f"/ip4/{HOME}/tcp/4001", inbound=True, relayed=True)
INWARDS = Connection(PEER, "/ip4/192.168.1.7/tcp/4001", inbound=True, relayed=False)


@pytest.mark.parametrize("source", [PEER, f"relay:{ME}", "", "nonsense"])
@pytest.mark.parametrize("ipfs", [None, FakeIpfs(), FakeIpfs(RELAYED), FakeIpfs(INWARDS)])
async def test_whoever_comes_over_a_relay_or_is_not_known_gets_no_opinion(source: str, ipfs: FakeIpfs | None) -> None:
    async with judge(ipfs=ipfs) as at, listener() as (heard, port):
        assert await through_stream(at, source, {"bittorrent": port}) == NO_OPINION
        assert heard.came == 0


async def test_the_real_local_port_is_compared_with_the_one_that_is_seen() -> None:
    """Over plain HTTP with no NAT between they are equal; each question leaves from a port of its own."""
    async with judge() as at:
        way = Way(f"http://127.0.0.1:{at.direct}")
        first, left_from = await ask(way, ME, {}, membership=OPEN)
        second, then_from = await ask(way, ME, {}, membership=OPEN)
    assert first == Verdict("127.0.0.1", left_from, frozenset())
    assert second == Verdict("127.0.0.1", then_from, frozenset())
    assert left_from is not None and left_from != then_from


# -- bad questions ------------------------------------------------------------------------------------------------------

BAD_QUESTIONS = [
    b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 500, b'{"node":"a","node":"b","ports":{}}',
    b'{"node":"a"}', b'{"ports":{}}', b'{"node":1,"ports":{}}', b'{"node":"a","ports":[]}', b'{"node":"a","ports":null}',
    *(
        json.dumps({"node": ME, "ports": ports}).encode()
        for ports in (
            {"http": 0}, {"http": -1}, {"http": 65536}, {"http": True}, {"http": "80"}, {"http": 80.0}, {"http": None},
            {"http": [80]}, {"ssh": 22}, {"": 80}, {"HTTP": 80}, {"http": 80, "ssh": 22}, {"http": 10**30},
        )
    ),
    json.dumps({"node": "x" * 129, "ports": {}}).encode(),
]  # fmt: skip


async def test_bad_questions_are_named_and_nobody_is_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialback, "Buckets", Always)
    async with judge() as at, session() as http:
        for body in BAD_QUESTIONS:
            async with http.post(f"http://127.0.0.1:{at.direct}{PATH}", data=body, headers=JSON) as response:
                assert response.status == 400, body
                assert "dial-back" in (await response.json())["error"]["message"]
        # The node lives.
        assert (await answered(at, {}))["address"] == HOME


class Always:
    """A rate that nobody exceeds: this is not what is tested."""

    def __init__(self, **options: Any) -> None:
        pass

    def take(self, source: str) -> bool:
        return True


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"x" * (1 << 20), JSON, 413),
        (question({"http": 80}), {"Content-Type": "text/plain"}, 415),
        (question({"http": 80}), {**JSON, "Content-Encoding": "gzip"}, 415),
        (question({"http": 80}), {**JSON, "Origin": "https://evil.example"}, 403),
    ],
)  # fmt: skip
async def test_questions_that_are_not_read(body: bytes, headers: dict[str, str], status: int) -> None:
    async with judge() as at, session() as http:
        url = f"http://127.0.0.1:{at.direct}{PATH}"
        with contextlib.suppress(aiohttp.ClientOSError):  # it has answered and closed before all was sent
            async with http.post(url, data=body, headers=headers) as response:
                assert response.status == status


async def test_one_source_may_ask_now_and_then_only() -> None:
    async with judge() as at, listener() as (heard, port):
        url = f"http://127.0.0.1:{at.direct}{PATH}"
        async with session() as http:
            statuses = []
            for _ in range(8):
                async with http.post(url, data=question({"bittorrent": port}), headers=JSON) as response:
                    statuses.append(response.status)
        assert statuses == [200] * 5 + [429] * 3
        assert heard.came == 5
        # That is nothing to others.
        assert (await answered(at, {}, host="127.0.0.4"))["address"] == "127.0.0.4"


# -- bad verdicts -------------------------------------------------------------------------------------------------------


def verdict(**fields: Any) -> bytes:
    return json.dumps({"address": "127.0.0.1", "port": None, "reached": [], **fields}).encode()


BAD_VERDICTS = [
    b"", b"{}", b"[]", b"nonsense", b"\xff", b'{"address":"127.0.0.1"}', b'{"address":"127.0.0.1","reached":[]}',
    b'{"address":null,"reached":["http"]}', b'{"address":null}', b'{"port":1,"reached":[]}',
    verdict(address=""), verdict(address="localhost"), verdict(address="127.1"), verdict(address=7), verdict(address=["127.0.0.1"]),
    verdict(address="127.0.0.1:80"), verdict(port=0), verdict(port=65536), verdict(port=True), verdict(port="80"), verdict(port=1.0),
    verdict(reached="http"), verdict(reached=["ssh"]), verdict(reached=[1]), verdict(reached=[None]), verdict(reached=[["http"]]),
    verdict(reached=[{}]), verdict(reached={"http": True}), verdict(reached=None), verdict(more="x" * 1100), b"x" * (1 << 20),
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_VERDICTS, ids=range(len(BAD_VERDICTS)))
async def test_bad_verdicts(body: bytes) -> None:
    async def lie(request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    async with web_server(lie, host="127.0.0.1") as port:
        with pytest.raises(VerificationError):
            await ask(Way(f"http://127.0.0.1:{port}"), ME, {"http": 1}, membership=OPEN)


def in_pieces(body: bytes) -> Callable[[web.Request], Any]:
    async def slowly(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(body), 9):
            await response.write(body[start : start + 9])
            await asyncio.sleep(0.01)  # so that each is a segment of its own
        return response

    return slowly


async def test_a_ping_may_be_answered_in_pieces() -> None:
    async with judge() as at, web_server(in_pieces(json.dumps({"node": ME}).encode())) as port:
        assert (await answered(at, {"http": port}))["reached"] == ["http"]


@pytest.mark.parametrize("body", [b'{"address":null,"port":null,"reached":[]}', verdict(port=65535, reached=["http", "ipfs"])])
async def test_a_verdict_may_come_in_pieces(body: bytes) -> None:
    async with web_server(in_pieces(body), host="127.0.0.1") as port:
        found, _ = await ask(Way(f"http://127.0.0.1:{port}"), ME, {}, membership=OPEN)
    assert found.reached == frozenset(json.loads(body)["reached"])


@pytest.mark.parametrize("how", ["redirect", "silent", "endless"])
async def test_a_judge_that_misbehaves_is_no_judge(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialback, "_ASK_S", 0.3)
    async with judge() as at:
        to = f"http://127.0.0.1:{at.direct}{PATH}"
        async with web_server(misbehaving, host="127.0.0.1", how=how, to=to) as port:
            with pytest.raises((Unserved, VerificationError)):
                await ask(Way(f"http://127.0.0.1:{port}"), ME, {}, membership=OPEN)


async def test_a_judge_that_is_gone() -> None:
    async with judge() as at:
        pass
    with pytest.raises(Unserved, match="does not answer"):
        await ask(Way(f"http://127.0.0.1:{at.direct}"), ME, {}, membership=OPEN)


# -- in a closed swarm --------------------------------------------------------------------------------------------------

LAB = derive("the lab", "correct horse battery staple")
BAR = derive("the lab", "another horse battery staple")


def member(node: str, keys: Any = LAB) -> ClosedSwarm:
    return ClosedSwarm(keys, node=node, clock=time.time)


async def seen(at: Ports, own: Membership, ports: dict[str, int]) -> Verdict:
    found, _ = await ask(Way(f"http://127.0.0.1:{at.direct}", node=OTHER), ME, ports, membership=own)
    return found


async def test_members_dial_each_other_back() -> None:
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(judge(membership=member(OTHER)))
        port = await stack.enter_async_context(peer_api(host="127.0.0.1", membership=member(ME)))
        assert (await seen(at, member(ME), {"http": port})).reached == {"http"}
        # What listens there is no member.
        stranger = await stack.enter_async_context(peer_api(host="127.0.0.1"))
        assert (await seen(at, member(ME), {"http": stranger})).reached == frozenset()


@pytest.mark.parametrize("own", [OPEN, member(ME, BAR)])
async def test_strangers_are_not_dialled_back(own: Membership) -> None:
    async with judge(membership=member(OTHER)) as at, listener(host="127.0.0.1") as (heard, port):
        with pytest.raises(Unserved, match="404"):
            await seen(at, own, {"bittorrent": port})
        assert heard.came == 0


async def test_a_question_in_the_clear_and_a_verdict_in_the_clear_are_refused() -> None:
    """Also between members: a body that is not sealed was written by somebody else."""
    own = member(ME)
    sent: list[bytes] = []

    async def clear(request: web.Request) -> web.Response:
        sent.append(await request.read())
        return web.Response(body=verdict(reached=["http"]), content_type="application/octet-stream")

    async with judge(membership=member(OTHER)) as at, session(membership=own) as http:
        url = f"http://127.0.0.1:{at.direct}{PATH}"
        headers = {"Content-Type": "application/octet-stream", **Way("", node=OTHER).headers}
        async with http.post(url, data=question({"http": 80}), headers=headers) as response:
            assert response.status == 400
    async with web_server(clear, host="127.0.0.1") as port:
        with pytest.raises(VerificationError):
            await ask(Way(f"http://127.0.0.1:{port}", node=OTHER), ME, {"http": 80}, membership=own)
    assert sent and ME.encode() not in sent[0] and b"http" not in sent[0]


def test_the_routes() -> None:
    nothing: Any = None
    routes: Sequence[Route] = DialBack("public", lambda: None, nothing, OPEN).routes()
    assert [(route.method, route.path) for route in routes] == [("POST", "/swarm/1/dialback")]
