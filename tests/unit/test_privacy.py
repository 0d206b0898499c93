"""Who learns what: each setting and each fact that changes it changes what is told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon import config
from daemon.api.views import privacy_facts
from daemon.config import Config
from daemon.privacy import Exposure, Facts, exposures
from tests.functional.api_server import ALONE

PUBLIC = Config(home=Path("/"))
QUIET = Facts(models=2, serving=1, upstreams=0, relays=0, relaying=False, closed=False)


def with_settings(**given: Any) -> Config:
    """Dotted names are written with two underscores."""
    flags = {name.replace("__", "."): str(value) for name, value in given.items()}
    return config.load(Path("/nonexistent"), {}, flags)


def told(settings: Config, facts: Facts = QUIET) -> dict[str, Exposure]:
    return {exposure.who: exposure for exposure in exposures(settings, facts)}


def who(word: str, found: dict[str, Exposure]) -> list[Exposure]:
    return [exposure for name, exposure in found.items() if word in name]


def test_on_loopback_only_this_machine_learns_anything() -> None:
    found = told(with_settings(network="loopback"))
    for word in ("DHT", "BitTorrent", "IPFS", "bootstrap", "internet", "relay", "code"):
        assert who(word, found) == []
    assert who("joined", found) and who("token", found) and who("nobody", found)
    (server,) = who("answers your question", found)
    assert "address" not in server.learns


def test_the_public_network_is_told_whole() -> None:
    found = told(PUBLIC)
    (server,) = who("answers your question", found)
    assert "prompt" in server.learns and "--via NODE" in server.change
    (relay,) = who("a relay that carries", found)
    assert "nothing of the text" in relay.learns and "--via never" in relay.change
    for word in ("IPFS DHT", "BitTorrent DHT", "knows the code", "bootstrap", "listens to the swarm"):
        assert len(who(word, found)) == 1, word
    assert who("internet", found) == []  # swarm.open is off


@pytest.mark.parametrize(
    ("given", "gone"),
    [
        ({"ipfs__enabled": False}, "IPFS"),
        ({"torrent__enabled": False}, "BitTorrent"),
        ({"swarm__rendezvous": False}, "knows the code"),
        ({"network": "lan"}, "bootstrap"),
    ],
)
def test_what_is_switched_off_tells_nobody(given: dict[str, Any], gone: str) -> None:
    assert who(gone, told(PUBLIC))
    assert who(gone, told(with_settings(**given))) == []


def test_the_bootstrap_hosts_are_those_of_the_networks_that_are_on() -> None:
    (both,) = who("bootstrap", told(PUBLIC))
    (one,) = who("bootstrap", told(with_settings(ipfs__enabled=False)))
    assert "ipfs.bootstrap" in both.change and "ipfs.bootstrap" not in one.change
    assert "torrent.dht_bootstrap" in both.change and "torrent.dht_bootstrap" in one.change


def test_without_bootstrap_hosts_there_are_none() -> None:
    none = replace(
        PUBLIC,
        ipfs=replace(PUBLIC.ipfs, bootstrap=()),
        torrent=replace(PUBLIC.torrent, dht_bootstrap=()),
    )
    assert who("bootstrap", told(none)) == []
    off = replace(PUBLIC.ipfs, enabled=False)
    assert who("bootstrap", told(replace(none, ipfs=off))) == []
    (one,) = who("bootstrap", told(replace(none, torrent=PUBLIC.torrent)))
    assert "a BitTorrent node" in one.learns and "IPFS" not in one.learns + one.change


def test_introductions_tell_an_address_through_relays_too() -> None:
    (told_of,) = who("for a torrent that it holds", told(PUBLIC))
    assert "outside address" in told_of.learns and "relay" in told_of.learns
    (closed,) = who("for a torrent that it holds", told(PUBLIC, replace(QUIET, closed=True)))
    assert "members" in closed.who
    for settings in ({"torrent__enabled": False}, {"network": "loopback"}):
        assert not who("for a torrent that it holds", told(with_settings(**settings)))


def test_what_the_dhts_were_told_stays_for_a_while() -> None:
    (ipfs,) = who("IPFS DHT", told(PUBLIC))
    (rendezvous,) = who("knows the code", told(PUBLIC))
    assert "48 hours" in ipfs.learns and "48 hours" in rendezvous.change


def test_an_open_peer_api_is_told_in_public_only() -> None:
    assert who("internet", told(with_settings(swarm__open=True)))
    assert not who("internet", told(with_settings(swarm__open=True, network="lan")))


def test_a_closed_swarm_tells_its_members_only() -> None:
    closed = replace(QUIET, closed=True)
    found = told(with_settings(swarm__open=True), closed)
    assert who("members", found) and not who("listens to the swarm", found)
    assert who("secret", found) and not who("knows the code", found)
    (stranger,) = who("internet", found)
    assert "members only" in stranger.learns


def test_relays_learn_codes_while_they_announce_them() -> None:
    assert not who("for this one", told(PUBLIC))
    assert who("the node that carries for this one", told(PUBLIC, replace(QUIET, relays=1)))
    held = replace(QUIET, relays=2)
    (announcing,) = who("carry for this one", told(PUBLIC, held))
    (silent,) = who("carry for this one", told(with_settings(swarm__rendezvous=False), held))
    assert "the 2 nodes" in announcing.who
    assert "codes" in announcing.learns and "codes" not in silent.learns
    assert "swarm.rendezvous" in announcing.change and "swarm.rendezvous" not in silent.change


def test_who_carries_is_told_what_it_carries() -> None:
    relaying = replace(QUIET, relaying=True)
    (chats,) = who("you carry for", told(PUBLIC, relaying))
    (bytes_too,) = who("you carry for", told(with_settings(swarm__relay_bytes=True), relaying))
    assert "bytes of models" in bytes_too.learns and "bytes of models" not in chats.learns
    assert not who("you carry for", told(PUBLIC))


def test_upstreams_see_prompts() -> None:
    assert not who("upstream", told(PUBLIC))
    (upstream,) = who("upstream", told(PUBLIC, replace(QUIET, upstreams=1)))
    assert "prompts" in upstream.learns


def test_every_setting_that_is_named_exists() -> None:
    everything = Facts(models=1, serving=1, upstreams=1, relays=1, relaying=True, closed=False)
    text = " ".join(one.change for one in exposures(with_settings(swarm__open=True), everything))
    named = set(re.findall(r"\b(?:swarm|ipfs|torrent)\.[a-z_]+", text))
    assert {"swarm.open", "swarm.relay", "swarm.rendezvous", "swarm.name"} <= named
    assert named <= set(config.settings())


def test_facts_are_read_from_the_status() -> None:
    status = {
        **ALONE,
        "models": 3,
        "serving": ["abc2def"],
        "relays": ["ed25519:" + "ab" * 32],
        "relaying": {"enabled": True, "nodes": 1, "streams": 0, "bytes": 5},
        "swarm": {"name": "office", "closed": True},
    }
    assert privacy_facts(status, 1) == Facts(3, 1, 1, 1, True, True)
