"""What follows from how a node is reached: what it announces, what its IPFS node is told, who carries for whom.

Real parts, with no network: nothing is started but what a test starts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon import config as settings
from daemon import network
from daemon.gossip.peers import PeerTable
from daemon.ipfs.interface import PeerIdentity
from daemon.ipfs.keeper import IpfsKeeper
from daemon.ipfs.reach import Reach
from daemon.ledger import LedgerThread
from daemon.membership import OpenSwarm
from daemon.node import reachability
from daemon.node.connectivity import Connectivity
from daemon.node.reachability import State
from daemon.peerapi.server import Ports
from daemon.peerchat.seal import SealKeys
from daemon.supervise import Supervisor
from registry import announcement as rules
from registry import codes
from registry.cid import leaf_cid
from registry.envelope import key_name, sign
from registry.errors import Misdated
from registry.records import Address, Announcement, Offer, Peer
from tests.functional.api_server import ALONE

NOW = 1_800_000_000
HOME = "45.10.0.1"  # of this machine, on the internet
SEEN = "46.20.0.1"  # where others see it
PRIVATE = "192.168.1.2"
ME = "12D3KooWSpuCwfVi5fk1tLTWeiMPF9JaBgWHrY9QaeNtfRM2PtGu"
RELAY = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"

LAN = f"/ip4/{PRIVATE}/tcp/4001/p2p/{ME}"
LOCAL = f"/ip4/127.0.0.1/tcp/4001/p2p/{ME}"
DIRECT = f"/ip4/{SEEN}/tcp/4001/p2p/{ME}"
CIRCUIT = f"/ip4/47.30.0.1/tcp/4001/p2p/{RELAY}/p2p-circuit/p2p/{ME}"


class Node:
    """A `Connectivity`, and what the test decides about its machine."""

    def __init__(self, connectivity: Connectivity, table: PeerTable, keeper: IpfsKeeper, torrents: Any, offers: list[Offer]) -> None:
        self.connectivity = connectivity
        self.table = table
        self.keeper = keeper
        self.torrents = torrents
        self.offers = offers

    def stands(self, state: State, *reached: str, external: str = SEEN) -> None:
        """As after what judges said."""
        found = self.connectivity.reachability
        found.state, found._told = state, frozenset(reached)
        found.external = () if state == "unknown" else (external,)

    def has_ipfs(self, *addresses: str) -> None:
        self.connectivity.gossip.pubsub.identity = PeerIdentity(ME, addresses)

    @property
    def announced(self) -> Address:
        return self.connectivity.gossip.pages.address()

    def hears(self, *, ipfs: Sequence[str] = (), http: Sequence[str] = (), relay: bool = False, peer_id: str | None = None) -> str:
        """Another node announces itself."""
        address, word = _word(NOW + 600, tuple(ipfs), tuple(http), relay=relay, peer_id=peer_id)
        self.table.accept(word)
        return address.node


def _word(
    expires: int, ipfs: tuple[str, ...] = (), http: tuple[str, ...] = (), *, relay: bool = False, peer_id: str | None = None
) -> tuple[Address, bytes]:
    key = Ed25519PrivateKey.generate()
    address = Address(key_name(key), ipfs=ipfs, http=http)
    said = Announcement(address.node, peer_id, 1, expires, address, (), relay=relay)
    return address, sign(rules.PAYLOAD_TYPE, rules.build(said), key)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its addresses: a home's, unless the test says otherwise."""
    found = SimpleNamespace(globally=None, privately=PRIVATE)
    for place in (network, reachability):
        monkeypatch.setattr(place, "global_address", lambda: found.globally)
    monkeypatch.setattr(network, "private_address", lambda: found.privately)
    return found


Making = Callable[..., Any]


@pytest.fixture
def node(tmp_path: Path, machine: SimpleNamespace) -> Making:
    """Makes a node with those settings; `public` and open, if they say nothing else."""

    @asynccontextmanager
    async def make(bittorrent: int | None = 6881, **flags: str) -> AsyncIterator[Node]:
        given = {"network": "public", "swarm.open": "true", "ipfs.enabled": "false"}
        given |= {name.replace("_", ".", 1): value for name, value in flags.items()}
        config = settings.load(tmp_path, {}, given)
        key, swarm, offers = Ed25519PrivateKey.generate(), OpenSwarm(), list[Offer]()
        torrents: Any = None
        if bittorrent is not None:
            ports = SimpleNamespace(mapped_port=None, map_port=lambda port: None, renew=lambda: None)
            dht = SimpleNamespace(nodes=7, external_addresses=(), enabled=False)
            torrents = SimpleNamespace(port=bittorrent, ports=ports, dht=dht)
        async with AsyncExitStack() as stack:
            ledger = await LedgerThread.open(tmp_path / "ledger.db")
            stack.push_async_callback(ledger.close)
            table = PeerTable(ledger, own=key_name(key), clock=lambda: NOW, standing=lambda key: None)
            await table.open()
            stack.push_async_callback(table.close)
            supervisor = Supervisor()
            stack.push_async_callback(supervisor.close)
            http = await stack.enter_async_context(aiohttp.ClientSession())
            keeper = IpfsKeeper(config, _nothing, _nothing)
            connectivity = Connectivity(
                config,
                key,
                ledger=ledger,
                table=table,
                keeper=keeper,
                torrents=torrents,
                supervisor=supervisor,
                http=http,
                pipes=http,
                membership=swarm,
                seal_keys=SealKeys(key_name(key), lambda: NOW),
                offers=lambda: offers,
                join=(),
            )
            connectivity.ports = Ports(8788, 9)
            made = Node(connectivity, table, keeper, torrents, offers)
            yield made

    return make


async def _nothing(*arguments: Any) -> None:
    pass


# -- what is announced --------------------------------------------------------------------------------------------------


async def test_before_anybody_has_said_only_what_stands_on_own_interfaces(node: Making) -> None:
    async with node() as a:
        a.has_ipfs(LOCAL, LAN, DIRECT, CIRCUIT)
        assert a.announced == Address(a.connectivity.node, ipfs=(DIRECT, CIRCUIT))


async def test_public_announces_what_somebody_reached(node: Making) -> None:
    async with node() as a:
        a.has_ipfs(LOCAL, LAN, DIRECT)
        a.stands("public", "http", "ipfs", "bittorrent")
        assert a.announced == Address(
            a.connectivity.node, ipfs=(DIRECT,), bittorrent=(f"{SEEN}:6881",), http=(f"http://{SEEN}:8788",)
        )


@pytest.mark.parametrize(
    ("reached", "ipfs", "bittorrent", "http"),
    [
        ("http", (CIRCUIT,), (), (f"http://{SEEN}:8788",)),
        ("ipfs", (DIRECT, CIRCUIT), (), ()),
        ("bittorrent", (CIRCUIT,), (f"{SEEN}:6881",), ()),
    ],
)
async def test_of_a_home_that_forwards_one_port_only_that_part(
    node: Making, reached: str, ipfs: tuple[str, ...], bittorrent: tuple[str, ...], http: tuple[str, ...]
) -> None:
    async with node() as a:
        a.has_ipfs(LAN, DIRECT, CIRCUIT)
        a.stands("public", reached)
        assert a.announced == Address(a.connectivity.node, ipfs=ipfs, bittorrent=bittorrent, http=http)


async def test_private_announces_ways_through_relays_alone(node: Making) -> None:
    async with node() as a:
        a.has_ipfs(LOCAL, LAN, DIRECT, CIRCUIT)
        a.stands("private")
        assert a.announced == Address(a.connectivity.node, ipfs=(CIRCUIT,))


async def test_ipv6_stands_in_brackets(node: Making) -> None:
    async with node() as a:
        a.stands("public", "http", "bittorrent", external="2a00:1450::1")
        assert a.announced.http == ("http://[2a00:1450::1]:8788",)
        assert a.announced.bittorrent == ("[2a00:1450::1]:6881",)


async def test_the_port_that_a_router_forwards_is_announced_and_tried(node: Making) -> None:
    async with node() as a:
        a.torrents.ports.mapped_port = 18788
        a.stands("public", "http")
        assert a.announced.http == (f"http://{SEEN}:18788",)
        assert a.connectivity.endpoints.own_ports()["http"] == 18788


@pytest.mark.parametrize(
    ("kind", "ipfs", "host"), [("loopback", LOCAL, "127.0.0.1"), ("lan", LAN, PRIVATE)]
)
async def test_in_a_closed_network_its_own_addresses(node: Making, kind: str, ipfs: str, host: str) -> None:
    async with node(network=kind) as a:
        a.has_ipfs(LOCAL, LAN, DIRECT, CIRCUIT)
        expected = Address(a.connectivity.node, ipfs=(ipfs,), bittorrent=(f"{host}:6881",), http=(f"http://{host}:8788",))
        assert a.announced == a.connectivity.endpoints.for_people() == expected


async def test_in_a_lan_without_an_address_nothing(node: Making, machine: SimpleNamespace) -> None:
    machine.privately = None
    async with node(network="lan") as a:
        assert a.announced == Address(a.connectivity.node)


async def test_with_bittorrent_and_ipfs_off_the_peer_api_alone(node: Making) -> None:
    async with node(bittorrent=None) as a:
        a.stands("public", "http")
        assert a.announced == Address(a.connectivity.node, http=(f"http://{SEEN}:8788",))
        assert a.connectivity.endpoints.for_bittorrent() == []


# -- what a person hands on ---------------------------------------------------------------------------------------------


async def test_a_person_hands_on_the_guess_until_somebody_knows_better(node: Making, machine: SimpleNamespace) -> None:
    machine.globally = HOME
    async with node() as a:
        own = a.connectivity.node
        assert a.announced == Address(own)
        assert a.connectivity.endpoints.for_people() == Address(own, bittorrent=(f"{HOME}:6881",), http=(f"http://{HOME}:8788",))
        a.stands("private")
        assert a.connectivity.endpoints.for_people() == Address(own)
        a.stands("public", "http")
        assert a.connectivity.endpoints.for_people() == Address(own, http=(f"http://{SEEN}:8788",))


async def test_a_home_or_a_peer_api_that_is_not_open_has_no_guess(node: Making, machine: SimpleNamespace) -> None:
    async with node() as a:
        assert a.connectivity.endpoints.for_people() == Address(a.connectivity.node)
    machine.globally = HOME
    async with node(swarm_open="false") as a:
        assert a.connectivity.endpoints.for_people() == Address(a.connectivity.node, bittorrent=(f"{HOME}:6881",))


# -- what others may try ------------------------------------------------------------------------------------------------


async def test_own_ports_are_those_of_the_parts_that_listen(node: Making) -> None:
    async with node() as a:
        assert a.connectivity.endpoints.own_ports() == {"http": 8788, "bittorrent": 6881}
        a.has_ipfs("nonsense", CIRCUIT, f"/ip4/{PRIVATE}/udp/4009/quic-v1/p2p/{ME}", LAN)
        assert a.connectivity.endpoints.own_ports() == {"http": 8788, "ipfs": 4001, "bittorrent": 6881}
    async with node(swarm_open="false", bittorrent=0) as a:
        assert a.connectivity.endpoints.own_ports() == {}


async def test_judges_are_the_joined_nodes_and_then_whoever_can_be_dialled(node: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    async with node() as a:
        # Not from here, and not without a relay:
        a.hears(http=["http://192.168.1.9:8788"])
        a.hears(ipfs=[LAN], peer_id=ME)
        a.hears(ipfs=[CIRCUIT], peer_id=ME)
        a.hears()
        dialled = {a.hears(http=["http://48.1.1.1:8788"]), a.hears(ipfs=[POINT], peer_id=RELAY)}
        joined = Peer("ed25519:" + "ee" * 32, None, Address(""), 0, 0)
        monkeypatch.setattr(a.connectivity.gossip.joiner, "peers", lambda: [joined])
        first, *others = a.connectivity._judges()
        assert first == joined and {peer.node for peer in others} == dialled


# -- who carries for whom -----------------------------------------------------------------------------------------------

STANDINGS: list[tuple[State, tuple[str, ...], bool, bool, bool]] = [
    # state, reached, a public address of its own -> wants relays, carries
    ("unknown", (), False, True, False),
    ("unknown", (), True, False, False),
    ("private", (), False, True, False),
    ("private", (), True, True, False),
    ("public", ("http",), False, False, True),
    ("public", ("ipfs",), False, False, True),
    ("public", ("http", "ipfs", "bittorrent"), True, False, True),
    # Routers forward libtorrent's port when it asks: nobody can ask us anything there.
    ("public", ("bittorrent",), False, True, False),
    ("public", ("bittorrent",), True, True, False),
]


@pytest.mark.parametrize(("state", "reached", "own_address", "wants", "carries"), STANDINGS)
async def test_who_carries_and_who_is_carried_for(
    node: Making, machine: SimpleNamespace, state: State, reached: tuple[str, ...], own_address: bool, wants: bool, carries: bool
) -> None:
    machine.globally = HOME if own_address else None
    async with node() as a:
        a.stands(state, *reached)
        assert (a.connectivity._wants_relays(), a.connectivity.relaying) == (wants, carries)


@pytest.mark.parametrize("state", ["unknown", "private", "public"])
async def test_whether_to_carry_may_be_set(node: Making, state: State) -> None:
    for choice, carries in (("on", True), ("off", False)):
        async with node(swarm_relay=choice) as a:
            a.stands(state, *(("http",) if state == "public" else ()))
            assert a.connectivity.relaying == carries


async def test_relays_are_told_our_codes_unless_rendezvous_is_off(node: Making) -> None:
    offer = Offer("ed25519:x", leaf_cid(b"a"), None, "4" * 64, None, "m", 9, True)
    expected = {codes.short(code) for code in codes.codes_of(offer.cid, offer.infohash_v2)}
    for choice in ("true", "false"):
        async with node(swarm_rendezvous=choice) as a:
            a.offers.append(offer)
            assert a.connectivity._shared_codes() == (expected if choice == "true" else set())


# -- what the IPFS node is told -----------------------------------------------------------------------------------------

POINT = f"/ip4/48.1.1.1/tcp/4001/p2p/{RELAY}"


@pytest.mark.parametrize(
    ("state", "reached", "own_address", "told"),
    [
        ("unknown", (), False, "private"),
        ("unknown", (), True, "public"),
        ("private", (), False, "private"),
        ("private", (), True, "private"),
        ("public", ("ipfs",), False, "public"),
        ("public", ("http",), False, "private"),
        ("public", ("http",), True, "public"),
    ],
)
async def test_where_the_ipfs_node_stands(
    node: Making, machine: SimpleNamespace, state: State, reached: tuple[str, ...], own_address: bool, told: str
) -> None:
    machine.globally = HOME if own_address else None
    async with node() as a:
        a.hears(ipfs=[POINT], relay=True, peer_id=RELAY)
        a.stands(state, *reached)
        reach = a.connectivity._standing._reach()
        assert reach.reachability == told
        assert reach.relays == ((POINT,) if told == "private" else ())
        assert reach.relay_service == (told == "public")
        assert reach.bootstrap == (POINT,)


async def test_a_node_that_does_not_carry_gives_no_reservations_either(node: Making) -> None:
    async with node(swarm_relay="off") as a:
        a.stands("public", "ipfs")
        assert a.connectivity._standing._reach() == Reach("public")


@pytest.mark.parametrize("kind", ["lan", "loopback"])
async def test_in_a_closed_network_it_is_told_nothing(node: Making, kind: str) -> None:
    async with node(network=kind) as a:
        a.hears(ipfs=[LAN], relay=True, peer_id=ME)
        assert a.connectivity._standing._reach() == Reach()


async def test_nobody_inside_becomes_a_relay_or_a_way_in(node: Making) -> None:
    """What strangers announce would make our IPFS node dial our own network."""
    async with node() as a:
        for address in (LOCAL, LAN, f"/ip4/169.254.1.1/tcp/80/p2p/{ME}", f"/ip6/fd00::1/tcp/4001/p2p/{ME}", CIRCUIT):
            a.hears(ipfs=[address], relay=True, peer_id=ME)
        assert a.connectivity._standing._reach() == Reach("private")


async def test_relays_stay_while_one_of_them_lives(node: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change is a new start of the IPFS node."""
    other = f"/ip4/48.1.1.2/tcp/4001/p2p/{ME}"
    running = Reach("private", relays=(f"/ip4/48.1.1.9/tcp/4001/p2p/{RELAY}", other))
    async with node() as a:
        monkeypatch.setattr(a.keeper, "_running", running)
        a.hears(ipfs=[POINT], relay=True, peer_id=RELAY)
        assert a.connectivity._standing._relays() == running.relays
        gone = Reach("private", relays=(other,))
        monkeypatch.setattr(a.keeper, "_running", gone)
        assert a.connectivity._standing._relays() == (POINT,)


# -- the start ----------------------------------------------------------------------------------------------------------

PUBLIC_LOOPS = {"reachability", "announce on DHT", "provide", "look for others", "relay 0", "relay 1"}


@pytest.mark.parametrize("kind", ["public", "lan", "loopback"])
async def test_only_a_public_node_asks_the_internet(node: Making, kind: str) -> None:
    async with node(network=kind) as a:
        await a.connectivity.start()
        running = set(a.connectivity._supervisor.state())
        assert running >= PUBLIC_LOOPS if kind == "public" else running.isdisjoint(PUBLIC_LOOPS)
        # Nor does anybody else through it: it has no DHT.
        rendezvous: Any = a.connectivity.rendezvous
        assert (rendezvous._dht is not None) == rendezvous._enabled == (kind == "public")
        await a.connectivity.close()


async def test_without_rendezvous_nothing_is_announced(node: Making) -> None:
    async with node(swarm_rendezvous="false") as a:
        rendezvous: Any = a.connectivity.rendezvous
        assert not rendezvous._enabled and rendezvous._dht is not None


# -- what status says ---------------------------------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """The fields and their types; None stands for what may be missing."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    return type(value)


@pytest.mark.parametrize("kind", ["public", "lan", "loopback"])
async def test_the_fields_of_status(node: Making, kind: str) -> None:
    async with node(network=kind) as a:
        found = a.connectivity.standing()
        url = found["peer_api"]["url"]
        assert isinstance(url, str) == found["peer_api"]["open"] == (kind != "public")
        expected = {**ALONE, "peer_api": {**ALONE["peer_api"], "url": url}}
        assert shape(found) == shape(expected)


async def test_what_status_says_of_a_public_node(node: Making) -> None:
    async with node() as a:
        a.stands("public", "http")
        found = a.connectivity.standing()
        assert found["reachability"] == "public" and found["external"] == [SEEN]
        assert found["relaying"] == {"enabled": True, "nodes": 0, "streams": 0, "bytes": 0}
        assert found["dht"] == {"bittorrent": 7, "ipfs": 0}
        assert found["peer_api"] == {"port": 8788, "open": True, "url": f"http://{SEEN}:8788"}
        assert found["swarm"] == {"name": "", "closed": False}


async def test_what_status_says_of_a_member(node: Making) -> None:
    async with node(swarm_name="the lab", swarm_secret="correct horse battery staple") as a:
        found = a.connectivity.standing()["swarm"]
        assert found == {"name": "the lab", "closed": True}


async def test_status_says_that_the_clock_is_off(node: Making) -> None:
    """F18: after several nodes whose words are a day old."""
    async with node() as a:
        for number in range(3):
            assert a.connectivity.standing()["clock"] == {"off": False, "why": None}, number
            with pytest.raises(Misdated, match="clock"):
                await a.connectivity.receive(_word(NOW - 86_400)[1])
        assert a.connectivity.standing()["clock"] == {"off": True, "why": "most announcements of others have a wrong time"}
