"""Which of a node's own addresses are told to others, and which of others' reach Kubo's configuration."""

from __future__ import annotations

import pytest

from daemon.errors import Bug
from daemon.ipfs.reach import Reach, direct_addresses
from registry.endpoints import MAX_ENDPOINTS
from registry.errors import Malformed
from registry.multiaddrs import Network, check_peer_id, parse_multiaddr, usable_multiaddrs

ME = "12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"
RELAY = "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN"
OTHER = "QmaCpDMGvV2BGHeYERUEnRQAwe3N8SzbUtfsmvsqQLuvuJ"
SECP256K1 = "16Uiu2HAmJarinaiZTtFuRBoxCnPbjaJLtTaRHZGKZXLNMBWLXWsr"


def through(relay: str, at: str) -> str:
    return f"{at}/p2p/{relay}/p2p-circuit/p2p/{ME}"


HOME = [
    f"/ip4/127.0.0.1/tcp/4001/p2p/{ME}",
    f"/ip4/192.168.1.2/tcp/4001/p2p/{ME}",
    f"/ip4/192.168.1.2/udp/4001/quic-v1/p2p/{ME}",
    f"/ip4/169.254.7.7/tcp/4001/p2p/{ME}",
    f"/ip4/100.64.0.9/tcp/4001/p2p/{ME}",
    f"/ip4/203.0.113.7/tcp/4001/p2p/{ME}",
    f"/ip4/45.10.0.1/tcp/4001/p2p/{ME}",
    f"/ip4/45.10.0.1/udp/4001/quic-v1/p2p/{ME}",
    f"/ip4/45.10.0.1/udp/4001/quic-v1/webtransport/certhash/uEiA/p2p/{ME}",
    f"/ip6/::1/tcp/4001/p2p/{ME}",
    f"/ip6/fe80::1/tcp/4001/p2p/{ME}",
    f"/ip6/fd00::1/tcp/4001/p2p/{ME}",
    f"/ip6/2001:db8::1/tcp/4001/p2p/{ME}",
    f"/ip6/2001:0:7f00:1::/tcp/4001/p2p/{ME}",
    f"/ip6/2002:7f00:1::/tcp/4001/p2p/{ME}",
    f"/ip6/64:ff9b::7f00:1/tcp/4001/p2p/{ME}",
    f"/ip6/::ffff:45.10.0.1/tcp/4001/p2p/{ME}",
    f"/ip6/2a00:1450::1/udp/4001/quic-v1/p2p/{ME}",
    through(RELAY, "/ip4/46.20.0.1/tcp/4001"),
    through(RELAY, "/ip4/46.20.0.1/udp/4001/quic-v1"),
    through(RELAY, "/ip4/192.168.9.9/tcp/4001"),
    through(OTHER, "/ip4/47.30.0.1/tcp/4001"),
    "/ip4/45.10.0.1/tcp/4001",
    "nonsense",
]


@pytest.mark.parametrize(
    ("network", "usable"),
    [
        (
            "public",
            [
                f"/ip4/45.10.0.1/udp/4001/quic-v1/p2p/{ME}",
                f"/ip6/2a00:1450::1/udp/4001/quic-v1/p2p/{ME}",
                f"/ip4/45.10.0.1/tcp/4001/p2p/{ME}",
                through(RELAY, "/ip4/46.20.0.1/udp/4001/quic-v1"),
                through(OTHER, "/ip4/47.30.0.1/tcp/4001"),
                through(RELAY, "/ip4/46.20.0.1/tcp/4001"),
            ],
        ),
        (
            "lan",
            [
                f"/ip4/192.168.1.2/udp/4001/quic-v1/p2p/{ME}",
                f"/ip4/192.168.1.2/tcp/4001/p2p/{ME}",
                f"/ip4/169.254.7.7/tcp/4001/p2p/{ME}",
                f"/ip6/fd00::1/tcp/4001/p2p/{ME}",
            ],
        ),
        ("loopback", [f"/ip4/127.0.0.1/tcp/4001/p2p/{ME}"]),
    ],
)
def test_only_what_a_stranger_can_use_best_first(network: Network, usable: list[str]) -> None:
    assert list(usable_multiaddrs(HOME, network)) == usable
    assert list(usable_multiaddrs([*reversed(HOME), *HOME], network)) != []


def test_no_more_than_a_peer_takes() -> None:
    many = [f"/ip4/45.10.{n}.1/tcp/4001/p2p/{ME}" for n in range(40)]
    assert len(usable_multiaddrs(many, "public")) == MAX_ENDPOINTS


@pytest.mark.parametrize("peer", [ME, RELAY, OTHER, SECP256K1])
def test_peer_ids_of_every_kind(peer: str) -> None:
    assert check_peer_id(peer) == peer


@pytest.mark.parametrize("peer", ["", "Qm", ME[:-1], ME + "1", RELAY[:-2] + "0O", "1" * 46, "z" * 52, "z" * 10_000])
def test_what_is_no_peer_id(peer: str) -> None:
    with pytest.raises(Malformed):
        check_peer_id(peer)


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "/ip4/1.2.3/tcp/1", "/ip4/::1/tcp/1", "/ip6/1.2.3.4/tcp/1", "/ip6/fe80::1%eth0/tcp/1", "/ip4/1.2.3.4/tcp/0",
        "/ip4/1.2.3.4/tcp/65536", "/ip4/1.2.3.4/udp/1", "/ip4/1.2.3.4/tcp/1/p2p/x", f"/ip4/1.2.3.4/tcp/1/p2p/{ME}/p2p-circuit/tcp/1",
        f"/dns4/host/tcp/1/p2p/{ME}", f"/ip4/1.2.3.4/tcp/1/{'x' * 300}",
    ],
)  # fmt: skip
def test_what_is_no_multiaddr_of_ours(text: str) -> None:
    with pytest.raises(Malformed):
        parse_multiaddr(text)


def test_no_address_that_kubo_cannot_read_gets_into_its_configuration() -> None:
    good = f"/ip4/45.10.0.1/tcp/4001/p2p/{ME}"
    for bad in ("/dnsaddr/host/p2p/" + ME, "/ip4/45.10.0.1/tcp/4001", good[:-1], through(RELAY, "/ip4/46.20.0.1/tcp/4001")):
        with pytest.raises(Bug):
            Reach(relays=(bad,))
        with pytest.raises(Bug):
            Reach(bootstrap=(bad,))
        assert direct_addresses((bad, good, good), 4) == (good,)
    with pytest.raises(Bug):
        Reach(relays=(good,) * 5)


def test_one_direct_address_for_each_peer() -> None:
    found = direct_addresses(tuple(HOME), 4)
    assert found == (HOME[0],)
    several = tuple(f"/ip4/45.10.0.{n}/tcp/4001/p2p/{peer}" for n, peer in enumerate((ME, RELAY, ME, OTHER)))
    assert direct_addresses(several, 2) == several[:2]


def test_what_needs_another_start() -> None:
    relay, other = (f"/ip4/45.10.0.1/tcp/4001/p2p/{peer}" for peer in (RELAY, OTHER))
    running = Reach("private", (relay, other))
    assert not Reach("private", (other, relay), bootstrap=(relay,)).needs_restart(running)
    for wanted in (Reach("public", (relay, other)), Reach("private", (relay,)), Reach("private", (relay, other), relay_service=True)):
        assert wanted.needs_restart(running)
