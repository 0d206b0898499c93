"""Becoming part of a swarm: `join`, and staying in it. Joined addresses are remembered and tried again until they answer.

A node that hears nobody at all also tries the nodes that it knew in the last week. What is joined was named by a person and may be
any host; where an old friend is was said by itself, so that it is tried only where this kind of network leads (registry/ranges.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from daemon.errors import SwarmError, Unserved, UsageError, VerificationError
from daemon.gossip.ear import Ear
from daemon.gossip.meeting import Meeting
from daemon.gossip.peers import PeerTable
from daemon.ipfs.interface import IpfsNode
from daemon.ledger import LedgerThread
from daemon.membership import Membership
from daemon.peerapi.ways import Way, reach
from daemon.supervise import Supervisor
from registry.address import format_address, parse_address
from registry.endpoints import peer_of
from registry.records import Address, Peer
from registry.store import Ledger

_log = logging.getLogger(__name__)

JOINED_LIMIT = 64
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
OLD_FRIENDS = 8  # remembered nodes tried at once by a node that hears nobody
JOINED = "swarm.joined"  # in the ledger
_LOOK_S = 0.5
_BOTH_S = 1.5  # how long a join that has worked over one part waits for the other


@dataclass(slots=True)
class _Contact:
    address: Address
    due: float = 0.0  # monotonic seconds
    pause: float = FIRST_PAUSE_S


class Joiner:
    """`own` is our node key; `join` are the addresses of the settings: they are tried like joined ones, but not written down.
    `ipfs` gives the IPFS node when it answers, or None when there is none within a while.
    """

    def __init__(
        self,
        own: str,
        *,
        meeting: Meeting,
        ear: Ear,
        table: PeerTable,
        ledger: LedgerThread,
        supervisor: Supervisor,
        membership: Membership,
        ipfs: Callable[[], Awaitable[IpfsNode | None]],
        join: Sequence[Address] = (),
    ) -> None:
        self._own = own
        self._meeting = meeting
        self._ear = ear
        self._table = table
        self._ledger = ledger
        self._supervisor = supervisor
        self._membership = membership
        self._ipfs = ipfs
        self._settings = join
        self._joined: dict[str, Address] = {}
        self._contacts: dict[str, _Contact] = {}

    async def start(self) -> None:
        stored = await self._ledger.call(Ledger.get_meta, JOINED)
        self._joined = {address.node: address for address in map(parse_address, json.loads(stored or "[]"))}
        for address in [*self._settings, *self._joined.values()]:
            if address.node != self._own:
                if address.node:  # else it is known when the node is met
                    self._table.keep(address.node)
                self._contacts[format_address(address)] = _Contact(address)
        self._supervisor.run("rejoin", self._rejoin_forever, restart=True)

    async def join(self, address: Address) -> Peer:
        """Know the node at `address` from now on. Raises `UsageError` for our own, `Unserved` with each way that failed."""
        if address.node == self._own:
            raise UsageError("address", "it is this node's own", "use the address that status shows on the other node")
        peer = await self._meet(address)
        address = replace(address, node=peer.node)
        self._joined[peer.node] = address
        while len(self._joined) > JOINED_LIMIT:
            oldest = next(iter(self._joined))
            del self._joined[oldest]
            self._table.release(oldest)
        await self._ledger.call(Ledger.set_meta, JOINED, json.dumps([format_address(one) for one in self._joined.values()]))
        self._contacts[format_address(address)] = _Contact(address)
        return peer

    def peers(self) -> list[Peer]:
        """The joined nodes, at the address that they announce now."""
        found: list[Peer] = []
        for contact in self._contacts.values():
            node = contact.address.node
            found.append(self._table.peer(node) or Peer(node, None, contact.address, 0, 0))
        return found

    async def _meet(self, address: Address) -> Peer:
        """Connect to a node that a person named, over every part of its address that both nodes have.

        Raises `Unserved` or `VerificationError` when none works.
        """
        ways: dict[str, Awaitable[Peer]] = {}
        if address.http or address.relays:
            ways["HTTP"] = self._meeting.meet(replace(address, ipfs=()), joined=True)
        if address.ipfs:
            ways["IPFS"] = self._over_ipfs(address)
        return await self._over_all(ways)

    async def _meet_again(self, peer: Peer) -> Peer:
        """The same for a node that is remembered, at what it announced. It has no place of its own in the table."""
        address = peer.address
        ways: dict[str, Awaitable[Peer]] = {}
        if address.http or address.relays:
            without_ipfs = replace(peer, peer_id=None, address=replace(address, ipfs=()))
            ways["HTTP"] = self._meeting.meet_again(without_ipfs)
        if address.ipfs:
            only_ipfs = replace(peer, address=Address(peer.node, ipfs=address.ipfs))
            ways["IPFS"] = self._meeting.meet_again(only_ipfs)
        return await self._over_all(ways)

    async def _over_all(self, ways: Mapping[str, Awaitable[Peer]]) -> Peer:
        if not ways:
            why = "the address has no part that this node can reach"
            raise Unserved("join", why, "copy it from the other node's status again")
        tasks = {name: asyncio.ensure_future(way) for name, way in ways.items()}
        try:
            return await self._first_peer(tasks)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _first_peer(self, tasks: Mapping[str, asyncio.Future[Peer]]) -> Peer:
        """The peer, as soon as one part has worked and the other has had a fair chance."""
        pending = set(tasks.values())
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            found = [task.result() for task in done if task.exception() is None]
            if found:
                if pending:
                    await asyncio.wait(pending, timeout=_BOTH_S)
                return found[0]
        failures = {name: task.exception() for name, task in tasks.items()}
        for error in failures.values():
            if error is not None and not isinstance(error, SwarmError):
                raise error
        told = "; ".join(f"{name}: {error.why}" for name, error in failures.items() if isinstance(error, SwarmError))
        if any(isinstance(error, VerificationError) for error in failures.values()):
            raise VerificationError("join", told, "check the address with whoever gave it")
        raise Unserved("join", told, "check that the other node runs and that its address is current")

    async def _over_ipfs(self, address: Address) -> Peer:
        """At multiaddrs that a person named: unlike those of `Ways`, they may be of any host."""
        ipfs = await self._ipfs()
        if ipfs is None:
            raise Unserved("peer", "IPFS is not running here")
        peer_id = peer_of(address.ipfs[0])
        await reach(ipfs, peer_id, address.ipfs)
        async with ipfs.dial(self._membership.protocol, peer_id) as (host, port):
            way = Way(f"http://{host}:{port}", node=address.node)
            peer = await self._meeting.over(way, address.node, joined=True)
        if peer.peer_id != peer_id:
            raise VerificationError("peer", "another node answers there")
        return peer

    async def _rejoin_forever(self) -> None:
        alone = _Contact(Address(""))  # when old friends are tried
        while True:
            now = time.monotonic()
            due = [contact for contact in self._contacts.values() if contact.due <= now and self._away(contact)]
            await asyncio.gather(*(self._try(contact) for contact in due))
            if not self._ear.heard and alone.due <= now:
                old = self._table.remembered()[:OLD_FRIENDS]
                await asyncio.gather(*(self._try_again(peer) for peer in old))
                alone.due, alone.pause = now + alone.pause, min(2 * alone.pause, LONGEST_PAUSE_S)
            elif self._ear.heard:
                alone.pause = FIRST_PAUSE_S
            await asyncio.sleep(_LOOK_S)

    def _away(self, contact: _Contact) -> bool:
        node = contact.address.node
        return not self._table.alive(node) or node not in self._ear.heard

    async def _try_again(self, peer: Peer) -> None:
        try:
            await self._meet_again(peer)
        except SwarmError as error:
            _log.debug("an old friend cannot be reached: %s", error)

    async def _try(self, contact: _Contact) -> None:
        address = contact.address
        if not address.ipfs and not address.http and not address.relays:
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
