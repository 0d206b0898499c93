"""Through whom an answer may come, as a person writes it."""

from __future__ import annotations

import pytest

from daemon.api.via import relay, relays_of
from daemon.errors import Ambiguous, NotFound, UsageError
from registry.records import Address, Peer

ONE = "ed25519:" + "1a2b3c4d" + "00" * 28
TWIN = "ed25519:" + "1a2b3c4d" + "11" * 28
HOME = "ed25519:" + "cd" * 32
NAMED = "ed25519:" + "ef" * 32  # no peer itself: HOME names it as its relay
POINT = "ef" * 32 + "@http://9.9.9.9:8788"


def peer(node: str, *relays: str) -> Peer:
    return Peer(node, None, Address(node, relays=relays), 1, 1)


PEERS = [peer(ONE), peer(TWIN), peer(HOME, POINT)]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("auto", "auto"),
        ("never", "never"),
        (ONE, ONE),
        (ONE.removeprefix("ed25519:"), ONE),
        ("1a2b3c4d0", ONE),
        ("ed25519:1A2B3C4D1", TWIN),
        ("cdcdcdcd", HOME),
        ("efefefef", NAMED),
    ],
)
def test_a_node_is_named_by_its_beginning(written: str, meant: str) -> None:
    assert relay(written, PEERS) == meant


@pytest.mark.parametrize(
    "written",
    ["", "Auto", "1a2b3c4", "1a2b3c4x", "ed25519:", "ed25519:1a2b", "0" * 65, "x" * 9000, "1a2b3c4d\n"],
)
def test_what_names_no_node(written: str) -> None:
    with pytest.raises(UsageError) as refused:
        relay(written, PEERS)
    assert (refused.value.exit_code, "\n" in str(refused.value)) == (2, False)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("written", ["abababab", "ed25519:" + "ab" * 32])
def test_a_node_that_is_not_known_here(written: str) -> None:
    with pytest.raises(NotFound) as unknown:
        relay(written, PEERS)
    assert (unknown.value.exit_code, "swarmctl peers" in unknown.value.hint) == (3, True)
    with pytest.raises(NotFound):
        relay(written, [])


def test_a_beginning_of_several_nodes_says_which() -> None:
    with pytest.raises(Ambiguous) as several:
        relay("1a2b3c4d", PEERS)
    assert several.value.exit_code == 3
    assert ONE[8:24] in str(several.value) and TWIN[8:24] in str(several.value)


def test_the_relays_of_a_peer_are_named_once() -> None:
    assert relays_of(peer(HOME)) == []
    assert relays_of(peer(HOME, POINT, POINT.replace("8788", "8789"))) == [NAMED]
