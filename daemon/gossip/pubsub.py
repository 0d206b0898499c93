"""Words over IPFS pubsub: the transport that reaches everybody who listens to the topic of our swarm.

In a closed swarm each message is sealed. Its topic is no secret to the libp2p peers of a member, so that strangers may write there:
what does not open is dropped without a word, and counts against the rate of whoever sent it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from daemon.buckets import Buckets
from daemon.errors import Unavailable
from daemon.gossip import exchange
from daemon.gossip.ear import REFUSALS, Ear
from daemon.ipfs.interface import IpfsNode, PeerIdentity
from daemon.membership import Membership
from daemon.supervise import Supervisor
from registry import announcement as rules
from registry import strictjson
from registry.records import Announcement

_log = logging.getLogger(__name__)

_SEALED = "announcement"  # what is sealed
_QUESTION = b'{"want"'
_MAX_QUESTION = 4096  # bytes
_PASSED_ON = 64  # envelopes of nodes without IPFS that wait to be passed on


class Pubsub:
    """`on_neighbour` is called when somebody new listens, `on_heard` with each announcement that came this way, `on_question`
    with the pages that somebody lacks, by `rules.node_id`.
    """

    def __init__(
        self,
        ear: Ear,
        supervisor: Supervisor,
        membership: Membership,
        *,
        on_neighbour: Callable[[], None],
        on_heard: Callable[[Announcement], None],
        on_question: Callable[[Mapping[str, Sequence[int]]], None],
    ) -> None:
        self.node: IpfsNode | None = None
        self.identity: PeerIdentity | None = None
        self.streams_port = 0  # where libp2p streams of our protocol go
        self.neighbours: frozenset[str] = frozenset()  # peer ids that listen to the topic and are connected to us
        self._ear = ear
        self._supervisor = supervisor
        self._membership = membership
        self._on_neighbour = on_neighbour
        self._on_heard = on_heard
        self._on_question = on_question
        self._passed_on: deque[bytes] = deque(maxlen=_PASSED_ON)
        self._senders = Buckets(rate=5.0, burst=50.0, clock=time.monotonic)

    # -- IPFS comes and goes ------------------------------------------------------------------------------------------

    async def on_ipfs_ready(self, node: IpfsNode) -> None:
        """An IPFS node answers (for the first time, or again): take streams and join the topic. Raises `Unavailable`."""
        await self.on_ipfs_gone()
        self.identity = await node.identity()
        await self._take_streams(node)
        self.node = node
        self._supervisor.run("pubsub", lambda: self._hear(node), restart=True)
        self._supervisor.run("pubsub neighbours", lambda: self._watch_neighbours(node), restart=True)

    async def on_ipfs_gone(self) -> None:
        """The IPFS node is gone: stop using it. Without one this does nothing."""
        self.node = self.identity = None
        self.neighbours = frozenset()
        await self._supervisor.stop("pubsub neighbours")
        await self._supervisor.stop("pubsub")

    # -- Transport ----------------------------------------------------------------------------------------------------

    async def say(self, words: Sequence[bytes], *, news: bool) -> None:
        passed_on = [self._passed_on.popleft() for _ in range(len(self._passed_on))]
        try:
            await self._publish([*words, *passed_on])
        except Unavailable as error:
            _log.debug("pubsub: %s", error)

    async def farewell(self, words: Sequence[bytes]) -> None:
        await self._publish(words)

    async def ask(self, want: Mapping[str, Sequence[int]]) -> None:
        """Ask everybody for pages, by node; see daemon/gossip/wants.py."""
        named = {rules.node_id(node): list(pages) for node, pages in want.items()}
        await self._publish([strictjson.dumps({"want": named})])

    def pass_on(self, envelope: bytes) -> None:
        """Say with our next words what a node without IPFS said to us."""
        if self.node is not None:
            self._passed_on.append(envelope)

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _publish(self, envelopes: Sequence[bytes]) -> None:
        node = self.node
        if node is not None:
            for envelope in envelopes:
                sealed = self._membership.seal(envelope, _SEALED)
                await node.publish(self._membership.topic, sealed)

    async def _take_streams(self, node: IpfsNode) -> None:
        await node.listen(
            self._membership.protocol, self.streams_port, report_peer_id=True
        )

    async def _hear(self, node: IpfsNode) -> None:
        # Renewed with the subscription: a node that somebody else runs may have been restarted without a word.
        await self._take_streams(node)
        own = (await node.identity()).peer_id
        async for message in node.subscribe(self._membership.topic):
            if message.sender == own or not self._senders.take(message.sender):
                continue
            try:
                word = self._membership.open(message.data, _SEALED, limit=rules.MAX_ENVELOPE)
                if word.startswith(_QUESTION):
                    self._hear_question(word)
                    continue
                said = await self._ear.receive(word)
            except REFUSALS:
                continue
            _log.debug("%s announced %d offers", said.node[:16], len(said.offers))
            self._on_heard(said)
        raise Unavailable("pubsub", "the subscription ended")

    def _hear_question(self, data: bytes) -> None:
        """Nobody signs a question: it costs at most what `OwnPages.ask_for` allows, whoever asks. Raises `Malformed`."""
        fields = strictjson.loads(data, limit=_MAX_QUESTION, what="the question")
        self._on_question(exchange.wanted(fields.get("want")))

    async def _watch_neighbours(self, node: IpfsNode) -> None:
        while True:
            now = frozenset(await node.topic_peers(self._membership.topic))
            if now - self.neighbours:
                self._on_neighbour()
            self.neighbours = now
            # Alone, every second counts: somebody may be waiting for the first word.
            await asyncio.sleep(1.0 if now else 0.25)
