"""Meeting another node over its peer API: our pages for its own and those of the others that it knows."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence

import aiohttp

from daemon.errors import Unserved, VerificationError
from daemon.gossip import exchange
from daemon.gossip.ear import Ear
from daemon.gossip.peers import PeerTable
from daemon.membership import Membership
from daemon.peerapi.ways import CONNECT_S, Way, Ways
from registry.records import Address, Peer


class Meeting:
    """`own_pages` gives our signed pages; `bridge` says whether the others' pages are passed on to whom we meet."""

    def __init__(
        self,
        ways: Ways,
        http: aiohttp.ClientSession,
        ear: Ear,
        table: PeerTable,
        membership: Membership,
        *,
        own_pages: Callable[[], Awaitable[Sequence[bytes]]],
        bridge: Callable[[], bool],
    ) -> None:
        self._ways = ways
        self._http = http
        self._ear = ear
        self._table = table
        self._membership = membership
        self._own_pages = own_pages
        self._bridge = bridge
        self._random = random.Random()

    async def meet(self, address: Address, *, deadline_s: float = CONNECT_S) -> Peer:
        """The node at an address that a person gave, or that was met before.

        Raises `Unserved` with each way that failed, `VerificationError` when another node answers.
        """
        async with self._ways.to_address(address, deadline_s=deadline_s) as way:
            return await self.over(way, address.node)

    async def over(self, way: Way, node: str) -> Peer:
        """The node at the end of a way; `node` is the key that is expected there, empty when it is not known."""
        envelopes = await self._post(way, await self._own_pages())
        if not envelopes:
            raise Unserved("peer", "it says nothing about itself")
        said = exchange.speaker(envelopes[0])
        if node and said.node != node:
            raise VerificationError("peer", "another node answers there")
        heard = await self._ear.take_in(envelopes)
        peer = self._table.peer(said.node)
        if peer is None:
            raise Unserved("peer", str(heard[0]))
        return peer

    async def tell(self, peer: Peer, pages: Sequence[bytes]) -> None:
        """Give our pages to a node that is known, and take in what it gives. Raises `Unserved` or `VerificationError`."""
        # A node without IPFS depends on those that pass on to it what pubsub says.
        others = self._table.envelopes() if self._bridge() else {}
        said = exchange.chosen(pages, others, shuffle=self._random)
        async with self._ways.to(peer) as way:
            await self._ear.take_in(await self._post(way, said))

    async def _post(self, way: Way, envelopes: Sequence[bytes]) -> list[bytes]:
        return await exchange.post(self._http, way, envelopes, self._membership)

    def answer(self, own: Sequence[bytes], brought: Sequence[bytes]) -> list[bytes]:
        """What is given to somebody who brought `brought`: our pages, then those of the others, none that it has."""
        known = set(brought)
        others = {
            node: [page for page in pages if page not in known]
            for node, pages in self._table.envelopes().items()
        }
        return exchange.chosen(own, others, shuffle=self._random)
