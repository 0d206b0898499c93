"""The gossip of a node: its own pages, its ear, its pace, and the transports that carry what it says.

Whatever changes outdates the pages and hurries the pace; one loop says what is new over every transport. Close it before IPFS is stopped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import aiohttp

from daemon.errors import SwarmError
from daemon.gossip.ear import Ear
from daemon.gossip.http import Http
from daemon.gossip.joining import Joiner
from daemon.gossip.meeting import Meeting
from daemon.gossip.pace import PACE_S, Pace
from daemon.gossip.pages import OwnPages
from daemon.gossip.peers import PeerTable
from daemon.gossip.pubsub import Pubsub
from daemon.gossip.transport import Transport
from daemon.gossip.wants import Wants
from daemon.ipfs.interface import IpfsNode
from daemon.ledger import LedgerThread
from daemon.membership import Membership
from daemon.peerapi.limits import Limits
from daemon.peerapi.server import Route
from daemon.peerapi.ways import Ways
from daemon.supervise import Supervisor
from registry import announcement as rules
from registry.records import Address, Announcement, Peer

_log = logging.getLogger(__name__)

FAREWELL_S = 0.5


class Gossip:
    """`ipfs_within` gives the IPFS node when it answers in a while; `join` are the addresses of the settings."""

    def __init__(
        self,
        pages: OwnPages,
        *,
        table: PeerTable,
        ledger: LedgerThread,
        supervisor: Supervisor,
        ways: Ways,
        http: aiohttp.ClientSession,
        membership: Membership,
        ipfs_within: Callable[[], Awaitable[IpfsNode | None]],
        heartbeat_s: float,
        join: Sequence[Address] = (),
        limits: Limits | None = None,
    ) -> None:
        self.pages = pages
        self.pace = Pace(heartbeat_s, table.count)
        self.ear = Ear(
            table,
            greet=self.pace.answer,
            pass_on=self._pass_on,
            behind=lambda: self.wants.note(),
        )
        self.meeting = Meeting(
            pages.node,
            ways,
            http,
            self.ear,
            table,
            membership,
            own_news=self.own_news,
            pubsub=self._with_ipfs,
        )
        self.pubsub = Pubsub(
            self.ear,
            supervisor,
            membership,
            on_neighbour=self.pace.greet,
            on_heard=self._on_heard,
            on_question=self._on_question,
        )
        self.joiner = Joiner(
            pages.node,
            meeting=self.meeting,
            ear=self.ear,
            table=table,
            ledger=ledger,
            supervisor=supervisor,
            membership=membership,
            ipfs=ipfs_within,
            join=join,
        )
        self.http = Http(
            self.meeting,
            self.ear,
            table,
            supervisor,
            membership,
            joined=self.joiner.peers,
            with_ipfs=self._with_ipfs,
            limits=limits,
        )
        self.wants = Wants(
            table, self.meeting, helpers=self.http.helpers, ask_everybody=self.pubsub.ask
        )
        self.transports: list[Transport] = [self.http, self.pubsub]
        self._table = table
        self._supervisor = supervisor

    async def start(self, streams_port: int) -> None:
        """`streams_port` is where the peer API takes what comes through IPFS."""
        self.pubsub.streams_port = streams_port
        await self.pages.open()
        self.pace.speak()
        self._supervisor.run("announce", self._speak_forever, restart=True)
        self._supervisor.run("missing pages", self.wants.run_forever, restart=True)
        self._supervisor.run("peers", self._table.mirror_forever, restart=True)
        await self.joiner.start()

    async def close(self) -> None:
        """Say good-bye, so that nobody asks a node that is gone. Takes at most about `FAREWELL_S`. Idempotent."""
        self.pace.close()
        await self._supervisor.stop("rejoin")
        await self._supervisor.stop("missing pages")
        await self._supervisor.stop("announce")
        if not self.pages.said:
            return
        try:
            async with asyncio.timeout(FAREWELL_S):
                page = await self.pages.farewell()
                words = (transport.farewell(page) for transport in self.transports)
                await asyncio.gather(*words, return_exceptions=True)
        except TimeoutError:
            _log.debug("there was no time for a farewell")

    # -- what others call -------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Something that we announce is different: say so soon."""
        self.pages.outdate()
        self.pace.speak()

    async def join(self, address: Address) -> Peer:
        """Know the node at `address` from now on. Raises `UsageError` for our own address, `Unserved` with each way that failed."""
        peer = await self.joiner.join(address)
        self.changed()
        return peer

    async def receive(self, envelope: bytes) -> Announcement:
        """Believe an announcement if it holds. Raises `Malformed`, `NotVerified`, `Stale`, `Refused` or `Busy`."""
        return await self.ear.receive(envelope)

    async def own_news(self, heard: int, wanted: Collection[int]) -> list[bytes]:
        """Our newest word, and our pages that somebody lacks who heard our word number `heard` (0: none) and asks for `wanted`."""
        return await self.pages.news(self.pace.lifetime_s, heard, wanted)

    def routes(self) -> Sequence[Route]:
        return self.http.routes()

    async def on_ipfs_ready(self, node: IpfsNode) -> None:
        """An IPFS node answers (for the first time, or again). Raises `Unavailable`."""
        self.ear.forget()
        await self.pubsub.on_ipfs_ready(node)
        # Pages without our peer id would look like another node's to whoever comes over IPFS.
        self.pages.hello = True
        self.pages.outdate()
        self.pace.greet()

    async def on_ipfs_gone(self) -> None:
        """The IPFS node is gone: stop using it. Without one this does nothing."""
        if self.pubsub.node is not None:
            self.ear.forget()
        await self.pubsub.on_ipfs_gone()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _with_ipfs(self) -> bool:
        return self.pubsub.node is not None

    def _pass_on(self, envelope: bytes) -> None:
        if self._with_ipfs():
            self.pubsub.pass_on(envelope)
            self.pace.greet()

    def _on_heard(self, said: Announcement) -> None:
        self.http.spread(said)

    def _on_question(self, want: Mapping[str, Sequence[int]]) -> None:
        self.pages.ask_for(want.get(rules.node_id(self.pages.node), ()))

    async def _speak_forever(self) -> None:
        while True:
            occasion = await self.pace.wait()
            if occasion == "heartbeat":
                self._table.prune()
            words = await self.pages.renew(self.pace.lifetime_s, beat=occasion != "change")
            for transport in self.transports if words else ():
                try:
                    await transport.say(words, news=occasion != "heartbeat")
                except SwarmError as error:
                    _log.debug("%s: %s", type(transport).__name__, error)
            # A hello that nobody could hear is said again to the first neighbour.
            self.pages.hello = self._with_ipfs() and not self.pubsub.neighbours
            await asyncio.sleep(PACE_S)
