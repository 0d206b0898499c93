"""Noticing who is gone before its announcement runs out: a connection that drops is a reason to look.

A libp2p connection that ends, or a node that we carry for and that lets go, may mean nothing: Kubo trims connections, and cables
are pulled for a moment. So whoever dropped is asked once whether it is there. Who does not answer is not offered to anybody
until it is heard again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from functools import partial

from daemon.errors import SwarmError
from daemon.gossip.peers import PeerTable
from daemon.peerapi.ways import Ways
from daemon.supervise import Supervisor
from registry.records import Peer

_log = logging.getLogger(__name__)

PROBE_S = 1.5
_AT_ONCE = 32  # probes; in a network that fell apart the announcements of the rest run out by themselves


class Liveness:
    """Looks after those who dropped; whoever is gone is silent in `table`."""

    def __init__(self, table: PeerTable, ways: Ways, supervisor: Supervisor) -> None:
        self._table = table
        self._ways = ways
        self._supervisor = supervisor
        self._connected: frozenset[str] = frozenset()  # libp2p peer ids
        self._probing: set[str] = set()

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
