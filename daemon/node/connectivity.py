"""How this node is with others: where it can be reached, the ways to them, and what they say to each other.

It decides what only the whole can know: which endpoints are announced, whether this node carries for others, and how its IPFS node
shall stand in the network.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon import network
from daemon.config import Config
from daemon.gossip.gossip import Gossip
from daemon.gossip.liveness import Liveness
from daemon.gossip.pages import Card, OwnPages
from daemon.gossip.peers import PeerTable
from daemon.gossip.rendezvous import Rendezvous
from daemon.ipfs.interface import IpfsNode
from daemon.ipfs.keeper import IpfsKeeper
from daemon.ipfs.reach import direct_addresses
from daemon.ledger import LedgerThread
from daemon.membership import Membership
from daemon.node.endpoints import Endpoints
from daemon.node.ipfs_standing import IpfsStanding
from daemon.node.reachability import Reachability
from daemon.peerapi.dialback import DialBack
from daemon.peerapi.ping import Ping
from daemon.peerapi.server import Ports, Route
from daemon.peerapi.ways import Ways
from daemon.peerchat.seal import SealKeys
from daemon.relaying.holder import RelayHolder
from daemon.relaying.service import RelayService
from daemon.relaying.tunnels import RelayTunnels
from daemon.supervise import Supervisor
from daemon.torrent.session import TorrentSession
from registry import codes, ranges
from registry.envelope import key_name
from registry.records import Address, Announcement, Offer, Peer

_log = logging.getLogger(__name__)

_JOIN_WAIT_S = 20.0  # how long a join waits for IPFS to come up
_NEW_START_S = 4.0  # how long a question waits for IPFS to be there again
_LOOK_S = 1.0  # between two looks at our own addresses
_INTERFACES_S = 3.0  # between two looks at the addresses of this machine
_ALONE_S, _LONGEST_ALONE_S = 2.0, 120.0  # between two searches for anybody
_LEADS_TO_US = frozenset({"http", "ipfs"})  # parts over which others can ask us something


class Connectivity:
    """`offers` gives ours; `join` are the addresses of the settings. Set `ports` before `start`."""

    def __init__(
        self,
        config: Config,
        key: Ed25519PrivateKey,
        *,
        ledger: LedgerThread,
        table: PeerTable,
        keeper: IpfsKeeper,
        torrents: TorrentSession | None,
        supervisor: Supervisor,
        http: aiohttp.ClientSession,
        pipes: aiohttp.ClientSession,
        membership: Membership,
        seal_keys: SealKeys,
        offers: Callable[[], Sequence[Offer]],
        join: Sequence[Address],
    ) -> None:
        self.node = key_name(key)
        self.ports = Ports(0, 0)
        self.ways = Ways(
            network=config.network,
            ipfs=lambda: keeper.node_within(_NEW_START_S),
            http=http,
            membership=membership,
        )
        self.reachability = Reachability(
            self.node,
            self.ways,
            membership,
            ports=lambda: self.endpoints.own_ports(),
            judges=self._judges,
            on_change=self._on_change,
        )
        self.gossip = Gossip(
            OwnPages(key, ledger, card=self._card, offers=offers, clock=time.time),
            table=table,
            ledger=ledger,
            supervisor=supervisor,
            ways=self.ways,
            http=http,
            membership=membership,
            ipfs_within=lambda: keeper.node_within(_JOIN_WAIT_S),
            heartbeat_s=config.swarm.heartbeat,
            join=join,
        )
        self._ping = Ping(self.node, membership)
        self.relay = RelayService(
            self.node,
            enabled=lambda: self.relaying,
            bulk=lambda: config.swarm.relay_bytes,
            on_change=self._on_carried,
        )
        self.holder = RelayHolder(
            key,
            network=config.network,
            ways=self.ways,
            http=pipes,
            supervisor=supervisor,
            candidates=self._carriers,
            joined=lambda: {peer.node for peer in self.gossip.joiner.peers()},
            codes=self._shared_codes,
            wanted=self._wants_relays,
            streams_port=lambda: self.ports.streams,
            on_change=self._on_change,
        )
        self.ways.relays = RelayTunnels(pipes, self.relay)
        self.ways.lookup = table.peer
        self.liveness = Liveness(table, self.ways, supervisor, self._ipfs)
        self.endpoints = Endpoints(
            self.node,
            config,
            self.reachability,
            torrents,
            ports=lambda: self.ports,
            identity=lambda: self.gossip.pubsub.identity,
            relays=self.holder.points,
        )
        self._standing = IpfsStanding(
            config,
            ledger,
            table,
            keeper,
            self.reachability,
            joined=self.gossip.joiner.peers,
        )
        has_dhts = config.network == "public"
        self.rendezvous = Rendezvous(
            membership,
            self.gossip.meeting,
            network=config.network,
            dht=torrents.dht if has_dhts and torrents is not None else None,
            ipfs=self._ipfs if has_dhts else lambda: None,
            offers=offers,
            carried=self.relay.codes_in_turn,
            port=self.endpoints.reached_port,
            external=lambda: self.reachability.external,
            enabled=has_dhts and config.swarm.rendezvous,
        )
        self._dialback = DialBack(config.network, self._ipfs, http, membership)
        self._config = config
        self._table = table
        self._keeper = keeper
        self._torrents = torrents
        self._supervisor = supervisor
        self._offers = offers
        self._seal_keys = seal_keys
        self._own_multiaddrs: tuple[str, ...] = ()
        self._ipfs_peers = 0
        self._held: frozenset[str] = frozenset()  # whom we carried for when it was last looked at

    # -- life ---------------------------------------------------------------------------------------------------------

    def routes(self) -> list[Route]:
        return [
            *self._ping.routes(),
            *self._dialback.routes(),
            *self.gossip.routes(),
            *self.relay.routes(),
        ]

    async def start(self) -> None:
        """Begin to speak, and to find out how we can be reached."""
        await self._standing.open()
        await self.gossip.start(self.ports.streams)
        self._supervisor.run("liveness", self.liveness.ask_forever, restart=True)
        if self._config.network == "public":
            self._supervisor.run("reachability", self.reachability.run, restart=True)
            self.holder.start()
            if self._torrents is not None and self.endpoints.listens_outside():
                self._torrents.ports.on_change = self.reachability.look_again
                self._torrents.ports.map_port(self.ports.direct)
            self._supervisor.run("announce on DHT", self.rendezvous.announce_forever, restart=True)
            self._supervisor.run("provide", self.rendezvous.provide_forever, restart=True)
            self._supervisor.run("look for others", self._look_for_others, restart=True)
            self._supervisor.run("interfaces", self._watch_interfaces, restart=True)

    async def close(self) -> None:
        await self.rendezvous.close()
        await self.gossip.close()
        await self.holder.close()
        await self.relay.close()
        await self.ways.close()

    async def join(self, address: Address) -> Peer:
        """Know the node at `address` from now on. Raises as `Gossip.join`."""
        peer = await self.gossip.join(address)
        self.holder.changed()
        self.reachability.look_again()
        return peer

    async def receive(self, envelope: bytes) -> Announcement:
        """Believe an announcement if it holds. Raises as `Gossip.receive`."""
        return await self.gossip.receive(envelope)

    def came(self, address: str) -> None:
        """Somebody came straight to the port of the peer API."""
        if self._config.network == "public":
            self.reachability.came(address, "http")

    async def on_ipfs_ready(self, node: IpfsNode) -> None:
        await self.gossip.on_ipfs_ready(node)
        self._supervisor.run("own addresses", lambda: self._watch(node), restart=True)
        if self._config.network == "public":
            self._supervisor.run("good peers", lambda: self._standing.remember_forever(node), restart=True)
        self.reachability.look_again()

    async def on_ipfs_gone(self) -> None:
        await self._supervisor.stop("good peers")
        await self._supervisor.stop("own addresses")
        self.rendezvous.forget_provided()
        self._ipfs_peers = 0
        self.liveness.disconnected()
        await self.gossip.on_ipfs_gone()

    def standing(self) -> dict[str, Any]:
        """How this node stands in the network, as `status` has it."""
        urls = self.endpoints.urls()
        dht = self._torrents.dht.nodes if self._torrents is not None else 0
        off = self.gossip.ear.clock_is_off
        return {
            "reachability": self.reachability.state,
            "relays": list(self.holder.held),
            "relaying": {
                "enabled": self.relaying,
                "nodes": len(self.relay.held),
                "streams": self.relay.streams,
                "bytes": self.relay.carried,
            },
            "dht": {"bittorrent": dht, "ipfs": self._ipfs_peers},
            "neighbours": len(self.gossip.pubsub.neighbours),
            "nat": self.reachability.nat,
            "external": list(self.reachability.external),
            "clock": {
                "off": off,
                "why": "most announcements of others have a wrong time" if off else None,
            },
            "peer_api": {
                "port": self.ports.direct,
                "open": bool(urls),
                "url": urls[0] if urls else None,
            },
            "swarm": {
                "name": self._config.swarm.name,
                "closed": bool(self._config.swarm.name),
            },
        }

    # -- how we are reached -------------------------------------------------------------------------------------------

    @property
    def relaying(self) -> bool:
        """Whether this node carries for others."""
        choice = self._config.swarm.relay
        return choice == "on" or (choice == "auto" and self._is_asked_directly())

    def _is_asked_directly(self) -> bool:
        """Whether somebody outside reached our peer API, or the IPFS node that leads to it. A BitTorrent port does not."""
        return not self.reachability.reached.isdisjoint(_LEADS_TO_US)

    def _ipfs(self) -> IpfsNode | None:
        return self._keeper.node

    def _card(self) -> Card:
        identity = self.gossip.pubsub.identity
        peer_id = identity.peer_id if identity is not None else None
        address = self.endpoints.announced()
        return Card(peer_id, address, self._seal_keys.public(), self.relaying)

    def _judges(self) -> list[Peer]:
        """Nodes that can say how we are seen: the joined ones first, then whoever can be dialled."""
        joined = self.gossip.joiner.peers()
        others = (peer for peer in self._table.peers() if self._dialable(peer))
        return list({peer.node: peer for peer in [*joined, *others]}.values())

    def _dialable(self, peer: Peer) -> bool:
        """Whether a node announces an endpoint that we may use and that needs no relay."""
        kind = self._config.network
        urls = any(ranges.allows_url(kind, url) for url in peer.address.http)
        allowed = (one for one in peer.address.ipfs if ranges.allows_multiaddr(kind, one))
        return urls or bool(direct_addresses(tuple(allowed), 1))

    def _wants_relays(self) -> bool:
        """Whether nobody can dial us, as far as is known."""
        if self.reachability.state == "unknown":
            return network.global_address() is None
        return not self._is_asked_directly()

    def _carriers(self) -> list[Peer]:
        """Nodes that may carry for us, best first: those that we joined, then those that offer it."""
        joined = self.gossip.joiner.peers()
        offering = (peer for peer in self._table.peers() if peer.relay)
        found = {peer.node: peer for peer in [*joined, *offering] if self._dialable(peer)}
        return list(found.values())

    def _shared_codes(self) -> set[str]:
        """The codes under which our relays announce us."""
        if not self._config.swarm.rendezvous:
            return set()
        offers = self._offers()
        return {
            codes.short(code)
            for offer in offers
            for code in codes.codes_of(offer.cid, offer.infohash_v2)
        }

    def _on_carried(self) -> None:
        """Others are carried for, or no more: what is announced for them follows by itself."""
        held = frozenset(self.relay.held)
        self.liveness.let_go(self._held - held)
        self._held = held

    def changed(self) -> None:
        """What this node offers is different: say so, to those who carry for us as well."""
        self.holder.changed()
        self.gossip.changed()

    def _on_change(self) -> None:
        self.holder.changed()
        self.relay.refresh()
        self._standing.update()
        self.gossip.changed()

    async def _look_for_others(self) -> None:
        """A node that hears nobody, and was told of nobody, looks on the DHTs for anybody."""
        heard = self.gossip.ear.heard
        pause_s = _ALONE_S
        while True:
            await asyncio.sleep(pause_s)
            if heard:
                pause_s = _ALONE_S
                continue
            await self.rendezvous.search(None, lambda: bool(heard))
            pause_s = min(2 * pause_s, _LONGEST_ALONE_S)

    # -- watching -----------------------------------------------------------------------------------------------------

    async def _watch(self, node: IpfsNode) -> None:
        """Our own addresses change: a reservation is made, a cable is plugged in, somebody outside comes in."""
        while True:
            self.gossip.pubsub.identity = await node.identity()
            connected = await node.peers()
            self._ipfs_peers = len(connected)
            self.liveness.connected(connected)
            if self._config.network == "public":
                await self._look_who_came(node)
            addresses = self.endpoints.multiaddrs()
            if addresses != self._own_multiaddrs:
                self._own_multiaddrs = addresses
                self.gossip.changed()
            # Relays are met after the start, and go.
            self._standing.update()
            await asyncio.sleep(_LOOK_S)

    async def _look_who_came(self, node: IpfsNode) -> None:
        if "ipfs" in self.reachability.reached or network.global_address() is None:
            return
        for connection in await node.connections():
            if connection.inbound and not connection.relayed:
                self.reachability.came(connection.address.split("/")[2], "ipfs")

    async def _watch_interfaces(self) -> None:
        """Another network was entered, or left: how we are seen has to be found out anew."""
        known = network.own_addresses()
        while True:
            await asyncio.sleep(_INTERFACES_S)
            now = network.own_addresses()
            if now != known:
                known = now
                if self._torrents is not None:
                    self._torrents.ports.renew()
                self.reachability.look_again()
