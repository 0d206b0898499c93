"""The ways to another node's peer API, and the first of them that works.

    direct    a URL that it announces
    libp2p    a stream through both nodes' IPFS, which goes through most NATs
    relayed   through a third node that the other one asked to carry for it; that node sees sealed frames

Direct ways and libp2p are tried at once. Relays follow a moment later, or when nothing else is left, so that an answer does not
wait for a hole to be punched. A way counts when the node at its end says that it is the one that is meant; what is sent over it
afterwards is sealed or signed, so that a lie leads nowhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import aiohttp

from daemon.config import Network
from daemon.errors import Declined, Unreachable, Unserved, VerificationError
from daemon.ipfs.interface import IpfsNode
from daemon.membership import ASKED, Membership
from daemon.peerapi.kinds import BYTES, MESSAGES, Kind
from daemon.peerapi.ping import ping
from daemon.peerapi.racing import Losers, Race, first
from registry import ranges
from registry.endpoints import peer_of, relay_address
from registry.records import Address, Peer

CONNECT_S = 5.0  # for one way to a peer
RELAYS_AFTER_S = 0.3  # head start of the ways without a relay
_URLS_TRIED = 3
_MULTIADDRS_TRIED = 8
_LOOK_S = 0.1
_REACHED_KEPT = 1024  # nodes of which is known how they were reached

AUTO, NEVER = "auto", "never"  # of `via`; anything else is the node key of a relay


@dataclass(frozen=True, slots=True)
class Way:
    """The base `url` at which a peer's peer API is reached from here; `via` is the relay's node key, None without one.

    `node` is the key of the peer, empty when it is not known yet.
    """

    url: str
    via: str | None = None
    node: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """For every request over this way: whom it is for. The `Membership` of the session makes its proof of it."""
        return {ASKED: self.node}


class Relays(Protocol):
    """The asking half of relaying (daemon/relaying)."""

    def through(
        self, relay: Way, node: str, *, kind: Kind = MESSAGES
    ) -> AbstractAsyncContextManager[str]:
        """A base URL on loopback that leads through the peer API of `relay` to `node`'s.

        Raises `Unserved`, `Declined` where the relay's owner does not want this `kind`, or `Busy`.
        """
        ...

    def carried_here(self, node: str) -> AbstractAsyncContextManager[str] | None:
        """The same for a node that this one carries for; None when it does not."""
        ...


class Ways:
    """`ipfs` gives the IPFS node, waiting a moment where it is about to answer; None when there is none. `network` is the kind
    of network this node lives in. `http` has the middleware of `membership`.

    `relays` and `lookup`, which gives a known node by its key, are set once.
    """

    def __init__(
        self,
        *,
        network: Network,
        ipfs: Callable[[], Awaitable[IpfsNode | None]],
        http: aiohttp.ClientSession,
        membership: Membership,
    ) -> None:
        self._membership = membership
        self._network = network
        self._ipfs = ipfs
        self._http = http
        self.relays: Relays | None = None
        self.lookup: Callable[[str], Peer | None] = lambda node: None
        self.losers = Losers()  # ways that were too late, until they are closed
        self._reached: dict[str, str | None] = {}  # by node: the relay of the last way to it
        self._answers = 0

    async def close(self) -> None:
        """Wait until the ways that were too late are closed: seconds at most. Idempotent.

        Call it when nobody opens a way any more, and before IPFS and the `http` of relays go.
        """
        await self.losers.close()

    @property
    def answering(self) -> bool:
        """Whether somebody waits for an answer that comes over one of them."""
        return self._answers > 0

    @contextmanager
    def an_answer(self) -> Iterator[None]:
        """An answer comes over one of them while the context lasts: what carries it must not be taken away."""
        self._answers += 1
        try:
            yield
        finally:
            self._answers -= 1

    def via(self, node: str) -> str | None:
        """The relay through which a node was reached last; None when it was none."""
        return self._reached.get(node)

    @asynccontextmanager
    async def to(
        self,
        peer: Peer,
        *,
        via: str = AUTO,
        avoid: Collection[str] = (),
        deadline_s: float = CONNECT_S,
        bulk: bool = False,
    ) -> AsyncIterator[Way]:
        """The first way to a peer's peer API that works; it stays open while the context lasts. `bulk`: for bytes of models,
        which few relays carry.

        Relays in `avoid` are not used: one may carry a ping and drop what follows.

        Raises `Unreachable` with the reason of each way that failed (`Declined` where one was a relay that does not want to),
        `VerificationError` when another node answers everywhere.
        """
        kind = BYTES if bulk else MESSAGES
        candidates = self._candidates(peer, via, avoid, kind=kind)
        if not candidates and via not in (AUTO, NEVER):
            raise Unserved("peer", f"node {via.removeprefix('ed25519:')[:8]} does not carry for it")
        if _says_how(peer):
            stack, way = await self._first(candidates, peer.node, deadline_s)
        else:
            stack, way = await self._now_or_later(
                candidates, peer.node, via, avoid, kind, deadline_s
            )
        self._note(peer.node, way)
        async with stack:
            yield way

    @asynccontextmanager
    async def to_address(
        self, address: Address, *, deadline_s: float = CONNECT_S
    ) -> AsyncIterator[Way]:
        """The same for an address that a person gave: it may name any host."""
        peer = Peer(address.node, _peer_id(address), address, 0, 0)
        ways = self._candidates(peer, AUTO, named_by_a_person=True)
        stack, way = await self._first(ways, address.node, deadline_s)
        async with stack:
            yield way

    async def _now_or_later(
        self,
        candidates: Sequence[_Candidate],
        node: str,
        via: str,
        avoid: Collection[str],
        kind: Kind,
        deadline_s: float,
    ) -> tuple[AsyncExitStack, Way]:
        """The first way to a node that announces none: it has joined just now, and says how it is reached in a moment."""

        async def later() -> tuple[AsyncExitStack, Way]:
            peer = await self._announced(node, deadline_s)
            said = self._candidates(peer, via, avoid, kind=kind)
            return await self._first(said, node, deadline_s)

        try:
            return await first([self._first(candidates, node, deadline_s), later()], self.losers)
        except Unserved as error:
            raise Unreachable(error.what, error.why, error.hint) from error

    async def _announced(self, node: str, deadline_s: float) -> Peer:
        """A node as soon as it announces an endpoint."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            peer = self.lookup(node)
            if peer is None:
                raise _no_way()
            if _says_how(peer):
                return peer
            await asyncio.sleep(_LOOK_S)
        raise Unreachable("peer", "it does not say how it is reached", "try again soon")

    def _note(self, node: str, way: Way) -> None:
        self._reached.pop(node, None)
        self._reached[node] = way.via
        if len(self._reached) > _REACHED_KEPT:
            del self._reached[next(iter(self._reached))]  # the one reached longest ago

    # -- which ways there are ---------------------------------------------------------------------------------------

    def _candidates(
        self,
        peer: Peer,
        via: str,
        avoid: Collection[str] = (),
        *,
        kind: Kind = MESSAGES,
        named_by_a_person: bool = False,
    ) -> list[_Candidate]:
        address = peer.address
        found: list[_Candidate] = []
        if via in (AUTO, NEVER):
            urls = [
                url
                for url in address.http
                if named_by_a_person or ranges.allows_url(self._network, url)
            ]
            found += [_Candidate(_open_url(url)) for url in urls[:_URLS_TRIED]]
            if peer.peer_id is not None:
                found.append(_Candidate(self._libp2p(peer.peer_id, address.ipfs)))
        if via != NEVER:
            found += self._relayed(peer, via, avoid, kind)
        return found

    def _relayed(
        self, peer: Peer, via: str, avoid: Collection[str], kind: Kind
    ) -> list[_Candidate]:
        relays = self.relays
        if relays is None:
            return []
        delay = RELAYS_AFTER_S if via == AUTO else 0.0
        here = relays.carried_here(peer.node) if via == AUTO else None
        if here is not None:
            return [_Candidate(_open(here, None), 0.0)]
        carriers = [self._carrier(relay_address(point)) for point in peer.address.relays]
        if via != AUTO:
            # A relay that somebody names may carry for the peer although the peer does not say so.
            known = self.lookup(via)
            named = [one for one in carriers if one.node == via]
            carriers = named or ([known] if known is not None and known.relay else [])
        return [
            _Candidate(self._over(relays, one, peer.node, kind), delay)
            for one in carriers
            if one.node not in avoid
        ]

    def _carrier(self, point: Address) -> Peer:
        """A relay, at the endpoint that the peer names for it and at those that are known here."""
        known = self.lookup(point.node) or Peer(point.node, None, Address(point.node), 0, 0)
        address = Address(
            point.node,
            ipfs=tuple(dict.fromkeys((*point.ipfs, *known.address.ipfs))),
            http=tuple(dict.fromkeys((*point.http, *known.address.http))),
        )
        return Peer(point.node, known.peer_id or _peer_id(address), address, 0, 0)

    @asynccontextmanager
    async def _libp2p(self, peer_id: str, multiaddrs: Sequence[str]) -> AsyncIterator[Way]:
        node = await self._ipfs()
        if node is None:
            raise Unserved("peer", "IPFS is not running here")
        allowed = [one for one in multiaddrs if ranges.allows_multiaddr(self._network, one)]
        await reach(node, peer_id, allowed, losers=self.losers)
        async with node.dial(self._membership.protocol, peer_id) as (host, port):
            yield Way(f"http://{host}:{port}")

    @asynccontextmanager
    async def _over(
        self, relays: Relays, carrier: Peer, node: str, kind: Kind
    ) -> AsyncIterator[Way]:
        async with (
            self.to(carrier, via=NEVER) as first_leg,
            relays.through(first_leg, node, kind=kind) as url,
        ):
            yield Way(url, carrier.node)

    # -- the first that works -----------------------------------------------------------------------------------------

    async def _first(
        self, candidates: Sequence[_Candidate], node: str, deadline_s: float
    ) -> tuple[AsyncExitStack, Way]:
        if not candidates:
            raise _no_way()
        race = Race(len(candidates))
        try:
            return await first(
                (self._attempt(one, node, deadline_s, race) for one in candidates), self.losers
            )
        except Declined:
            raise
        except Unserved as error:
            raise Unreachable(error.what, error.why, error.hint) from error

    async def _attempt(
        self, candidate: _Candidate, node: str, deadline_s: float, race: Race
    ) -> tuple[AsyncExitStack, Way]:
        try:
            await race.wait(candidate.delay_s)
            async with AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(deadline_s):
                        way = await stack.enter_async_context(candidate.way)
                        found = await ping(
                            self._http,
                            way.url,
                            membership=self._membership,
                            node=node,
                            deadline_s=deadline_s,
                        )
                except TimeoutError:
                    why = f"no answer within {deadline_s:g} s"
                    raise Unserved("peer", why, "try again") from None
                if node and found != node:
                    raise VerificationError("peer", "another node answers there")
                return stack.pop_all(), replace(way, node=found)
        finally:
            race.failed_or_won()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A way, and how long the others have a head start."""

    way: AbstractAsyncContextManager[Way]
    delay_s: float = 0.0


@asynccontextmanager
async def _open_url(url: str) -> AsyncIterator[Way]:
    yield Way(url)


@asynccontextmanager
async def _open(
    tunnel: AbstractAsyncContextManager[str], via: str | None
) -> AsyncIterator[Way]:
    async with tunnel as url:
        yield Way(url, via)


def _no_way() -> Unreachable:
    return Unreachable("peer", "there is no way to it", "check that it runs, and its address")


def _says_how(peer: Peer) -> bool:
    """Whether a node announces any endpoint."""
    address = peer.address
    return bool(address.http or address.ipfs or address.relays)


def _peer_id(address: Address) -> str | None:
    return peer_of(address.ipfs[0]) if address.ipfs else None


async def reach(
    node: IpfsNode, peer_id: str, addresses: Sequence[str], *, losers: Losers | None = None
) -> None:
    """Be connected to `peer_id` over libp2p. Addresses that were too late are `losers`; without, they are waited for.

    Raises `Unserved` when none of its addresses works, `Unavailable` without IPFS.
    """
    if peer_id in await node.peers():
        return
    own = [address for address in addresses if address.endswith(f"/p2p/{peer_id}")]
    # Without any address the DHT may still know one.
    tried = own[:_MULTIADDRS_TRIED] or [f"/p2p/{peer_id}"]
    late = losers or Losers()
    try:
        await first((node.connect(address, deadline_s=CONNECT_S) for address in tried), late)
    finally:
        if losers is None:
            await late.close()
