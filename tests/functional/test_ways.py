"""How a peer was reached last, over real sockets: directly, or through a relay."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import aiohttp
import pytest

from daemon.errors import Unserved
from daemon.membership import OpenSwarm
from daemon.peerapi import ways as the_module
from daemon.peerapi.kinds import BYTES, MESSAGES, Kind
from daemon.peerapi.ping import Ping
from daemon.peerapi.server import PeerApi
from daemon.peerapi.ways import NEVER, Way, Ways
from registry.records import Address, Peer

HOME = "ed25519:" + "cd" * 32
RELAY = "ed25519:" + "ef" * 32


class Carrying:
    """The asking half of a relay that leads to whatever listens at `url`."""

    def __init__(self, url: str) -> None:
        self._url = url

    @asynccontextmanager
    async def through(self, relay: Way, node: str, *, kind: Kind = MESSAGES) -> AsyncIterator[str]:
        yield self._url

    def carried_here(self, node: str) -> AbstractAsyncContextManager[str] | None:
        return None


async def no_ipfs() -> None:
    return None


def peer(node: str, direct: str | None, relay: str | None = None) -> Peer:
    relays = () if relay is None else (f"{RELAY.removeprefix('ed25519:')}@{relay}",)
    urls = () if direct is None else (direct,)
    return Peer(node, None, Address(node, http=urls, relays=relays), 1, 1)


@asynccontextmanager
async def answering(node: str) -> AsyncIterator[str]:
    api = PeerApi(Ping(node, OpenSwarm()).routes(), membership=OpenSwarm())
    async with api.listening(["127.0.0.1"], 0) as ports:
        yield f"http://127.0.0.1:{ports.direct}"


async def test_how_a_peer_was_reached_is_known_until_it_is_reached_anew() -> None:
    async with answering(HOME) as home, answering(RELAY) as relay, aiohttp.ClientSession() as http:
        ways = Ways(network="loopback", ipfs=no_ipfs, http=http, membership=OpenSwarm())
        ways.relays = Carrying(home)
        assert ways.via(HOME) is None
        async with ways.to(peer(HOME, None, relay)) as way:
            assert way.via == RELAY
        assert (ways.via(HOME), ways.via(RELAY)) == (RELAY, None)
        async with ways.to(peer(HOME, home, relay), via=NEVER) as way:
            assert way.via is None
        assert ways.via(HOME) is None
        with pytest.raises(Unserved):
            async with ways.to(peer(HOME, None), via=NEVER, deadline_s=0.1):
                pass
        assert ways.via(HOME) is None
        with pytest.raises(Unserved, match="node 12121212 does not carry for it"):
            async with ways.to(peer(HOME, home, relay), via="ed25519:" + "12" * 32):
                pass


async def test_a_peer_that_has_just_joined_is_reached_when_it_says_how() -> None:
    async with answering(HOME) as home, aiohttp.ClientSession() as http:
        ways = Ways(network="loopback", ipfs=no_ipfs, http=http, membership=OpenSwarm())
        asked: list[str] = []

        def lookup(node: str) -> Peer:
            asked.append(node)
            return peer(node, home if len(asked) > 2 else None)

        ways.lookup = lookup
        async with ways.to(peer(HOME, None)) as way:
            assert way.url == home
        assert asked == [HOME] * 3


async def test_one_that_never_says_how_is_given_up() -> None:
    async with aiohttp.ClientSession() as http:
        ways = Ways(network="loopback", ipfs=no_ipfs, http=http, membership=OpenSwarm())
        ways.lookup = lambda node: peer(node, None)
        with pytest.raises(Unserved, match="it does not say how it is reached"):
            async with ways.to(peer(HOME, None), deadline_s=0.1):
                pass


async def test_only_the_latest_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_module, "_REACHED_KEPT", 2)
    async with answering(HOME) as home, answering(RELAY) as relay, aiohttp.ClientSession() as http:
        ways = Ways(network="loopback", ipfs=no_ipfs, http=http, membership=OpenSwarm())
        ways.relays = Carrying(home)
        async with ways.to(peer(HOME, None, relay)):
            assert ways.via(HOME) == RELAY
        third = "ed25519:" + "12" * 32
        async with answering(third) as url, ways.to(peer(third, url)):
            assert ways.via(HOME) == RELAY  # the relay was reached before it
        async with ways.to(peer(RELAY, relay)):
            assert ways.via(HOME) is None


class NotingKinds(Carrying):
    """Notes what it is asked to carry."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.kinds: list[Kind] = []

    @asynccontextmanager
    async def through(self, relay: Way, node: str, *, kind: Kind = MESSAGES) -> AsyncIterator[str]:
        self.kinds.append(kind)
        async with super().through(relay, node, kind=kind) as url:
            yield url


@pytest.mark.parametrize(("bulk", "kind"), [(False, MESSAGES), (True, BYTES)])
@pytest.mark.parametrize("joined_just_now", [False, True])
async def test_a_relay_is_told_what_it_is_to_carry(
    bulk: bool, kind: Kind, joined_just_now: bool
) -> None:
    """Also for a node that says only later how it is reached: bytes of models never pass as messages."""
    async with answering(HOME) as home, answering(RELAY) as relay, aiohttp.ClientSession() as http:
        ways = Ways(network="loopback", ipfs=no_ipfs, http=http, membership=OpenSwarm())
        ways.relays = relays = NotingKinds(home)
        ways.lookup = lambda node: peer(node, None, relay)
        known = peer(HOME, None, None if joined_just_now else relay)
        async with ways.to(known, bulk=bulk) as way:
            assert way.via == RELAY
        assert relays.kinds == [kind]
        await ways.close()
