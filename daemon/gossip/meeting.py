"""Meeting another node over its peer API: each gives what the other lacks, of itself and of everybody that it knows."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

import aiohttp

from daemon.errors import Unserved, VerificationError
from daemon.gossip import exchange
from daemon.gossip.ear import Ear
from daemon.gossip.exchange import Words
from daemon.gossip.peers import PeerTable
from daemon.membership import Membership
from daemon.peerapi.rests import Rests
from daemon.peerapi.ways import CONNECT_S, Way, Ways
from registry import announcement as rules
from registry.records import Address, Peer

FEW = 1000  # nodes whose newest words are listed in each exchange, although pubsub brings them


class Meeting:
    """`own` is our node key; `own_news` gives our signed words that somebody lacks, see `OwnPages.news`; `pubsub` says whether we
    hear the others without asking. `rests` are the nodes that `tell` and `ask` did not reach.
    """

    def __init__(
        self,
        own: str,
        ways: Ways,
        http: aiohttp.ClientSession,
        ear: Ear,
        table: PeerTable,
        membership: Membership,
        *,
        own_news: Callable[[int, Collection[int]], Awaitable[list[bytes]]],
        pubsub: Callable[[], bool],
    ) -> None:
        self.rests = Rests(time.monotonic)
        self._own_id = rules.node_id(own)
        self._ways = ways
        self._http = http
        self._ear = ear
        self._table = table
        self._membership = membership
        self._own_news = own_news
        self._pubsub = pubsub
        self._random = random.Random()

    async def meet(
        self,
        address: Address,
        *,
        joined: bool = False,
        codes: Sequence[str] = (),
        deadline_s: float = CONNECT_S,
    ) -> Peer:
        """The node at an address that a person gave, or that the caller knows to be allowed: any host is asked.

        One that was `joined` finds a place for ever. It is asked first of all for who offers a model with one of the short
        `codes`, at most `exchange.MAX_CODES`.
        Raises `Unserved` with each way that failed, `VerificationError` when another node answers.
        """
        async with self._ways.to_address(address, deadline_s=deadline_s) as way:
            return await self.over(way, address.node, joined=joined, codes=codes)

    async def meet_again(self, peer: Peer) -> Peer:
        """A node that is remembered, where it announced itself and this kind of network leads. Raises as `meet` does."""
        async with self._ways.to(peer) as way:
            return await self.over(way, peer.node)

    async def over(
        self, way: Way, node: str, *, joined: bool = False, codes: Sequence[str] = ()
    ) -> Peer:
        """The node at the end of a way; `node` is the key that is expected there, empty when it is not known."""
        question = self._asking_all(await self._own_news(0, ()), codes)
        answer = await self._post(way, question)
        if not answer.envelopes:
            raise Unserved("peer", "it says nothing about itself")
        said = exchange.speaker(answer.envelopes[0])
        if node and said.node != node:
            raise VerificationError("peer", "another node answers there")
        newly = joined and self._table.keep(said.node)
        heard = await self._ear.take_in(answer.envelopes)
        peer = self._table.peer(said.node)
        if peer is None:
            if newly:
                self._table.release(said.node)
            raise Unserved("peer", str(heard[0]))
        self.rests.end(said.node)
        await self._give(way, answer)
        return peer

    async def tell(self, peer: Peer, words: Sequence[bytes]) -> None:
        """Give our words to a node that is known, and each what the other lacks. Raises `Unserved` or `VerificationError`."""
        with self.rests.trying(peer.node):
            async with self._ways.to(peer) as way:
                answer = await self._post(way, self._asking(words))
                await self._ear.take_in(answer.envelopes)
                await self._give(way, answer)

    async def ask(self, peer: Peer, about: str) -> None:
        """Ask a node for the pages that are missing here, those of the node `about` first, and for nothing else.

        Raises as `tell` does.
        """
        with self.rests.trying(peer.node):
            async with self._ways.to(peer) as way:
                question = Words(want=self._table.want(exchange.MAX_WANT, about))
                await self._ear.take_in((await self._post(way, question)).envelopes)

    async def bid_farewell(self, peer: Peer, words: Sequence[bytes]) -> None:
        """Give our words and ask nothing. Raises as `tell` does."""
        async with self._ways.to(peer) as way:
            await self._post(way, Words(words))

    async def answer(self, brought: Words) -> Words:
        """What is given to somebody who brought these words: what they lack of us and of the others, and what we lack."""
        lacked = await self._lacked(brought, own_too=self._is_asked(brought))
        return Words(lacked) if brought.have is None else self._asking(lacked)

    def _is_asked(self, words: Words) -> bool:
        return words.have is not None or self._own_id in words.want

    async def _post(self, way: Way, words: Words) -> Words:
        return await exchange.post(self._http, way, words, self._membership)

    def _asking(self, words: Sequence[bytes]) -> Words:
        """Our words, and what we have and want. In a large swarm what pubsub brings is not asked for: the list would be long."""
        if self._pubsub() and self._table.count() > FEW:
            return Words(words, None, self._table.want(exchange.MAX_WANT))
        return self._asking_all(words)

    def _asking_all(self, words: Sequence[bytes], codes: Sequence[str] = ()) -> Words:
        return Words(words, self._table.have(), self._table.want(exchange.MAX_WANT), codes)

    async def _give(self, way: Way, answer: Words) -> None:
        """What the other lacks after it has answered, if anything."""
        lacked = await self._lacked(answer, own_too=self._own_id in answer.want)
        if lacked:
            # Whoever speaks puts itself first, or the other would take us for whom we pass on.
            own = await self._own_news(rules.MAX_SEQUENCE, ())
            await self._post(way, Words(list(dict.fromkeys([*own, *lacked]))))

    async def _lacked(self, words: Words, *, own_too: bool = True) -> list[bytes]:
        own: list[bytes] = []
        if own_too:
            heard = words.have.get(self._own_id, 0) if words.have is not None else rules.MAX_SEQUENCE
            own = await self._own_news(heard, words.want.get(self._own_id, ()))
        limit, codes = exchange.BODY_LIMIT, words.codes
        others = self._table.news(words.have, words.want, codes=codes, limit=limit)
        sought = self._table.pages_with(codes)
        return exchange.chosen(own, others, sought=sought, shuffle=self._random)
