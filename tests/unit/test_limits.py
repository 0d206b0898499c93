"""Ceilings per source: who counts as one, what strangers over libp2p have together, and numbers that fit each other."""

from __future__ import annotations

import pytest

from daemon.buckets import Buckets, counted_as
from daemon.errors import Busy
from daemon.peerapi.limits import Limits, Places
from daemon.relaying.limits import RelayLimits

PEER_IDS = [f"12D3KooW{number:044d}" for number in range(1000)]
RELAY = "relay:ed25519:" + "ab" * 32


@pytest.mark.parametrize(
    ("source", "counts_as"),
    [
        ("2a01:4f8:1:2::1", "2a01:4f8:1:2::/64"),
        ("2a01:4f8:1:2:ffff:ffff:ffff:ffff", "2a01:4f8:1:2::/64"),
        ("2a01:4f8:1:3::1", "2a01:4f8:1:3::/64"),
        ("::ffff:8.8.8.8", "8.8.8.8"),
        ("8.8.8.8", "8.8.8.8"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("fd00::1", "fd00::1"),
        ("::1", "::1"),
        (PEER_IDS[0], PEER_IDS[0]),
        (RELAY, RELAY),
        ("", ""),
    ],
)
def test_who_counts_as_one_source(source: str, counts_as: str) -> None:
    assert counted_as(source) == counts_as


def test_one_ipv6_network_has_the_share_of_one_source() -> None:
    places = Places("chat", 100, 2)
    assert [places.enter(f"2a01:4f8:1:2::{host}") for host in range(1, 4)] == [True, True, False]
    assert places.enter("2a01:4f8:1:3::1")
    places.leave("2a01:4f8:1:2::1")
    assert places.enter("2a01:4f8:1:2::9") and not places.enter("2a01:4f8:1:2::a")
    assert places.taken == 3
    buckets = Buckets(rate=1, burst=2, clock=lambda: 0.0)
    assert [buckets.take(f"2a01:4f8:1:2::{host}") for host in range(1, 4)] == [True, True, False]
    assert buckets.owe("2a01:4f8:1:2::9", 1) == 1


def test_strangers_over_libp2p_never_take_all_places() -> None:
    places = Places("chat", 10, 2)
    entered = [peer for peer in PEER_IDS if places.enter(peer)]
    assert len(entered) == 5
    assert sum(places.enter(f"8.8.8.{host}") for host in range(4)) == 4 and places.enter(RELAY)
    assert not places.enter("9.9.9.9")
    with pytest.raises(Busy), places.take(PEER_IDS[-1]):
        pass
    for peer in entered:
        places.leave(peer)
    assert sum(places.enter(peer) for peer in PEER_IDS) == 5


def test_where_there_is_one_place_libp2p_may_take_it() -> None:
    places = Places("chat", 1, 1)
    assert places.enter(PEER_IDS[0]) and not places.enter(PEER_IDS[1])


def test_what_a_relay_carries_leaves_room_for_everybody_else() -> None:
    api, relay = Limits(), RelayLimits()
    relayed = relay.held + 2 * relay.streams
    assert relayed <= api.connections * 3 / 5
    assert api.connections - relayed >= api.chats + api.connections_per_source
    # All over libp2p: half of the holders and of the askers, and whoever takes the streams.
    assert relay.held // 2 + relay.streams // 2 + relay.streams <= api.connections // 2
    # One household.
    of_one = relay.held_per_source * (1 + relay.streams_per_holder) + relay.streams_per_asker
    assert of_one <= api.connections_per_source
