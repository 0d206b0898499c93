"""Rendezvous: finding others among lies on real sockets, and being found. Only the DHTs are stand-ins."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from daemon.config import Network
from daemon.errors import Ambiguous, Unavailable, Unserved
from daemon.gossip import rendezvous as under_test
from daemon.gossip import searching
from daemon.gossip.meeting import Meeting
from daemon.gossip.rendezvous import AGAIN_S, MAX_KEYS, Rendezvous
from daemon.gossip.searching import AT_ONCE, MAX_TRIED, Pool
from daemon.ipfs.interface import Provider
from daemon.listening import listening
from daemon.membership import OpenSwarm
from registry import codes
from registry.cid import leaf_cid
from registry.errors import Malformed
from registry.records import Address, Offer
from tests.functional.swarm_nodes import CID, Script, swarm_node, until

OPEN = OpenSwarm()
CODE = codes.short(codes.code_of_cid(CID))
ME = "ed25519:" + "ab" * 32
PEER = "12D3KooWBDwqRrD2eQ6nYZpzQYvRb3vZKWXQ3iqBZtRZbEgrhuwW"
V2 = "4" * 64
Named = tuple[str, int]


class FakeDht:
    """A `BitTorrentDht` that says what the test put in. It can stay silent, or close."""

    enabled = True

    def __init__(self, named: Iterable[Named] = (), *, silent: bool = False) -> None:
        self.named = list(named)
        self.silent = silent
        self.closes = False
        self.asked: list[bytes] = []
        self.searching = 0
        self.announced: list[tuple[bytes, int]] = []

    async def announce(self, key: bytes, port: int) -> None:
        self.announced.append((key, port))

    async def find(self, key: bytes, *, deadline_s: float) -> AsyncIterator[Named]:
        self.asked.append(key)
        self.searching += 1
        try:
            for one in self.named:
                yield one
            if self.closes:
                raise Unavailable("the BitTorrent DHT", "the session is closing")
            if self.silent:
                await asyncio.Event().wait()
        finally:
            self.searching -= 1


class FakeIpfs:
    """What is asked of an `IpfsNode` here."""

    def __init__(self, *named: Provider) -> None:
        self.named = named
        self.asked: list[str] = []
        self.pinned: dict[str, bytes] = {}
        self.told: list[bytes] = []
        self.unreachable = False
        self.gone = False

    async def provide(self, block: bytes, *, deadline_s: float) -> str:
        self.told.append(block)
        if self.unreachable:
            raise Unserved("IPFS", "nobody could be told")
        self.pinned[leaf_cid(block)] = block
        return leaf_cid(block)

    async def unprovide(self, cid: str) -> None:
        del self.pinned[cid]

    async def providers(self, cid: str, *, limit: int, deadline_s: float) -> AsyncIterator[Provider]:
        self.asked.append(cid)
        for one in self.named:
            yield one
        if self.gone:
            raise Unavailable("IPFS", "it is gone")


class FakeMeeting:
    """Notes who is met, and how many at once. Whoever is not in `there` is not there; with `hangs` nobody answers."""

    def __init__(self, *there: str, hangs: bool = False) -> None:
        self.there = there
        self.hangs = hangs
        self.met: list[Address] = []
        self.codes: set[tuple[str, ...]] = set()
        self.found = False
        self.now = self.most = 0

    async def meet(self, address: Address, *, codes: Sequence[str], deadline_s: float) -> None:
        self.met.append(address)
        self.codes.add(tuple(codes))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await (asyncio.Event().wait() if self.hangs else asyncio.sleep(0))
            if not set(self.there) & {*address.http, *address.ipfs}:
                raise Unserved("peer", "nothing answers there")
            self.found = True
        finally:
            self.now -= 1

    def urls(self) -> list[str]:
        return [url for address in self.met for url in address.http]


class World:
    """What a `Rendezvous` asks about its own node."""

    def __init__(self) -> None:
        self.offers: list[Offer] = []
        self.carried: list[str] = []
        self.port: int | None = 8788
        self.external: tuple[str, ...] = ()

    def rendezvous(
        self,
        meeting: FakeMeeting | Meeting | None = None,
        *,
        dht: FakeDht | None = None,
        ipfs: FakeIpfs | None = None,
        network: Network = "loopback",
        enabled: bool = True,
    ) -> Rendezvous:
        node: Any = ipfs
        met: Any = meeting or FakeMeeting()
        return Rendezvous(
            OPEN,
            met,
            network=network,
            dht=dht,
            ipfs=lambda: node,
            offers=lambda: self.offers,
            carried=lambda: self.carried,
            port=lambda: self.port,
            external=lambda: self.external,
            enabled=enabled,
        )


def never() -> bool:
    return False


@asynccontextmanager
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() == before


# -- one honest address among lies, on real sockets ---------------------------------------------------------------------


class Silent(asyncio.Protocol):
    """Takes a connection and says nothing."""


async def html(request: web.Request) -> web.StreamResponse:
    return web.Response(text="<html>a router</html>", content_type="text/html")


async def endless(request: web.Request) -> web.StreamResponse:
    """A gigabyte, and more."""
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(b" " * 65536)
    return response


def liar(node: str) -> Callable[[web.Request], Any]:
    """Says that it is a node, and answers exchanges with a gigabyte."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return await endless(request) if request.method == "POST" else web.json_response({"node": node})

    return answer


def redirect(to: str) -> Callable[[web.Request], Any]:
    async def answer(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect(to + request.path)

    return answer


@asynccontextmanager
async def served(handler: Callable[[web.Request], Any]) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_route("*", "/{anything:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def closed_ports(stack: AsyncExitStack, count: int) -> list[int]:
    """Ports that nobody listens on, as long as the stack lives."""
    ports = []
    for _ in range(count):
        bound = stack.enter_context(socket.socket())
        bound.bind(("127.0.0.1", 0))
        ports.append(bound.getsockname()[1])
    return ports


class Counting:
    """Every request that comes to it."""

    def __init__(self) -> None:
        self.came = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.came += 1
        return web.Response(text="an inward service")


async def lies(stack: AsyncExitStack, inward: Counting) -> list[Named]:
    """Ports of liars of each kind."""
    inside = await stack.enter_async_context(served(inward.handle))
    handlers = [html, endless, liar(ME), redirect(f"http://127.0.0.1:{inside}")]
    ports = [await stack.enter_async_context(served(one)) for one in handlers for _ in range(5)]
    for _ in range(10):
        ports.append(await stack.enter_async_context(listening(Silent, "127.0.0.1", 0)))
    ports += closed_ports(stack, 200)
    return [("127.0.0.1", port) for port in ports]


async def test_one_honest_address_among_a_thousand_lies_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "_MEET_S", 1.0)
    inward = Counting()
    async with no_task_is_left(), AsyncExitStack() as stack:
        honest = await stack.enter_async_context(swarm_node(tmp_path / "honest"))
        new = await stack.enter_async_context(swarm_node(tmp_path / "new"))
        honest.serves(Script())
        named = await lies(stack, inward)
        named.append(("127.0.0.1", int(honest.url.rpartition(":")[2])))
        named += [("127.0.0.9", port) for port in range(1, 1001 - len(named))]
        dht = FakeDht(named)
        seeker = World().rendezvous(new.gossip.meeting, dht=dht)
        await seeker.search(CODE, lambda: new.sees(honest, serving=True))
        assert new.sees(honest, serving=True)
        assert {peer.node for peer in new.table.remembered()} == {honest.key}
        assert dht.asked == [OPEN.rendezvous_key("code:" + CODE)]
        assert inward.came == 0


async def test_lies_alone_end_the_search_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "_MEET_S", 0.3)
    async with no_task_is_left(), AsyncExitStack() as stack:
        new = await stack.enter_async_context(swarm_node(tmp_path / "new"))
        dht = FakeDht(await lies(stack, Counting()))
        await World().rendezvous(new.gossip.meeting, dht=dht).search(None, never)
        assert new.table.remembered() == []


async def test_who_is_named_by_ipfs_is_met_over_libp2p(tmp_path: Path) -> None:
    """Over the URL-less way; of its addresses those that this network allows."""
    here, there, wild = (f"/ip4/{ip}/tcp/4001/p2p/{PEER}" for ip in ("127.0.0.1", "8.8.8.8", "10.0.0.1"))
    meeting = FakeMeeting()
    ipfs = FakeIpfs(Provider(PEER, (wild, there, here)), Provider("12D3KooWNowhere", (wild,)), Provider("12D3KooWIdAlone", ()))
    await World().rendezvous(meeting, ipfs=ipfs, network="public").search(CODE, never)
    assert ipfs.asked == [leaf_cid(OPEN.rendezvous_block("code:" + CODE))]
    expected = [(there,), ("/p2p/12D3KooWNowhere",), ("/p2p/12D3KooWIdAlone",)]
    assert sorted(address.ipfs for address in meeting.met) == sorted(expected)
    assert meeting.codes == {(CODE,)}


# -- the bounds of a search ---------------------------------------------------------------------------------------------


async def test_a_thousand_addresses_cost_so_many_tries_and_each_is_tried_once() -> None:
    named = [("127.0.0.1", port) for port in range(1, 1001)]
    meeting = FakeMeeting()
    await World().rendezvous(meeting, dht=FakeDht(named + named)).search(None, never)
    assert len(meeting.met) == len(set(meeting.urls())) == MAX_TRIED
    assert set(meeting.urls()) <= {f"http://127.0.0.1:{port}" for port in range(1, 1001)}
    assert meeting.most == AT_ONCE
    assert meeting.codes == {()}


async def test_an_honest_address_that_is_named_last_is_met_whatever_one_host_claims() -> None:
    """By chance it is not: it has a third of the draws while one of the two others has a name left."""
    honest = "http://127.0.0.3:1"
    flood = [(f"127.0.0.{host}", port) for port in range(1, 3001) for host in (1, 2)]
    meeting = FakeMeeting(honest)
    dht = FakeDht([*flood, ("127.0.0.3", 1)])
    await World().rendezvous(meeting, dht=dht).search(None, lambda: meeting.found)
    assert meeting.found and len(meeting.met) <= MAX_TRIED


async def test_names_on_one_network_keep_nobody_of_the_other_from_being_met() -> None:
    flood = [(f"127.0.{net}.{host}", 80) for net in range(8) for host in range(1, 250)]
    meeting = FakeMeeting(f"/p2p/{PEER}")
    ipfs = FakeIpfs(Provider(PEER, ()))
    seeker = World().rendezvous(meeting, dht=FakeDht(flood), ipfs=ipfs)
    await seeker.search(None, lambda: meeting.found)
    assert meeting.found


def http(host: str, port: int) -> Address:
    return Address("", http=(f"http://{host}:{port}",))


def test_a_full_pool_drops_of_those_who_have_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "POOL", 10)
    pool = Pool()
    for number in range(100):
        pool.add(http("[2a01:4f8:1:2::1]" if number % 2 else "[2a01:4f8:1:2::2]", 1 + number))
    honest = [http(f"127.0.0.{host}", 80) for host in range(1, 6)]
    for address in [*honest, *honest]:
        pool.add(address)
    assert len(pool) == 10
    drawn = [pool.draw() for _ in range(10)]
    assert set(honest) < set(drawn) and len(set(drawn)) == 10
    pool.add(honest[0])  # it was drawn
    with pytest.raises(IndexError):
        pool.draw()


INWARDS = ["127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.1.1", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255",
           "::1", "::", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "localhost",
           "example.org", "127.1", "0x7f000001", "8.8.8.8@127.0.0.1", "8.8.8.8:80/x?@127.0.0.1", ""]  # fmt: skip


async def test_nobody_is_sent_inwards() -> None:
    named = [(host, 80) for host in INWARDS]
    meeting = FakeMeeting()
    await World().rendezvous(meeting, dht=FakeDht([*named, ("8.8.8.8", 80)]), network="public").search(None, never)
    assert meeting.urls() == ["http://8.8.8.8:80"]


async def test_no_connection_is_made_inwards(tmp_path: Path) -> None:
    inward = Counting()
    async with swarm_node(tmp_path / "new") as new, served(inward.handle) as port:
        await World().rendezvous(new.gossip.meeting, dht=FakeDht([("127.0.0.1", port)]), network="public").search(None, never)
    assert inward.came == 0


async def test_our_own_address_is_not_met() -> None:
    world, meeting = World(), FakeMeeting()
    world.external, world.port = ("127.0.0.1", "127.0.0.5"), 8788
    named = [("127.0.0.1", 8788), ("127.0.0.5", 8788), ("127.0.0.1", 8789), ("127.0.0.2", 8788)]
    await world.rendezvous(meeting, dht=FakeDht(named)).search(None, never)
    assert sorted(meeting.urls()) == ["http://127.0.0.1:8789", "http://127.0.0.2:8788"]


# -- the end of a search ------------------------------------------------------------------------------------------------


async def test_it_ends_when_what_was_looked_for_is_found() -> None:
    named = [("127.0.0.1", port) for port in range(1, 200)]
    honest = [f"http://127.0.0.1:{port}" for port in range(1, 100)]
    meeting, dht = FakeMeeting(*honest), FakeDht(named, silent=True)
    async with no_task_is_left():
        await World().rendezvous(meeting, dht=dht).search(None, lambda: meeting.found)
    assert len(meeting.met) < 199 and (meeting.now, dht.searching) == (0, 0)


async def test_it_ends_when_what_was_looked_for_is_heard_of_in_another_way() -> None:
    heard = asyncio.Event()
    seeker = World().rendezvous(dht=FakeDht(silent=True))
    async with no_task_is_left():
        search = asyncio.create_task(seeker.search(None, heard.is_set))
        asyncio.get_running_loop().call_later(0.1, heard.set)
        await search


async def test_it_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "SEARCH_S", 0.2)
    meeting, dht = FakeMeeting(hangs=True), FakeDht([("127.0.0.1", 1)], silent=True)
    async with no_task_is_left():
        await World().rendezvous(meeting, dht=dht).search(None, never)
    assert (len(meeting.met), meeting.now, dht.searching) == (1, 0, 0)


async def test_where_there_is_no_dht_it_returns_at_once() -> None:
    off = FakeDht([("127.0.0.1", 1)])
    off.enabled = False
    for dht in (None, off):
        await World().rendezvous(dht=dht).search(None, never)
    assert off.asked == []


async def test_a_network_that_closes_does_not_stop_the_other() -> None:
    dht, ipfs = FakeDht([("127.0.0.1", 1)]), FakeIpfs(Provider(PEER, ()))
    dht.closes = ipfs.gone = True
    meeting = FakeMeeting()
    await World().rendezvous(meeting, dht=dht, ipfs=ipfs).search(None, never)
    assert len(meeting.met) == 2


@pytest.mark.parametrize("what", ["search", "close"])
async def test_it_ends_when_it_is_cancelled(what: str) -> None:
    meeting, dht = FakeMeeting(hangs=True), FakeDht([("127.0.0.1", 1)], silent=True)
    seeker = World().rendezvous(meeting, dht=dht)
    async with no_task_is_left():
        search = asyncio.create_task(seeker.search(None, never))
        await until(lambda: meeting.now == 1)
        if what == "close":
            await seeker.close()
            await seeker.close()
        else:
            search.cancel()
        await asyncio.wait({search})
    assert search.cancelled() == (what == "search")
    assert (meeting.now, dht.searching) == (0, 0)


@pytest.mark.parametrize("ref", ["", "magnet:?xt=nothing", "a\x00b"])
async def test_what_is_no_reference_is_refused(ref: str) -> None:
    dht = FakeDht()
    with pytest.raises(Malformed):
        await World().rendezvous(dht=dht).search(ref, never)
    assert dht.asked == []


@pytest.mark.parametrize(
    ("ref", "what"),
    [
        (None, "swarm"),
        ("a name", "swarm"),
        (CID, "code:" + CODE),
        (CODE, "code:" + CODE),
        ("#" + codes.code_of_cid(CID), "code:" + CODE),
        (f"magnet:?xt=urn:btmh:1220{V2}", "code:" + codes.short(codes.code_of_infohash_v2(V2))),
    ],
)
async def test_what_means_the_same_is_looked_for_under_one_key(ref: str | None, what: str) -> None:
    dht = FakeDht()
    await World().rendezvous(dht=dht).search(ref, never)
    assert dht.asked == [OPEN.rendezvous_key(what)]


# -- several searches for the same --------------------------------------------------------------------------------------


async def test_searches_for_the_same_are_one() -> None:
    meeting, dht = FakeMeeting("http://127.0.0.1:1", hangs=False), FakeDht([("127.0.0.1", 1)], silent=True)
    seeker = World().rendezvous(meeting, dht=dht)
    await asyncio.gather(*(seeker.search(ref, lambda: meeting.found) for ref in (CID, CODE, "#" + CODE)))
    assert len(dht.asked) == len(meeting.met) == 1
    # The next one is a new one.
    meeting.found = False
    await seeker.search(CODE, lambda: meeting.found)
    assert len(dht.asked) == 2


async def test_who_gives_up_does_not_end_the_search_of_another() -> None:
    meeting, dht = FakeMeeting(hangs=True), FakeDht([("127.0.0.1", 1)], silent=True)
    seeker, heard = World().rendezvous(meeting, dht=dht), asyncio.Event()
    async with no_task_is_left():
        first = asyncio.create_task(seeker.search(None, never))
        second = asyncio.create_task(seeker.search(None, heard.is_set))
        await until(lambda: meeting.now == 1)
        first.cancel()
        await asyncio.wait({first})
        assert not second.done() and dht.searching == 1
        heard.set()
        await second
    assert dht.searching == 0


async def test_each_waits_for_what_it_is_after() -> None:
    """Somebody who looks for anybody does not end the search of one who looks for a model by its name."""
    meeting, dht = FakeMeeting(hangs=True), FakeDht([("127.0.0.1", 1)], silent=True)
    seeker, anybody, model = World().rendezvous(meeting, dht=dht), asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(seeker.search(None, anybody.is_set))
    second = asyncio.create_task(seeker.search("a model", model.is_set))
    await until(lambda: meeting.now == 1)
    anybody.set()
    await first
    assert not second.done() and dht.searching == 1
    model.set()
    await second
    assert len(dht.asked) == 1


async def test_a_condition_that_fails_ends_the_wait_of_its_own_caller_alone() -> None:
    """Such as a code that means two models as soon as the second is heard of."""
    meeting, dht = FakeMeeting(hangs=True), FakeDht([("127.0.0.1", 1)], silent=True)
    seeker, heard = World().rendezvous(meeting, dht=dht), asyncio.Event()

    def ambiguous() -> bool:
        if meeting.now:
            raise Ambiguous(CODE, "means 2 models", "use a longer code")
        return False

    first = asyncio.create_task(seeker.search(CODE, ambiguous))
    second = asyncio.create_task(seeker.search(CODE, heard.is_set))
    with pytest.raises(Ambiguous):
        await first
    assert not second.done() and dht.searching == 1
    heard.set()
    await second
    assert dht.searching == 0


async def test_who_comes_after_the_last_has_left_searches_anew() -> None:
    dht = FakeDht(silent=True)
    seeker = World().rendezvous(dht=dht)
    first = asyncio.create_task(seeker.search(None, never))
    await until(lambda: dht.searching == 1)
    first.cancel()
    await asyncio.sleep(0)  # it is leaving now
    heard = asyncio.Event()
    second = asyncio.create_task(seeker.search(None, heard.is_set))
    await until(lambda: len(dht.asked) == 2)
    heard.set()
    await asyncio.wait({first, second})
    assert first.cancelled() and dht.searching == 0


# -- being found --------------------------------------------------------------------------------------------------------


def offer(name: str, *, serving: bool = False, infohash_v2: str | None = None) -> Offer:
    return Offer(ME, leaf_cid(name.encode()), None, infohash_v2, None, name, 9, serving)


def key_of(name: str) -> str:
    return "code:" + codes.short(codes.code_of_cid(leaf_cid(name.encode())))


def key(what: str) -> bytes:
    return OPEN.rendezvous_key(what)


def test_what_is_served_comes_before_what_is_held_and_others_come_last() -> None:
    world = World()
    world.offers = [offer("held"), offer("served", serving=True, infohash_v2=V2)]
    world.carried = [codes.short(codes.code_of_cid(leaf_cid(b"carried"))), codes.code_of_cid(leaf_cid(b"held"))]
    both = "code:" + codes.short(codes.code_of_infohash_v2(V2))
    found = world.rendezvous().keys()
    assert found[0] == "swarm" and set(found[1:3]) == {both, key_of("served")}
    assert found[3:] == [key_of("held"), key_of("carried")]  # each once


def test_the_number_of_keys_has_a_ceiling_and_ours_come_first() -> None:
    world = World()
    world.offers = [offer(f"model {number}") for number in range(200)]
    world.carried = [codes.code_of_cid(leaf_cid(b"carried %d" % number)) for number in range(200)]
    found = world.rendezvous().keys()
    assert len(found) == len(set(found)) == MAX_KEYS
    assert set(found[1:201]) == {key_of(f"model {number}") for number in range(200)}


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Monotonic seconds that the test moves on; the loops look again at once."""
    seconds = [1000.0]
    monkeypatch.setattr(under_test, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    monkeypatch.setattr(under_test, "_LOOK_S", 0.005)
    monkeypatch.setattr(under_test, "_PACE_S", 0)
    return seconds


@asynccontextmanager
async def announcing(world: World, dht: FakeDht, **options: Any) -> AsyncIterator[Rendezvous]:
    seeker = world.rendezvous(dht=dht, **options)
    task = asyncio.create_task(seeker.announce_forever())
    try:
        yield seeker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def rounds(count: int = 3) -> None:
    """So long that a loop has looked again."""
    for _ in range(count):
        await asyncio.sleep(0.01)


async def test_keys_are_announced_with_our_port_and_again_before_they_are_forgotten(now: list[float]) -> None:
    world, dht = World(), FakeDht()
    world.offers, world.carried = [offer("mine")], [codes.code_of_cid(leaf_cid(b"carried"))]
    expected = [(key(what), 8788) for what in ("swarm", key_of("mine"), key_of("carried"))]
    async with announcing(world, dht):
        await until(lambda: len(dht.announced) == 3)
        assert dht.announced == expected
        now[0] += AGAIN_S - 1
        await rounds()
        assert len(dht.announced) == 3
        now[0] += 2
        await until(lambda: len(dht.announced) == 6)
        assert dht.announced[3:] == expected


async def test_what_is_new_is_announced_at_once_and_what_is_gone_no_more(now: list[float]) -> None:
    world, dht = World(), FakeDht()
    world.offers = [offer("old")]
    async with announcing(world, dht):
        await until(lambda: len(dht.announced) == 2)
        world.offers = [offer("new")]
        await until(lambda: len(dht.announced) == 3)
        now[0] += AGAIN_S + 1
        await until(lambda: len(dht.announced) == 5)
    assert [said for said, _ in dht.announced[2:]] == [key(key_of("new")), key("swarm"), key(key_of("new"))]


async def test_at_another_port_or_address_everything_is_announced_again(now: list[float]) -> None:
    """A router forwards another port, a provider gives another address: under the old one nobody is found."""
    world, dht = World(), FakeDht()
    world.external = ("203.0.113.1",)
    async with announcing(world, dht):
        await until(lambda: len(dht.announced) == 1)
        world.port = 9999
        await until(lambda: len(dht.announced) == 2)
        world.external = ("203.0.113.2", "203.0.113.1")
        await until(lambda: len(dht.announced) == 3)
        await rounds()
    assert dht.announced == [(key("swarm"), 8788), (key("swarm"), 9999), (key("swarm"), 9999)]


async def test_codes_of_others_that_come_and_go_leave_nothing_behind(now: list[float]) -> None:
    world, dht, ipfs = World(), FakeDht(), FakeIpfs()
    ipfs.unreachable = True
    seeker: Any = world.rendezvous(dht=dht, ipfs=ipfs)
    for number in range(50):
        now[0] += AGAIN_S + 1
        world.carried = [codes.code_of_cid(leaf_cid(b"carried %d" % number))]
        await seeker._announce_due()
        await seeker._provide_due(ipfs)
    assert len(seeker._announced) == 2 and len(seeker._failed) <= 2


async def test_a_node_that_nobody_reaches_announces_nothing_on_bittorrent_and_provides_on_ipfs(now: list[float]) -> None:
    world, dht, ipfs = World(), FakeDht(), FakeIpfs()
    world.port = None
    async with announcing(world, dht, ipfs=ipfs), providing(world, ipfs):
        await until(lambda: len(ipfs.pinned) == 1)
        assert dht.announced == []
        world.port = 1234
        await until(lambda: dht.announced == [(key("swarm"), 1234)])


@asynccontextmanager
async def providing(world: World, ipfs: FakeIpfs | None, **options: Any) -> AsyncIterator[Rendezvous]:
    seeker = world.rendezvous(ipfs=ipfs, **options)
    task = asyncio.create_task(seeker.provide_forever())
    try:
        yield seeker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def block(what: str) -> bytes:
    return OPEN.rendezvous_block(what)


async def test_blocks_are_provided_once_and_withdrawn(now: list[float]) -> None:
    world, ipfs = World(), FakeIpfs()
    world.offers = [offer("a"), offer("b", serving=True)]
    async with providing(world, ipfs) as seeker:
        await until(lambda: len(ipfs.pinned) == 3)
        assert ipfs.told == [block("swarm"), block(key_of("b")), block(key_of("a"))]
        world.offers = [offer("a")]
        await until(lambda: len(ipfs.pinned) == 2)
        await rounds()
        assert set(ipfs.pinned.values()) == {block("swarm"), block(key_of("a"))}
        assert len(ipfs.told) == 3
        assert seeker.pinned == frozenset(ipfs.pinned)


async def test_after_a_new_start_of_ipfs_everything_is_told_again(now: list[float]) -> None:
    world, ipfs = World(), FakeIpfs()
    world.offers = [offer("a")]
    async with providing(world, ipfs) as seeker:
        await until(lambda: len(ipfs.told) == 2)
        seeker.forget_provided()
        # What it has pinned already, and is about to be told again, is not taken for a stray meanwhile.
        assert seeker.pinned == frozenset(ipfs.pinned)
        await until(lambda: len(ipfs.told) == 4)
    assert ipfs.told[2:] == ipfs.told[:2]


async def test_what_nobody_could_be_told_of_is_tried_again_later(now: list[float]) -> None:
    world, ipfs = World(), FakeIpfs()
    ipfs.unreachable = True
    async with providing(world, ipfs):
        await until(lambda: len(ipfs.told) == 1)
        await rounds()
        assert len(ipfs.told) == 1
        ipfs.unreachable = False
        now[0] += 31
        await until(lambda: len(ipfs.pinned) == 1)


async def test_without_rendezvous_nothing_is_announced_and_looking_goes_on(now: list[float]) -> None:
    world, dht, ipfs = World(), FakeDht(), FakeIpfs()
    world.offers = [offer("a")]
    seeker = world.rendezvous(dht=dht, ipfs=ipfs, enabled=False)
    # Both end by themselves.
    await seeker.announce_forever()
    await seeker.provide_forever()
    assert (dht.announced, ipfs.told, seeker.pinned) == ([], [], frozenset())
    await seeker.search(CODE, never)
    assert len(dht.asked) == len(ipfs.asked) == 1
