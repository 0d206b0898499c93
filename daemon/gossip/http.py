"""Words over HTTP between peer APIs: the transport for nodes that pubsub does not reach.

Told are the nodes that we joined; without IPFS also the last that told us, and some others, chosen by chance. Chance alone would
leave out a node that has nobody but us, the more so the more nodes have left without a word. What pubsub brings is passed on to
nodes without IPFS that spoke to us, and by `TELLERS` or so of all that hear it to each of the others. Whoever was not reached rests
(peerapi/rests.py).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from aiohttp import web

from daemon.buckets import Buckets
from daemon.errors import Busy, SwarmError, UsageError
from daemon.gossip import exchange
from daemon.gossip.ear import Ear
from daemon.gossip.exchange import Words
from daemon.gossip.meeting import Meeting
from daemon.gossip.peers import PeerTable
from daemon.membership import Membership
from daemon.peerapi.limits import Limits
from daemon.peerapi.server import Route, read_body, source_of
from daemon.supervise import Supervisor
from registry.errors import Malformed, NotVerified
from registry.records import Announcement, Peer

_log = logging.getLogger(__name__)

TOLD = 8  # nodes told besides the joined ones: the last that told us, and as many of the others
TOLD_OF_NOTHING = 3  # the same for a beat
TELLERS = 3  # nodes on pubsub that pass a page on to a node without IPFS, about, besides those that it spoke to


class Http:
    """`joined` are the nodes that a person joined, `with_ipfs` says whether pubsub can be used."""

    def __init__(
        self,
        meeting: Meeting,
        ear: Ear,
        table: PeerTable,
        supervisor: Supervisor,
        membership: Membership,
        *,
        joined: Callable[[], Iterable[Peer]],
        with_ipfs: Callable[[], bool],
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        self._meeting = meeting
        self._ear = ear
        self._table = table
        self._supervisor = supervisor
        self._membership = membership
        self._joined = joined
        self._with_ipfs = with_ipfs
        self._newest: Sequence[bytes] = ()
        self._tell_again: set[str] = set()
        self._told_by: deque[str] = deque(maxlen=TOLD)  # the last nodes that spoke to us themselves
        self._random = random.Random()
        self._exchanges = Buckets(
            rate=limits.announce_rate, burst=limits.announce_burst, clock=time.monotonic
        )
        self._envelopes = Buckets(
            rate=limits.envelopes_rate, burst=limits.envelopes_burst, clock=time.monotonic
        )

    # -- Transport ----------------------------------------------------------------------------------------------------

    async def say(self, words: Sequence[bytes], *, news: bool) -> None:
        self._newest = words
        for peer in self._told(TOLD if news else TOLD_OF_NOTHING):
            self._tell(peer)

    async def farewell(self, words: Sequence[bytes]) -> None:
        told = (self._meeting.bid_farewell(peer, words) for peer in self._told(TOLD))
        await asyncio.gather(*told, return_exceptions=True)

    def spread(self, said: Announcement) -> None:
        """Somebody said something new over pubsub: maybe tell those that pubsub does not reach. A beat can wait for our own."""
        if said.page is None and said.revisions:
            return
        everybody = self._table.without_ipfs()
        without = [one for one in everybody if one.node != said.node and self._can_be_told(one)]
        hearers = 1 + max(0, self._table.count() - len(everybody))
        drawn = [one for one in without if self._random.random() * hearers < TELLERS]
        told = [one for one in without if one.node in self._told_by]
        told += self._random.sample(drawn, min(TOLD, len(drawn)))
        for peer in {one.node: one for one in told}.values():
            self._tell(peer)

    def helpers(self) -> list[Peer]:
        """Nodes that can be asked about others."""
        return self._told(TOLD)

    # -- what others ask ----------------------------------------------------------------------------------------------

    def routes(self) -> Sequence[Route]:
        return [Route("POST", exchange.PATH, self._exchange)]

    async def _exchange(self, request: web.Request) -> web.Response:
        source = source_of(request)
        if not self._exchanges.take(source):
            raise Busy("announcements", "they come too fast", "slow down")
        kind = self._membership.media_type(exchange.MEDIA_TYPE)
        limit = exchange.BODY_LIMIT + self._membership.overhead
        data = await read_body(request, limit, kind)
        try:
            brought = exchange.parse(data, exchange.BROUGHT, self._membership)
        except (Malformed, NotVerified) as error:
            raise UsageError("announcements", str(error)) from error
        if not self._envelopes.take(source, cost=len(brought.envelopes)):
            raise Busy("announcements", "they are too many", "slow down")
        given = await self.exchange(brought)
        answer = exchange.body(given, exchange.GIVEN, self._membership)
        return web.Response(body=answer, content_type=kind)

    async def exchange(self, brought: Words) -> Words:
        """One exchange: take in what is right of what somebody brought, give back what they lack."""
        heard = await self._ear.take_in(brought.envelopes)
        if heard and isinstance(heard[0], Announcement):  # whoever speaks puts itself first
            self._note_teller(heard[0].node)
        return await self._meeting.answer(brought)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _told(self, most: int) -> list[Peer]:
        reached_otherwise = self._with_ipfs()
        known = {
            peer.node: peer
            for peer in self._table.peers()
            if self._can_be_told(peer) and not (reached_otherwise and peer.peer_id is not None)
        }
        told_by = [known[node] for node in self._told_by if node in known][-most:]
        others = self._random.sample(list(known.values()), min(most, len(known)))
        joined = [peer for peer in self._joined() if not self._meeting.rests.resting(peer.node)]
        return list({peer.node: peer for peer in [*joined, *told_by, *others]}.values())

    def _can_be_told(self, peer: Peer) -> bool:
        speaks_http = peer.address.http or peer.address.relays
        return bool(speaks_http) and not self._meeting.rests.resting(peer.node)

    def _note_teller(self, node: str) -> None:
        self._meeting.rests.end(node)
        if node in self._told_by:
            self._told_by.remove(node)
        self._told_by.append(node)

    def _tell(self, peer: Peer) -> None:
        """Give a node our pages in the background; one at a time, always the newest."""
        name = f"tell {peer.node}"
        task = self._supervisor.state().get(name)
        if task is not None and task.state == "running":
            self._tell_again.add(peer.node)
        else:
            self._supervisor.run(name, lambda: self._tell_newest(peer), restart=False)

    async def _tell_newest(self, peer: Peer) -> None:
        while True:
            self._tell_again.discard(peer.node)
            try:
                await self._meeting.tell(self._table.peer(peer.node) or peer, self._newest)
            except SwarmError as error:
                _log.debug("telling %s: %s", peer.node[:16], error)
                self._tell_again.discard(peer.node)
                return
            if peer.node not in self._tell_again:
                return
