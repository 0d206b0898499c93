"""The network in words: what `status` shows of it, and what `doctor` calls wrong."""

from __future__ import annotations

from typing import Any

import pytest

from swarmctl import network
from swarmctl.checks import Check

RELAY = "ed25519:" + "1a2b3c4d" * 8
IPFS: dict[str, Any] = {"enabled": True, "state": "ready", "version": "0.43.0", "peers": 4, "reason": None}
BITTORRENT: dict[str, Any] = {"enabled": True, "state": "ready", "port": 6881, "peers": 2}
OFF: dict[str, Any] = {"enabled": False, "state": "off", "port": None, "peers": 0, "reason": None}
HOME: dict[str, Any] = {
    "network": "public",
    "ipfs": IPFS,
    "bittorrent": BITTORRENT,
    "reachability": "private",
    "relays": [RELAY],
    "relaying": {"enabled": False, "nodes": 0, "streams": 0, "bytes": 0},
    "dht": {"bittorrent": 120, "ipfs": 33},
    "neighbours": 5,
    "nat": "port-preserving",
    "external": ["5.6.7.8"],
    "clock": {"off": False, "why": None},
    "peer_api": {"port": 8788, "open": False, "url": None},
    "swarm": {"name": "", "closed": False},
}
PUBLIC: dict[str, Any] = {
    **HOME,
    "reachability": "public",
    "relays": [],
    "nat": "none",
    "relaying": {"enabled": True, "nodes": 3, "streams": 2, "bytes": 2048},
    "peer_api": {"port": 8788, "open": True, "url": "http://5.6.7.8:8788"},
}


def found(status: dict[str, Any], known: int = 3) -> dict[str, Check]:
    checks = network.checks(status, known)
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.detail and "\n" not in check.detail for check in checks)
    return {check.name: check for check in checks}


def wrong(status: dict[str, Any], known: int = 3) -> set[str]:
    return {name for name, check in found(status, known).items() if not check.ok}


@pytest.mark.parametrize(
    ("nat", "said"),
    [
        ("port-preserving", "hole punching"),
        ("none", "firewall"),
        ("unknown", "not known yet"),
        ("symmetric", "only through a relay"),
    ],
)
def test_a_home_is_not_wrong(nat: str, said: str) -> None:
    for relays in ([RELAY], []):
        status = {**HOME, "nat": nat, "relays": relays}
        assert wrong(status) == set()
        check = found(status)["network"]
        assert said in check.detail and "seen as 5.6.7.8" in check.detail
        assert "directly" in check.hint


def test_behind_a_symmetric_nat_it_is_said_what_follows() -> None:
    detail = found({**HOME, "nat": "symmetric"})["network"].detail
    assert "answers work" in detail and "public holder" in detail and "allows bytes" in detail


def test_a_home_without_a_relay_is_told_how_to_get_one() -> None:
    assert "swarmctl join" in found({**HOME, "relays": []})["relays"].hint
    assert "1a2b3c4d" in found(HOME)["relays"].detail and not found(HOME)["relays"].hint


def test_a_public_node_needs_nothing() -> None:
    assert wrong(PUBLIC) == set()
    checks = found(PUBLIC)
    assert {name: check.hint for name, check in checks.items() if check.hint} == {}
    assert "directly" in checks["network"].detail and "3 nodes" in checks["relays"].detail
    assert "http://5.6.7.8:8788" in checks["peer api"].detail


def test_what_nobody_has_found_out_yet() -> None:
    status = {**HOME, "reachability": "unknown", "relays": [], "external": []}
    assert wrong(status) == set()
    assert "not known" in found(status)["network"].detail


def test_one_silent_dht_is_hinted_at_and_both_are_wrong_for_who_is_alone() -> None:
    half = {**HOME, "dht": {"bittorrent": 0, "ipfs": 33}}
    assert wrong(half, known=0) == set()
    assert "UDP port 6881" in found(half)["dht"].hint and "ipfs" not in found(half)["dht"].hint
    none = {**HOME, "dht": {"bittorrent": 0, "ipfs": 0}, "neighbours": 0}
    assert wrong(none, known=0) == {"dht"}
    hint = found(none, 0)["dht"].hint
    assert "6881" in hint and "ipfs.port" in hint and "swarmctl join" in hint
    assert wrong(none, known=1) == set()
    assert wrong({**none, "neighbours": 1}, known=0) == set()


def test_a_network_that_is_switched_off_is_not_missed() -> None:
    status = {**HOME, "ipfs": OFF, "dht": {"bittorrent": 7, "ipfs": 0}}
    assert wrong(status) == set()
    assert found(status)["dht"].detail == "bittorrent 7 nodes" and not found(status)["dht"].hint
    alone = {**status, "dht": {"bittorrent": 0, "ipfs": 0}, "neighbours": 0}
    assert wrong(alone, known=0) == {"dht"}
    assert "ipfs" not in found(alone, 0)["dht"].hint


def test_a_clock_that_is_off_is_wrong() -> None:
    clock = {"off": True, "why": "3 nodes are 86400 s behind it"}
    check = found({**HOME, "clock": clock})["clock"]
    assert not check.ok and "86400" in check.detail and check.hint
    assert "86400" in network.lines({**HOME, "clock": clock})["clock"]
    assert "clock" not in network.lines(HOME)


def test_parts_that_do_not_work_are_wrong() -> None:
    down = {**IPFS, "state": "down", "reason": "it died"}
    assert wrong({**HOME, "ipfs": down}) == {"ipfs"}
    assert "it died" in found({**HOME, "ipfs": down})["ipfs"].detail
    assert wrong({**HOME, "bittorrent": {**BITTORRENT, "port": 0}}) == {"bittorrent"}
    assert wrong({**HOME, "ipfs": {**IPFS, "state": "starting"}}) == set()


@pytest.mark.parametrize("kind", ["lan", "loopback"])
def test_where_nothing_leaves_no_dht_is_missed(kind: str) -> None:
    status = {**HOME, "network": kind, "dht": {"bittorrent": 0, "ipfs": 0}, "neighbours": 0}
    assert wrong(status, known=0) == set()
    checks = found(status, 0)
    assert not {"dht", "relays"} & set(checks)
    assert "swarmctl join" in checks["peers"].hint and not checks["peer api"].hint
    assert not {"dht", "relays"} & set(network.lines(status))


def test_the_block_of_status() -> None:
    assert network.lines(HOME) == {
        "network": "public, behind a NAT that keeps ports, seen as 5.6.7.8",
        "relays": "1a2b3c4d",
        "dht": "bittorrent 120 nodes, ipfs 33 nodes",
        "relaying": "off",
        "neighbours": "5 listen to the swarm's topic",
        "peer api": "port 8788, not reached directly",
        "swarm": "open to everybody",
    }
    told = network.lines({**PUBLIC, "swarm": {"name": "office", "closed": True}})
    assert told["relaying"] == "for 3 nodes, 2 streams now, 2.0 KiB so far"
    assert told["peer api"] == "port 8788, others reach it at http://5.6.7.8:8788"
    assert told["swarm"] == "office, closed: members only"
