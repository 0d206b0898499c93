"""Becoming part of a swarm: `join`, and staying in it. Joined addresses are remembered and tried again until they answer.

A node that hears nobody at all also tries the nodes that it knew in the last week.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Protocol

import aiohttp

from daemon.errors import SwarmError, Unserved, UsageError, VerificationError
from daemon.ipfs.interface import IpfsNode
from daemon.ledger import LedgerThread
from daemon.supervise import Supervisor
from daemon.swarm import exchange
from daemon.swarm.peers import PeerTable
from daemon.swarm.reach import first, reach
from daemon.swarm.relay import PROTOCOL
from registry.address import format_address, parse_address
from registry.endpoints import peer_of
from registry.records import Address, Announcement, Peer
from registry.store import Ledger

_log = logging.getLogger(__name__)

JOINED_LIMIT = 64
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
OLD_FRIENDS = 8  # remembered nodes tried at once by a node that hears nobody
_JOINED = "swarm.joined"
_LOOK_S = 0.5


class Voice(Protocol):
    """What joining needs of the node that joins."""

    node: str

    @property
    def ipfs(self) -> IpfsNode | None: ...
    @property
    def heard(self) -> Set[str]:
        """Nodes that said something since the start, or since IPFS came back."""
        ...

    async def own_pages(self) -> Sequence[bytes]: ...
    async def take_in(self, envelopes: Sequence[bytes]) -> list[Announcement | str]: ...


@dataclass(slots=True)
class _Contact:
    address: Address
    due: float = 0.0  # monotonic seconds
    pause: float = FIRST_PAUSE_S


class Joiner:
    """`join` are the addresses of the settings; they are tried like joined ones, but not written down."""

    def __init__(
        self,
        voice: Voice,
        *,
        table: PeerTable,
        ledger: LedgerThread,
        supervisor: Supervisor,
        http: aiohttp.ClientSession,
        join: Sequence[Address] = (),
    ) -> None:
        self._voice = voice
        self._table = table
        self._ledger = ledger
        self._supervisor = supervisor
        self._http = http
        self._settings = join
        self._joined: dict[str, Address] = {}
        self._contacts: dict[str, _Contact] = {}

    async def start(self) -> None:
        stored = await self._ledger.call(Ledger.get_meta, _JOINED)
        self._joined = {address.node: address for address in map(parse_address, json.loads(stored or "[]"))}
        for address in [*self._settings, *self._joined.values()]:
            if address.node != self._voice.node:
                self._contacts[format_address(address)] = _Contact(address)
        self._supervisor.run("rejoin", self._rejoin_forever, restart=True)

    async def join(self, address: Address) -> Peer:
        """Know the node at `address` from now on. Raises `UsageError` for our own, `Unserved` with each way that failed."""
        if address.node == self._voice.node:
            raise UsageError("address", "it is this node's own", "use the address that status shows on the other node")
        peer = await self._meet(address)
        address = replace(address, node=peer.node)
        self._joined[peer.node] = address
        while len(self._joined) > JOINED_LIMIT:
            del self._joined[next(iter(self._joined))]
        await self._ledger.call(Ledger.set_meta, _JOINED, json.dumps([format_address(one) for one in self._joined.values()]))
        self._contacts[format_address(address)] = _Contact(address)
        return peer

    async def _meet(self, address: Address) -> Peer:
        """Connect over every part that both nodes have. Raises `Unserved` or `VerificationError` when none works."""
        ways: dict[str, Awaitable[Peer]] = {}
        if address.http:
            ways["HTTP"] = first(self._over_http(url, address.node) for url in address.http)
        if address.ipfs:
            ways["IPFS"] = self._over_ipfs(address)
        if not ways:
            raise Unserved("join", "the address has neither an IPFS nor an HTTP part", "copy it from the other node's status again")
        results = await asyncio.gather(*ways.values(), return_exceptions=True)
        reasons: list[str] = []
        for way, result in zip(ways, results, strict=True):
            if isinstance(result, Peer):
                return result
            if not isinstance(result, SwarmError):
                raise result
            reasons.append(f"{way}: {result.why}")
        if any(isinstance(result, VerificationError) for result in results):
            raise VerificationError("join", "; ".join(reasons), "check the address with whoever gave it")
        raise Unserved("join", "; ".join(reasons), "check that the other node runs and that its address is current")

    async def _over_http(self, url: str, node: str) -> Peer:
        envelopes = await exchange.post(self._http, url, await self._voice.own_pages())
        if not envelopes:
            raise Unserved("peer", "it says nothing about itself")
        said = exchange.speaker(envelopes[0])
        if node and said.node != node:
            raise VerificationError("peer", "another node answers there")
        heard = await self._voice.take_in(envelopes)
        peer = self._table.peer(said.node)
        if peer is None:
            raise Unserved("peer", str(heard[0]))
        return peer

    async def _over_ipfs(self, address: Address) -> Peer:
        ipfs = self._voice.ipfs
        if ipfs is None:
            raise Unserved("peer", "IPFS is not running here")
        peer_id = peer_of(address.ipfs[0])
        await reach(ipfs, peer_id, address.ipfs)
        async with ipfs.dial(PROTOCOL, peer_id) as (host, port):
            peer = await self._over_http(f"http://{host}:{port}", address.node)
        if peer.peer_id != peer_id:
            raise VerificationError("peer", "another node answers there")
        return peer

    def doors(self) -> list[str]:
        """Doors of the joined nodes, at the address that they announce now."""
        found: list[str] = []
        for contact in self._contacts.values():
            peer = self._table.peer(contact.address.node)
            urls = peer.address.http if peer is not None else contact.address.http
            found += urls[:1]
        return found

    async def _rejoin_forever(self) -> None:
        alone = _Contact(Address(""))
        while True:
            now = time.monotonic()
            due = [contact for contact in self._contacts.values() if contact.due <= now and self._away(contact)]
            await asyncio.gather(*(self._try(contact) for contact in due))
            if not self._voice.heard and alone.due <= now:
                old = [peer.address for peer in self._table.remembered()[:OLD_FRIENDS]]
                await asyncio.gather(*(self._try(_Contact(address)) for address in old))
                alone.due, alone.pause = now + alone.pause, min(2 * alone.pause, LONGEST_PAUSE_S)
            elif self._voice.heard:
                alone.pause = FIRST_PAUSE_S
            await asyncio.sleep(_LOOK_S)

    def _away(self, contact: _Contact) -> bool:
        node = contact.address.node
        peer = self._table.peer(node)
        live = peer is not None and any(one is peer for one in self._table.peers())
        return not live or node not in self._voice.heard

    async def _try(self, contact: _Contact) -> None:
        address = contact.address
        if not address.ipfs and not address.http:
            return
        try:
            peer = await self._meet(address)
        except SwarmError as error:
            _log.info("a known node cannot be reached: %s", error)
            contact.due, contact.pause = time.monotonic() + contact.pause, min(2 * contact.pause, LONGEST_PAUSE_S)
            return
        # A bare multiaddr has shown whose it is.
        contact.address = replace(address, node=peer.node)
        contact.pause = FIRST_PAUSE_S
