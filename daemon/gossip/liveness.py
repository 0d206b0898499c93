"""Noticing who is gone before its announcement runs out: a connection that drops is a reason to look.

Those who serve and are connected to us are asked every two seconds: a connection over QUIC to a node that was killed looks well
for half a minute. A libp2p connection that ends, or a node that we carry for and that lets go, may mean nothing: Kubo trims
connections, and cables are pulled for a moment. So whoever does not answer, or dropped, is looked for once, over every way. Who
is not found is not offered to anybody until it is heard again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from functools import partial

from daemon.errors import SwarmError, Unserved
from daemon.gossip.peers import PeerTable
from daemon.ipfs.interface import IpfsNode
from daemon.peerapi.ways import Ways
from daemon.supervise import Supervisor
from registry.records import Peer

_log = logging.getLogger(__name__)

ASK_S = 2.0  # between two questions to those who serve
ASKED = 8  # of them, at a time
ANSWER_S = 1.0
PROBE_S = 1.5
_AT_ONCE = 32  # probes; in a network that fell apart the announcements of the rest run out by themselves


class Liveness:
    """Looks after those who dropped; whoever is gone is silent in `table`."""

    def __init__(
        self,
        table: PeerTable,
        ways: Ways,
        supervisor: Supervisor,
        ipfs: Callable[[], IpfsNode | None],
    ) -> None:
        self._ipfs = ipfs
        self._random = random.Random()
        self._table = table
        self._ways = ways
        self._supervisor = supervisor
        self._connected: frozenset[str] = frozenset()  # libp2p peer ids
        self._probing: set[str] = set()

    async def ask_forever(self) -> None:
        """Supervised."""
        while True:
            await asyncio.sleep(ASK_S)
            node = self._ipfs()
            if node is not None and self._connected:
                await asyncio.gather(*(self._ask(node, peer) for peer in self._asked()))

    def _asked(self) -> list[Peer]:
        """Some of those who serve and are connected; all where they are few."""
        serving = {offer.node for offer in self._table.offers() if offer.serving}
        peers = (self._table.peer(node) for node in serving)
        near = [peer for peer in peers if peer is not None and peer.peer_id in self._connected]
        return self._random.sample(near, min(ASKED, len(near)))

    async def _ask(self, node: IpfsNode, peer: Peer) -> None:
        try:
            await node.ping(str(peer.peer_id), deadline_s=ANSWER_S)
        except Unserved:
            self._look([peer])
        except SwarmError as error:
            _log.debug("nobody can be asked: %s", error)

    def connected(self, peer_ids: Iterable[str]) -> None:
        """The libp2p peers that are connected now."""
        now = frozenset(peer_ids)
        dropped, self._connected = self._connected - now, now
        if dropped:
            self._look(peer for peer in self._table.peers() if peer.peer_id in dropped)

    def disconnected(self) -> None:
        """Our own IPFS node is away: that its connections are gone says nothing."""
        self._connected = frozenset()

    def let_go(self, nodes: Iterable[str]) -> None:
        """Nodes that kept a connection to us and do so no more."""
        found = (self._table.peer(node) for node in nodes)
        self._look(peer for peer in found if peer is not None)

    def _look(self, suspects: Iterable[Peer]) -> None:
        for peer in suspects:
            if len(self._probing) < _AT_ONCE and peer.node not in self._probing:
                self._probing.add(peer.node)
                name = f"look for {peer.node}"
                self._supervisor.run(name, partial(self._probe, peer), restart=False)

    async def _probe(self, peer: Peer) -> None:
        try:
            async with asyncio.timeout(2 * PROBE_S), self._ways.to(peer, deadline_s=PROBE_S):
                return
        except (SwarmError, TimeoutError):
            if self._table.silence(peer):
                _log.info("%s is gone", peer.node[:16])
        finally:
            self._probing.discard(peer.node)
