"""How our IPFS node shall stand in the network: what it is told at its start, and whom it knows from before."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence

from daemon.config import Config
from daemon.errors import SwarmError
from daemon.gossip.peers import PeerTable
from daemon.ipfs.interface import IpfsNode
from daemon.ipfs.keeper import IpfsKeeper
from daemon.ipfs.reach import MAX_RELAYS, MAX_REMEMBERED, Reach, direct_addresses
from daemon.ledger import LedgerThread
from daemon.node.reachability import Reachability
from registry import ranges
from registry.records import Peer
from registry.store import Ledger

_log = logging.getLogger(__name__)

_REMEMBER_S = 60.0  # between two looks at which peers are good
_REMEMBERED = "ipfs.good_peers"


class IpfsStanding:
    """`joined` are the nodes that a person joined."""

    def __init__(
        self,
        config: Config,
        ledger: LedgerThread,
        table: PeerTable,
        keeper: IpfsKeeper,
        reachability: Reachability,
        *,
        joined: Callable[[], Sequence[Peer]],
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._table = table
        self._keeper = keeper
        self._reachability = reachability
        self._joined = joined
        self._good_peers: tuple[str, ...] = ()

    async def open(self) -> None:
        """Before the IPFS node is started."""
        stored = await self._ledger.call(Ledger.get_meta, _REMEMBERED)
        self._good_peers = tuple(json.loads(stored or "[]"))
        self.update()

    def update(self) -> None:
        """Something that our IPFS node is told may be different."""
        self._keeper.want(self._reach())

    async def remember_forever(self, node: IpfsNode) -> None:
        """Note the peers by which the network can be entered the next time."""
        while True:
            await asyncio.sleep(_REMEMBER_S)
            try:
                good = await node.known_peers()
            except SwarmError as error:
                _log.debug("who is good is not known: %s", error)
                continue
            if good:
                self._good_peers = good
                await self._ledger.call(Ledger.set_meta, _REMEMBERED, json.dumps(good))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _reach(self) -> Reach:
        if self._config.network != "public":
            return Reach()
        public = self._reachability.ipfs_is_public()
        return Reach(
            reachability="public" if public else "private",
            relays=() if public else self._relays(),
            relay_service=public and self._config.swarm.relay != "off",
            bootstrap=self._bootstrap(),
        )

    def _relays(self) -> tuple[str, ...]:
        """Nodes to hold libp2p reservations with. Those that we have stay as long as one of them lives: each change costs a start."""
        running = self._keeper.reach.relays
        live = {peer.peer_id for peer in self._table.peers()}
        if any(address.rpartition("/")[2] in live for address in running):
            return running
        offering = (peer for peer in self._table.remembered() if peer.relay)
        return self._multiaddrs([*self._joined(), *offering], MAX_RELAYS)

    def _bootstrap(self) -> tuple[str, ...]:
        """Ways into the IPFS network that worked before: nodes of ours, and what our IPFS node found good."""
        ours = self._multiaddrs(self._table.remembered(), MAX_REMEMBERED)
        allowed = (one for one in self._good_peers if ranges.allows_multiaddr("public", one))
        return direct_addresses((*ours, *allowed), MAX_REMEMBERED)

    def _multiaddrs(self, peers: Sequence[Peer], most: int) -> tuple[str, ...]:
        """A direct address of each of the first `most` of `peers` that have one which this node may dial."""
        found: list[str] = []
        for peer in peers:
            allowed = (one for one in peer.address.ipfs if ranges.allows_multiaddr("public", one))
            found += direct_addresses(tuple(allowed), 1)
            if len(found) >= most:
                break
        return direct_addresses(tuple(found), most)
