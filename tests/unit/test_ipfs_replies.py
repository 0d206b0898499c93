"""What Kubo's RPC says of peers, connections and providers: partly a stranger's word, so the parsers are asked for the worst."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.ipfs.interface import Connection, Provider
from daemon.ipfs.peerings import MAX_PEERINGS, Peerings
from daemon.ipfs.reach import MAX_REMEMBERED
from daemon.ipfs.routing import MAX_PROVIDERS, read_providers
from daemon.ipfs.swarm import Acquaintances, read_connections, read_reachability
from registry.endpoints import MAX_ENDPOINTS
from registry.multiaddrs import both_transports
from tests.unit.test_multiaddrs import ME, OTHER, RELAY, through

QUIC, TCP = "/ip4/45.10.0.1/udp/4001/quic-v1", "/ip4/45.10.0.1/tcp/4001"


def event(*responses: object, kind: int = 4) -> dict[str, Any]:
    return {"Extra": "", "ID": "", "Responses": list(responses), "Type": kind}


def test_providers_are_read_with_whole_addresses() -> None:
    response = {"ID": ME, "Addrs": [TCP, f"{QUIC}/p2p/{ME}", TCP, f"{TCP}/p2p/{RELAY}/p2p-circuit"]}
    expected = (f"{TCP}/p2p/{ME}", f"{QUIC}/p2p/{ME}", through(RELAY, TCP))
    assert read_providers(event(response, {"ID": OTHER, "Addrs": None})) == [Provider(ME, expected), Provider(OTHER, ())]


@pytest.mark.parametrize(
    "said",
    [
        {}, {"Type": 4}, {"Type": 4, "Responses": None}, {"Type": 4, "Responses": {}}, event({"ID": ME}, kind=1), event(None, 3, "x", []),
        event({"ID": 5}), event({"ID": "nobody"}), event({"Addrs": [TCP]}),
    ],
)  # fmt: skip
def test_what_names_no_provider(said: dict[str, Any]) -> None:
    assert read_providers(said) == []


def test_a_provider_with_wrong_and_too_many_addresses_is_cut() -> None:
    many = [f"/ip4/45.10.0.1/tcp/{port}" for port in range(1, 100)]
    wrong = [7, None, "", "/", "nonsense", "/ip4/999.1.1.1/tcp/1", "/" + "x" * 5000, {"a": 1}]
    (found,) = read_providers(event({"ID": ME, "Addrs": [*wrong, *many]}))
    assert len(found.addresses) == MAX_ENDPOINTS
    assert len(read_providers(event(*[{"ID": ME}] * 1000))) == MAX_PROVIDERS


def test_connections() -> None:
    relayed = f"{TCP}/p2p/{RELAY}/p2p-circuit"
    peers = [{"Addr": QUIC, "Peer": ME, "Direction": 1}, {"Addr": relayed, "Peer": ME, "Direction": 2}, {"Addr": TCP, "Peer": "evil\x1b"}]
    assert read_connections({"Peers": peers}) == [Connection(ME, QUIC, True, False), Connection(ME, relayed, False, True)]
    assert read_connections({"Peers": None}) == []


def test_reachability() -> None:
    said = [{"reachability": "Public"}, {"reachability": "Private"}, {"reachability": "Unknown"}, {}]
    assert [read_reachability(one) for one in said] == ["public", "private", "unknown", "unknown"]


def connected(peer: str, address: str = TCP, *, direction: int = 2, server: bool = True) -> dict[str, Any]:
    protocols = ["/ipfs/kad/1.0.0"] if server else ["/ipfs/id/1.0.0"]
    return {"Addr": address, "Peer": peer, "Direction": direction, "Identify": {"Protocols": protocols}}


def test_only_public_lasting_peers_that_we_dialled_are_remembered() -> None:
    good = connected(ME)
    others = [
        connected(RELAY, direction=1),
        connected(RELAY, "/ip4/192.168.1.9/tcp/4001"),
        connected(RELAY, f"{TCP}/p2p/{OTHER}/p2p-circuit"),
        connected(RELAY, server=False),
        {"Addr": TCP, "Peer": RELAY, "Direction": 2, "Identify": None},
    ]
    book = Acquaintances()
    for other in others:
        assert book.look({"Peers": [good, other]}, now=0.0) == ()
        assert book.look({"Peers": [good, other]}, now=100.0) == (f"{TCP}/p2p/{ME}",)
    assert book.look({"Peers": []}, now=110.0) == ()
    assert book.look({"Peers": [good]}, now=120.0) == ()  # it has come back, and begins anew


def test_the_oldest_acquaintances_come_first_and_are_few() -> None:
    book = Acquaintances()
    peers = [connected(RELAY, "/ip4/45.10.0.7/tcp/4001")]
    book.look({"Peers": peers}, now=0.0)
    peers.insert(0, connected(ME))
    book.look({"Peers": peers}, now=1.0)
    assert book.look({"Peers": peers}, now=100.0) == (f"/ip4/45.10.0.7/tcp/4001/p2p/{RELAY}", f"{TCP}/p2p/{ME}")
    assert MAX_REMEMBERED == 16


def test_the_peering_that_was_asked_for_longest_ago_is_let_go() -> None:
    held = Peerings()
    for n in range(MAX_PEERINGS):
        assert held.add(f"/ip4/1.1.1.1/tcp/1/p2p/{n}") is None
    assert held.add("/ip4/2.2.2.2/tcp/1/p2p/0") is None  # again, and at another address
    assert held.add("/ip4/1.1.1.1/tcp/1/p2p/new") == "1"
    assert len(held.addresses()) == MAX_PEERINGS
    assert "/ip4/2.2.2.2/tcp/1/p2p/0" in held.addresses()


@pytest.mark.parametrize(
    ("given", "both"),
    [
        (f"{TCP}/p2p/{ME}", (f"{QUIC}/p2p/{ME}", f"{TCP}/p2p/{ME}")),
        (f"{QUIC}/p2p/{ME}", (f"{QUIC}/p2p/{ME}", f"{TCP}/p2p/{ME}")),
        (through(RELAY, TCP), (through(RELAY, QUIC), through(RELAY, TCP))),
        (f"/ip4/127.0.0.1/tcp/4001/p2p/{ME}", (f"/ip4/127.0.0.1/tcp/4001/p2p/{ME}",)),
        (f"/p2p/{ME}", (f"/p2p/{ME}",)),
        ("/dnsaddr/bootstrap.example/p2p/" + ME, ("/dnsaddr/bootstrap.example/p2p/" + ME,)),
    ],
)
def test_a_public_address_over_both_transports(given: str, both: tuple[str, ...]) -> None:
    assert both_transports(given) == both
