"""Being carried for: a node that nobody can dial keeps connections open to relays, over which it is
rung.

    a slot is     free -> asking a candidate -> held -> free
    free          nothing is wanted, or no candidate is left; looked at again at every change
    asking        refused, gone, or we could not be reached through it: the candidate rests, twice
                  as long each time, and the next one is asked at once
    held          from when we have rung ourselves through the relay, until it goes or nothing is
                  wanted any more

Anybody can offer to carry, and as many nodes as they like: whoever is not known to our owner is
drawn by chance, so that nobody gets to be ours by how it is called or when it is heard.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.config import Network
from daemon.errors import SwarmError
from daemon.peerapi.rests import Rests
from daemon.peerapi.ways import NEVER, Ways
from daemon.relaying.holding import Holding
from daemon.supervise import Supervisor
from registry import ranges
from registry.endpoints import MAX_RELAYS, relay_point
from registry.envelope import key_name
from registry.errors import Malformed
from registry.records import Address, Peer
from registry.relaying import MAX_CODES

_log = logging.getLogger(__name__)

RELAYS = 2  # relays held at the same time
FIRST_REST_S = 1.0
LONGEST_REST_S = 60.0
_LOOK_S = 2.0  # between two looks at the candidates where nothing says that they have changed


class RelayHolder:
    """Holds up to `relays` of `candidates()` while `wanted()`: first those whose node keys are in
    `joined()`, in their order, then others by chance. `codes` are to be announced by them.

    `streams_port` gives the port of our peer API that takes what comes through a relay; `http` is a
    `pipes.session()`. `on_change` is called when `points()` are others. Call `changed` when
    anything that these callables say is different.
    """

    def __init__(
        self,
        key: Ed25519PrivateKey,
        *,
        network: Network,
        ways: Ways,
        http: aiohttp.ClientSession,
        supervisor: Supervisor,
        candidates: Callable[[], Sequence[Peer]],
        joined: Callable[[], Collection[str]],
        codes: Callable[[], Collection[str]],
        wanted: Callable[[], bool],
        streams_port: Callable[[], int],
        on_change: Callable[[], None],
        relays: int = RELAYS,
    ) -> None:
        self._key = key
        self._node = key_name(key)
        self._network: Network = network
        self._ways = ways
        self._http = http
        self._supervisor = supervisor
        self._candidates = candidates
        self._joined = joined
        self._codes = codes
        self._wanted = wanted
        self._streams_port = streams_port
        self._on_change = on_change
        self._slots = min(relays, MAX_RELAYS)
        self._taken: set[str] = set()  # candidates that a slot has to do with
        self._held: dict[str, Peer] = {}
        self._rests = Rests(
            time.monotonic, first_s=FIRST_REST_S, longest_s=LONGEST_REST_S, spread=0.5
        )
        self._news = asyncio.Event()

    def start(self) -> None:
        for name in self._names():
            self._supervisor.run(name, self._fill, restart=True)

    async def close(self) -> None:
        """Withdraw from every relay. Idempotent; takes about a second at most."""
        await asyncio.gather(*(self._supervisor.stop(name) for name in self._names()))

    @property
    def held(self) -> tuple[str, ...]:
        """The node keys of the relays that carry for this node now."""
        return tuple(self._held)

    def points(self) -> tuple[str, ...]:
        """How others reach those relays, for our address: `<64 hex>@ENDPOINT` each."""
        newest = {peer.node: peer for peer in self._candidates() if self._fits(peer)}
        found = (_point(self._network, newest.get(node, peer)) for node, peer in self._held.items())
        return tuple(point for point in found if point is not None)

    def changed(self) -> None:
        """Candidates, codes or what is wanted are different now."""
        self._news.set()
        self._news = asyncio.Event()

    # -- inside ------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        return [f"relay {number}" for number in range(self._slots)]

    async def _fill(self) -> None:
        """One slot, for ever."""
        while True:
            peer = self._next()
            if peer is None:
                await self._wait()
                continue
            self._taken.add(peer.node)
            try:
                await self._hold(peer)
            except SwarmError as error:
                _log.debug("no relay at %s: %s", peer.node[:16], error)
            finally:
                self._taken.discard(peer.node)
            self._rests.begin(peer.node)

    async def _hold(self, peer: Peer) -> None:
        """Be carried for by one relay until it ends. Raises `SwarmError` when it cannot be, or is
        no more.
        """
        try:
            async with self._ways.to(peer, via=NEVER) as way:
                holding = Holding(
                    self._key,
                    peer.node,
                    way,
                    self._http,
                    codes=self._shared_codes,
                    wanted=self._wanted,
                    news=lambda: self._news,
                    streams_port=self._streams_port,
                )
                await holding.run(partial(self._ring_ourselves, peer))
        finally:
            if self._held.pop(peer.node, None) is not None:
                self._on_change()

    async def _ring_ourselves(self, peer: Peer) -> None:
        """A relay counts as held when a ping to us comes through it: it could agree and carry
        nothing. Raises `SwarmError`.
        """
        point = _point(self._network, peer)
        relays = () if point is None else (point,)
        ourselves = Peer(self._node, None, Address(self._node, relays=relays), 0, 0)
        async with self._ways.to(ourselves, via=peer.node):
            pass  # it has answered
        self._held[peer.node] = peer
        self._rests.end(peer.node)
        _log.info("%s carries for this node", peer.node[:16])
        self._on_change()

    def _next(self) -> Peer | None:
        """A candidate that is free and not resting: a joined one, else any."""
        if not self._wanted():
            return None
        candidates = [peer for peer in self._candidates() if self._fits(peer)]
        self._rests.keep_only({peer.node for peer in candidates})
        free: list[Peer] = []
        joined = self._joined()
        for peer in candidates:
            if peer.node in self._taken or self._rests.resting(peer.node):
                continue
            if peer.node in joined:
                return peer
            free.append(peer)
        return random.choice(free) if free else None

    def _fits(self, peer: Peer) -> bool:
        return peer.node != self._node and _point(self._network, peer) is not None

    async def _wait(self) -> None:
        """Until something may have changed."""
        due = self._rests.next_end_s()
        try:
            async with asyncio.timeout(_LOOK_S if due is None else min(_LOOK_S, due)):
                await self._news.wait()
        except TimeoutError:
            pass  # time itself is what changed

    def _shared_codes(self) -> frozenset[str]:
        return frozenset(sorted(self._codes())[:MAX_CODES])


def _point(network: Network, peer: Peer) -> str | None:
    """How a stranger reaches the peer API of `peer`: over HTTP, else over libp2p, never over
    another relay.
    """
    urls = [url for url in peer.address.http if ranges.allows_url(network, url)]
    multiaddrs = [one for one in peer.address.ipfs if ranges.allows_multiaddr(network, one)]
    for endpoint in (*urls, *multiaddrs):
        try:
            return relay_point(f"{peer.node.removeprefix('ed25519:')}@{endpoint}")
        except Malformed:
            continue  # a circuit address
    return None
