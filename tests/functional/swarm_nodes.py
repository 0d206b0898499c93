"""Swarm nodes for tests: real peer API, gossip, answers and ledger, a real Kubo where asked for, and a model that follows a script."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.answering.answers import Answers
from daemon.answering.local import LocalModel
from daemon.config import Network
from daemon.engine.interface import CAPABILITIES, Capability, Delta, EmbeddingRequest, Embeddings, Provider, Request, Usage
from daemon.gossip.gossip import Gossip
from daemon.gossip.moving import settle
from daemon.gossip.pages import Card, OwnPages
from daemon.gossip.peers import PeerTable, Standing
from daemon.ipfs.interface import IpfsNode
from daemon.ipfs.kubo import KuboProcess
from daemon.ipfs.node import KuboNode
from daemon.ipfs.rpc import Rpc
from daemon.ledger import LedgerThread
from daemon.membership import Membership, OpenSwarm
from daemon.peerapi.limits import Limits
from daemon.peerapi.ping import Ping
from daemon.peerapi.server import PeerApi, Route
from daemon.peerapi.ways import Ways
from daemon.peerchat.seal import SealKeys
from daemon.peerchat.server import ChatServer
from daemon.relaying import pipes
from daemon.relaying.holder import RelayHolder
from daemon.relaying.limits import RelayLimits
from daemon.relaying.service import RelayService
from daemon.relaying.tunnels import RelayTunnels
from daemon.supervise import Supervisor
from daemon.transfer.objects import ObjectServer
from daemon.transfer.ranges import RangeLimits, RangeServer
from daemon.transfer.sources import RateLimit
from registry.address import usable
from registry.cid import leaf_cid
from registry.codes import code_of_cid, short
from registry.envelope import key_name
from registry.records import Address, Offer, Peer

CID = leaf_cid(b"a model")


class Script:
    """A `Provider` that says `words`, or hangs or fails on the way. Notes what it was asked and that it was closed."""

    def __init__(
        self, words: tuple[str | Delta, ...] = ("the ", "answer"), *, hang_after: int | None = None, fails: Exception | None = None
    ) -> None:
        self.words = words
        self.hang_after = hang_after
        self.fails = fails
        self.asked: list[Request | EmbeddingRequest] = []
        self.closed = asyncio.Event()

    @property
    def capabilities(self) -> frozenset[Capability]:
        return CAPABILITIES

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Vectors of 1024 dimensions, which tell the inputs apart."""
        self.asked.append(request)
        if self.fails is not None:
            raise self.fails
        return Embeddings(tuple(number.to_bytes(4, "little") * 1024 for number in range(len(request.inputs))), 5)

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        self.asked.append(request)
        try:
            if self.fails is not None:
                raise self.fails
            for said, word in enumerate(self.words):
                if said == self.hang_after:
                    await asyncio.Event().wait()
                yield Delta(word) if isinstance(word, str) else word
            if self.hang_after == len(self.words):
                await asyncio.Event().wait()
            yield Delta(finish="stop", usage=Usage(3, len(self.words)))
        finally:
            self.closed.set()


@dataclass
class Node:
    key: str
    gossip: Gossip
    table: PeerTable
    answers: Answers
    seal_keys: SealKeys
    http: aiohttp.ClientSession
    ways: Ways
    membership: Membership
    url: str
    held: list[Offer]
    served: dict[str, Provider]
    supervisor: Supervisor
    relay: RelayService
    holder: RelayHolder
    kubo: KuboProcess | None = None
    ipfs: IpfsNode | None = None
    objects: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def holds(self, cid: str = CID, name: str = "a model", seeders: int = 1) -> None:
        self.held.append(Offer(self.key, cid, None, None, None, name, 1000, False, seeders=seeders))
        self.gossip.changed()
        self.holder.changed()

    def serves(self, script: Provider, cid: str = CID, name: str = "a model", seeders: int = 1, size: int = 1000) -> None:
        self.held = [offer for offer in self.held if offer.cid != cid]
        self.held.append(Offer(self.key, cid, None, None, None, name, size, True, free_slots=1, seeders=seeders))
        self.served[cid] = script
        self.gossip.changed()

    def peer(self) -> Peer:
        """This node as others know it."""
        address = self.gossip.pages.address()
        identity = self.gossip.pubsub.identity
        seal_keys = (self.seal_keys.public(),)
        return Peer(self.key, identity.peer_id if identity else None, address, 0, 0, seal_keys)

    def sees(self, other: Node, *, serving: bool = False) -> bool:
        return any(offer.node == other.key and offer.serving >= serving for offer in self.table.offers())


async def nowhere(ref: str | None, found: Callable[[], bool]) -> None:
    """A search that finds nobody: there is no DHT here."""


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> float:
    """Seconds until `condition()` held."""
    began = time.monotonic()
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.02)
    return time.monotonic() - began


@asynccontextmanager
async def swarm_node(
    home: Path,
    *,
    kubo: Path | None = None,
    direct: bool = True,
    join: tuple[Address, ...] = (),
    key: Ed25519PrivateKey | None = None,
    clock: Callable[[], float] = time.time,
    heartbeat_s: float = 12.0,
    standing: Callable[[str], Standing | None] = lambda key: None,
    limits: Limits | None = None,
    membership: Membership | None = None,
    relays: bool = False,
    relays_bytes: bool = False,
    range_limits: RangeLimits | None = None,
    relay_limits: RelayLimits | None = None,
    hold: Sequence[Peer] | None = None,
    hold_first: Collection[str] | None = None,
    network: Network = "loopback",
) -> AsyncIterator[Node]:
    """One node, of the open swarm unless `membership` is another, made for the same `key`.

    `kubo` is the binary, None leaves IPFS off; without `direct` no URL of its peer API is announced.
    With `relays` it carries for others, with `relays_bytes` models too. `hold` are the nodes that it asks to carry for it, from
    the start; later ones are put in `hold`, if it is a list. `hold_first` are the keys of those that it has joined, None all.
    `network` is where the ways to others may lead; this machine alone has any other node.
    """
    key = key or Ed25519PrivateKey.generate()
    membership = membership or OpenSwarm()
    name = key_name(key)
    await asyncio.to_thread(home.mkdir, parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        ledger = await LedgerThread.open(home / "ledger.db")
        stack.push_async_callback(ledger.close)
        http = await stack.enter_async_context(
            aiohttp.ClientSession(
                trust_env=False, auto_decompress=False, middlewares=(membership.middleware,)
            )
        )
        supervisor = Supervisor()
        stack.push_async_callback(supervisor.close)
        table = PeerTable(ledger, own=name, clock=clock, standing=standing)
        await settle(ledger, membership)
        await table.open()
        stack.push_async_callback(table.close)
        seal_keys = SealKeys(name, clock)
        node: Node

        def local() -> list[LocalModel]:
            return [LocalModel(offer, node.served[offer.cid]) for offer in node.held if offer.cid in node.served]

        async def object_bytes(cid: str) -> bytes | None:
            return node.objects.get(cid)

        def provider(cid: str) -> Provider | None:
            return node.served.get(cid)

        ipfs = lambda: gossip.pubsub.node  # noqa: E731 - the node of now

        async def ipfs_now() -> IpfsNode | None:
            return ipfs()

        def card() -> Card:
            identity = gossip.pubsub.identity
            addresses = identity.addresses if identity else ()
            urls = (url,) if direct else ()
            address = usable(Address(name, addresses, (), urls, holder.points()))
            peer_id = identity.peer_id if identity else None
            return Card(peer_id, address, seal_keys.public(), relay=relays)

        ways = Ways(network=network, ipfs=ipfs_now, http=http, membership=membership)
        pipe_http = await stack.enter_async_context(pipes.session(membership))
        stack.push_async_callback(ways.close)
        relay = RelayService(
            name,
            enabled=lambda: relays,
            bulk=lambda: relays_bytes,
            on_change=lambda: gossip.changed(),
            limits=relay_limits,
        )
        holder = RelayHolder(
            key,
            network="loopback",
            ways=ways,
            http=pipe_http,
            supervisor=supervisor,
            candidates=lambda: hold or (),
            joined=lambda: hold_first if hold_first is not None else {one.node for one in hold or ()},
            codes=lambda: {short(code_of_cid(offer.cid)) for offer in node.held},
            wanted=lambda: hold is not None,
            streams_port=lambda: ports.streams,
            on_change=lambda: gossip.changed(),
        )
        ways.relays = RelayTunnels(pipe_http, relay)
        ways.lookup = table.peer
        gossip = Gossip(
            OwnPages(key, ledger, card=card, offers=lambda: node.held, clock=clock),
            table=table,
            ledger=ledger,
            supervisor=supervisor,
            ways=ways,
            http=http,
            membership=membership,
            ipfs_within=ipfs_now,
            heartbeat_s=heartbeat_s,
            join=join,
            limits=limits,
        )
        chats = ChatServer(seal_keys, provider, limits=limits)
        objects = ObjectServer(object_bytes, membership, limits=limits)
        ranges = RangeServer(lambda cid: node.files.get(cid), membership, RateLimit(0), range_limits)
        parts = (Ping(name, membership), gossip, chats, objects, ranges, relay)
        routes: list[Route] = [route for part in parts for route in part.routes()]
        ports = await stack.enter_async_context(
            PeerApi(routes, membership=membership, limits=limits).listening(["127.0.0.1"], 0)
        )
        stack.push_async_callback(relay.close)
        stack.push_async_callback(holder.close)
        url = f"http://127.0.0.1:{ports.direct}"
        answers = Answers(table, local, lambda: node.held, ways=ways, http=http, clock=clock, search=nowhere)
        node = Node(
            name, gossip, table, answers, seal_keys, http, ways, membership, url, [], {}, supervisor, relay, holder
        )
        await gossip.start(ports.streams)
        holder.start()
        stack.push_async_callback(gossip.close)
        if kubo is not None:
            process = await asyncio.to_thread(
                KuboProcess, kubo, home / "ipfs", network="loopback", port=0, max_connections=32, log=home / "kubo.log"
            )
            stack.push_async_callback(process.stop)
            await process.start()
            rpc = await stack.enter_async_context(Rpc(process.api))
            node.kubo, node.ipfs = process, KuboNode(rpc, repo=home / "ipfs")
            stack.push_async_callback(gossip.on_ipfs_gone)
            await gossip.on_ipfs_ready(node.ipfs)
            stack.push_async_callback(gossip.close)
        yield node


async def text_of(deltas: AsyncIterator[Delta]) -> str:
    return "".join([delta.text async for delta in deltas])
