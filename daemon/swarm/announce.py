"""What this node says about itself, to whom and when, and what it hears from others.

It speaks when something changes (several changes within 50 ms are one), by heartbeat, and when a newcomer shows up; over
pubsub, and over HTTP to the nodes that it joined. Sequence numbers only ever grow, over restarts and clock changes too.

    heartbeat   `swarm.heartbeat`, stretched with the number of nodes, so that what a swarm costs each node stays bounded
    hello       a newcomer is answered within half a second; in a large swarm by some twenty nodes, chosen by chance
    bridge      what a node without IPFS says over HTTP is passed on over pubsub, and the other way round
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.errors import Busy, Refused, SwarmError, Unavailable
from daemon.ipfs.interface import IpfsNode, PeerIdentity
from daemon.ledger import LedgerThread
from daemon.supervise import Supervisor
from daemon.swarm import exchange
from daemon.swarm.join import Joiner
from daemon.swarm.limits import Buckets
from daemon.swarm.peers import PeerTable
from daemon.swarm.relay import PROTOCOL
from daemon.swarm.seal import SealKeys
from registry import announcement as rules
from registry.address import usable
from registry.envelope import key_name, sign
from registry.errors import Malformed, NotVerified, Repeated, Stale
from registry.records import Address, Announcement, Offer, Peer
from registry.store import Ledger

_log = logging.getLogger(__name__)

TOPIC = "/swarmctl/1/announce"

COALESCE_S = 0.05
PACE_S = 0.2  # between two announcements at least
ANSWER_S = 0.5  # a hello is answered after a random part of this
ANSWERS = 20  # nodes that answer one hello, about
STRETCH_AT = 100  # nodes; beyond, the heartbeat grows in proportion
LONGEST_HEARTBEAT_S = 300.0
FAREWELL_S = 0.5
HTTP_TARGETS = 8  # nodes told over HTTP besides the joined ones: the last that told us, and as many of the others, when there is no IPFS
_SEQUENCE = "announce.sequence"


class Announcer:
    """The voice and the ear of a node.

    `describe` gives our offers, `bittorrent` our host:port, `door_urls` say how others reach the door directly, `join` are the
    addresses of the settings, `clock` gives unix seconds. Close it before IPFS is stopped.
    """

    def __init__(
        self,
        key: Ed25519PrivateKey,
        *,
        table: PeerTable,
        ledger: LedgerThread,
        supervisor: Supervisor,
        seal_keys: SealKeys,
        describe: Callable[[], Awaitable[Sequence[Offer]]],
        bittorrent: Callable[[], tuple[str, ...]],
        door_port: int,
        door_urls: tuple[str, ...],
        http: aiohttp.ClientSession,
        clock: Callable[[], float],
        heartbeat_s: float,
        join: Sequence[Address] = (),
    ) -> None:
        self.node = key_name(key)
        self.ipfs: IpfsNode | None = None
        self.neighbours: frozenset[str] = frozenset()  # peer ids that listen to the topic and are connected to us
        self.heard: set[str] = set()  # nodes that said something since the start, or since IPFS came back
        self._key = key
        self._table = table
        self._ledger = ledger
        self._supervisor = supervisor
        self._seal_keys = seal_keys
        self._describe = describe
        self._bittorrent = bittorrent
        self._door_port = door_port
        self._door_urls = door_urls
        self._http = http
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._identity: PeerIdentity | None = None
        self._sequence = 0
        self._own: list[bytes] = []
        self._composing = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._hello = True
        self._refusal = ""
        self._answer: asyncio.TimerHandle | None = None
        self._pass_on: deque[bytes] = deque(maxlen=64)
        self._tell_again: set[str] = set()
        self._told_by: deque[str] = deque(maxlen=HTTP_TARGETS)  # the last nodes that spoke to us over HTTP themselves
        self._senders = Buckets(rate=5.0, burst=50.0, clock=time.monotonic)
        self._random = random.Random()
        self._joiner = Joiner(self, table=table, ledger=ledger, supervisor=supervisor, http=http, join=join)

    async def start(self) -> None:
        self._sequence = int(await self._ledger.call(Ledger.get_meta, _SEQUENCE) or 0)
        self._wanted.set()
        self._supervisor.run("announce", self._speak_forever, restart=True)
        await self._joiner.start()

    async def close(self) -> None:
        """Say good-bye, so that nobody asks a node that is gone. Takes at most about `FAREWELL_S`. Idempotent."""
        if self._answer is not None:
            self._answer.cancel()
        await self._supervisor.stop("rejoin")
        await self._supervisor.stop("announce")
        if not self._own:
            return
        try:
            async with asyncio.timeout(FAREWELL_S):
                farewell = await self._compose([], lifetime_s=30)
                await asyncio.gather(
                    self._publish(farewell), *(self._post(url, farewell) for url in self._doors()), return_exceptions=True
                )
        except TimeoutError:
            _log.debug("there was no time for a farewell")
        self._own = []

    # -- what others call -------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Something that we announce is different: say so soon."""
        self._wanted.set()

    def address(self) -> Address:
        """How to reach this node, every part of it that is on."""
        ipfs = self._identity.addresses if self._identity is not None else ()
        return usable(Address(self.node, ipfs, self._bittorrent(), self._door_urls))

    async def join(self, address: Address) -> Peer:
        """Know the node at `address` from now on. Raises `UsageError` for our own address, `Unserved` with each way that failed."""
        peer = await self._joiner.join(address)
        self.changed()
        return peer

    async def receive(self, envelope: bytes) -> Announcement:
        """Believe an announcement if it holds. Raises `Malformed`, `NotVerified`, `Stale`, `Refused` or `Busy`."""
        new = False
        try:
            said = await self._table.accept(envelope)
            new = said.node not in self.heard
            self.heard.add(said.node)
        except (Malformed, NotVerified, Stale, Refused, Busy) as error:
            # The same reason again and again, as from a node whose clock is off, is one line in the log.
            if str(error) != self._refusal and not isinstance(error, Repeated):
                self._refusal = str(error)
                _log.info("an announcement was refused: %s", error)
            raise
        if new or said.hello:
            self._answer_soon()
        return said

    async def exchange(self, envelopes: list[bytes]) -> list[bytes]:
        """One HTTP exchange: take in what is right of `envelopes`, give back ours and those of the others."""
        heard = await self.take_in(envelopes)
        if heard and isinstance(heard[0], Announcement):  # whoever speaks puts itself first
            self._note_teller(heard[0].node)
        own = await self.own_pages()
        brought = set(envelopes)
        others = {node: [page for page in pages if page not in brought] for node, pages in self._table.envelopes().items()}
        return exchange.chosen(own, others, shuffle=self._random)

    async def take_in(self, envelopes: Sequence[bytes]) -> list[Announcement | str]:
        """Envelopes that came over HTTP: what each says, or why it was refused.

        A wrong one does not stop the others: whoever passes it on need not have written it.
        """
        heard: list[Announcement | str] = []
        for envelope in envelopes:
            try:
                said = await self.receive(envelope)
            except (Malformed, NotVerified, Stale, Refused, Busy) as error:
                heard.append(error.why if isinstance(error, SwarmError) else str(error))
                continue
            heard.append(said)
            if said.peer_id is None and self.ipfs is not None:
                self._pass_on.append(envelope)
                self._wanted.set()
        return heard

    async def own_pages(self) -> list[bytes]:
        """Our signed pages as things are now, whether they have been said yet or not."""
        if not self._own or self._wanted.is_set():
            await self._compose(await self._describe())
        return self._own

    async def on_ipfs_ready(self, node: IpfsNode) -> None:
        """An IPFS node answers (for the first time, or again): listen for streams and join the topic. Raises `Unavailable`."""
        await self.on_ipfs_gone()
        self._identity = await node.identity()
        await node.listen(PROTOCOL, self._door_port, report_peer_id=False)
        self.ipfs = node
        # Pages without our peer id would look like another node's to whoever comes over IPFS.
        self._own = []
        self._hello = True
        self._supervisor.run("pubsub", lambda: self._hear(node), restart=True)
        self._supervisor.run("pubsub neighbours", lambda: self._watch_neighbours(node), restart=True)
        self.changed()

    async def on_ipfs_gone(self) -> None:
        """The IPFS node is gone: stop using it. Without one this does nothing."""
        self.ipfs = self._identity = None
        self.neighbours = frozenset()
        # Whoever was reached through it has to be reached again.
        self.heard.clear()
        await self._supervisor.stop("pubsub neighbours")
        await self._supervisor.stop("pubsub")

    # -- speaking ---------------------------------------------------------------------------------------------------

    async def _speak_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._interval_s()):
                    await self._wanted.wait()
                await asyncio.sleep(COALESCE_S)
            except TimeoutError:
                await self._table.prune()
            self._wanted.clear()
            pages = await self._compose(await self._describe())
            for url in self._doors():
                self._tell(url)
            passed_on = [self._pass_on.popleft() for _ in range(len(self._pass_on))]
            try:
                await self._publish([*pages, *passed_on])
                # A hello that nobody could hear is said again to the first neighbour.
                self._hello = not self.neighbours
            except Unavailable as error:
                _log.debug("pubsub: %s", error)
            await asyncio.sleep(PACE_S)

    async def _compose(self, offers: Sequence[Offer], *, lifetime_s: float | None = None) -> list[bytes]:
        """Our pages, signed, under sequence numbers never used before."""
        async with self._composing:
            now = self._clock()
            if lifetime_s is None:
                lifetime_s = min(rules.MAX_LIFETIME, 3 * self._interval_s() + 30)
            base = Announcement(
                node=self.node,
                peer_id=self._identity.peer_id if self._identity is not None else None,
                sequence=max(int(now * 1000), self._sequence + 1),
                expires=int(now + lifetime_s),
                address=self.address(),
                seal_keys=(self._seal_keys.public(),),
                offers=(),
                hello=self._hello,
            )
            pages = rules.pages(base, offers)
            self._sequence = pages[-1].sequence
            # Written before anybody hears the number, or a crash could make us use it again.
            await self._ledger.call(Ledger.set_meta, _SEQUENCE, str(self._sequence))
            self._own = [sign(rules.PAYLOAD_TYPE, rules.build(page), self._key) for page in pages]
            return self._own

    async def _publish(self, envelopes: Sequence[bytes]) -> None:
        node = self.ipfs
        if node is not None:
            for envelope in envelopes:
                await node.publish(TOPIC, envelope)

    def _interval_s(self) -> float:
        stretch = max(1.0, len(self._table.peers()) / STRETCH_AT)
        return min(LONGEST_HEARTBEAT_S, self._heartbeat_s * stretch)

    def _answer_soon(self) -> None:
        others = len(self._table.peers())
        if self._answer is None and self._random.random() * others < ANSWERS:
            self._answer = asyncio.get_running_loop().call_later(self._random.random() * ANSWER_S, self._answer_now)

    def _answer_now(self) -> None:
        self._answer = None
        self._wanted.set()

    # -- over HTTP --------------------------------------------------------------------------------------------------

    def _doors(self) -> list[str]:
        """Who is told over HTTP: those that we joined; without IPFS also those that told us, and some others that have a door.

        Chance alone would leave out a node that has nobody but us, the more so the more nodes have left without a word.
        """
        known = {
            peer.node: peer.address.http[0]
            for peer in self._table.peers()
            if peer.address.http and (self.ipfs is None or peer.peer_id is None)
        }
        told_by = [known[node] for node in self._told_by if node in known]
        others = self._random.sample(list(known.values()), min(HTTP_TARGETS, len(known)))
        return list(dict.fromkeys([*self._joiner.doors(), *told_by, *others]))

    def _note_teller(self, node: str) -> None:
        if node in self._told_by:
            self._told_by.remove(node)
        self._told_by.append(node)

    def _tell(self, url: str) -> None:
        """Post our pages to a door in the background; one post at a time, always with the newest pages."""
        name = f"tell {url}"
        if name in self._supervisor.state():
            self._tell_again.add(url)
        else:
            self._supervisor.run(name, lambda: self._tell_newest(url), restart=False)

    async def _tell_newest(self, url: str) -> None:
        while True:
            self._tell_again.discard(url)
            try:
                await self._post(url, self._own)
            except SwarmError as error:
                _log.debug("telling %s: %s", url, error)
                return
            if url not in self._tell_again:
                return

    async def _post(self, url: str, envelopes: Sequence[bytes]) -> None:
        # A node without IPFS depends on those that pass on to it what pubsub says.
        bridged = exchange.chosen(envelopes, self._table.envelopes() if self.ipfs is not None else {}, shuffle=self._random)
        await self.take_in(await exchange.post(self._http, url, bridged))

    # -- over pubsub ------------------------------------------------------------------------------------------------

    async def _hear(self, node: IpfsNode) -> None:
        # Renewed with the subscription: a node that somebody else runs may have been restarted without a word.
        await node.listen(PROTOCOL, self._door_port, report_peer_id=False)
        own = (await node.identity()).peer_id
        async for message in node.subscribe(TOPIC):
            if message.sender == own or not self._senders.take(message.sender):
                continue
            try:
                said = await self.receive(message.data)
            except (Malformed, NotVerified, Stale, Refused, Busy):
                continue
            _log.debug("%s announced %d offers", said.node[:16], len(said.offers))
            for url in self._without_ipfs():
                self._tell(url)
        raise Unavailable("pubsub", "the subscription ended")

    def _without_ipfs(self) -> list[str]:
        """Doors of nodes that pubsub does not reach."""
        return [peer.address.http[0] for peer in self._table.peers() if peer.peer_id is None and peer.address.http][:HTTP_TARGETS]

    async def _watch_neighbours(self, node: IpfsNode) -> None:
        while True:
            now = frozenset(await node.topic_peers(TOPIC))
            if now - self.neighbours:
                self._wanted.set()
            self.neighbours = now
            # Alone, every second counts: somebody may be waiting for the first word.
            await asyncio.sleep(1.0 if now else 0.25)
