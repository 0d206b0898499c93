"""An IPFS node over the RPC of Kubo: the one implementation of `IpfsNode`.

Unary calls go through `ipfshttpclient` (unary.py), what it cannot do on a modern Kubo through rpc.py, reads through reading.py,
files in place through files.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from daemon.errors import BackendError, Bug, Unavailable, Unserved
from daemon.ipfs.files import PROFILE, Files
from daemon.ipfs.interface import Connection, PeerIdentity, Provider, PubsubMessage
from daemon.ipfs.peerings import Peerings
from daemon.ipfs.pubsub import read_message, topic_argument
from daemon.ipfs.reach import Reachability
from daemon.ipfs.reading import Reader
from daemon.ipfs.routing import find_providers
from daemon.ipfs.rpc import Rpc, RpcError, gone
from daemon.ipfs.swarm import Acquaintances, read_connections, read_reachability
from daemon.ipfs.unary import unary
from registry.cid import leaf_cid
from registry.multiaddrs import both_transports

T = TypeVar("T")

_DIAL_S = 10.0
_PUNCH_LOOK_S = 0.05  # Kubo has no event for a new connection
_MAX_MESSAGE = 1 << 20  # Kubo drops larger ones without a word
_PUBLISH_TRIES = 8
_PACE_S = 0.02  # between two messages; without it one of twenty was lost on a busy machine


class KuboNode:
    """`repo` is the repository of our own Kubo, whose parent folder holds every file to be added in place; None for a foreign RPC.

    `peerings` are the peers that the node holds on to; give the same to the node of the next life.
    """

    def __init__(self, rpc: Rpc, *, repo: Path | None, peerings: Peerings | None = None) -> None:
        self._rpc = rpc
        self._reader = Reader(rpc)
        self._files = Files(rpc, self._reader, repo.parent if repo is not None else None)
        self._peerings = peerings or Peerings()
        self._acquaintances = Acquaintances()
        self._publishing = asyncio.Lock()
        self._last_publish = 0.0
        self._tunnels = asyncio.Lock()

    # -- the node ---------------------------------------------------------------------------------------------------

    async def identity(self) -> PeerIdentity:
        # Not through a thread: it is asked every few seconds, also of a node that is about to go.
        found = await self._timed(self._rpc.call("id"))
        return PeerIdentity(found["ID"], tuple(found["Addresses"] or ()))

    async def version(self) -> str:
        return str((await self._unary(lambda client: client.version()))["Version"])

    async def peers(self) -> list[str]:
        direct = (each.peer_id for each in await self.connections() if not each.relayed)
        return list(dict.fromkeys(direct))

    async def connections(self) -> list[Connection]:
        return read_connections(await self._timed(self._rpc.call("swarm/peers", options={"direction": True})))

    async def reachability(self) -> Reachability:
        try:
            return read_reachability(await self._timed(self._rpc.call("swarm/addrs/autonat")))
        except RpcError:
            return "unknown"  # a configured node may be older than this call

    async def known_peers(self) -> tuple[str, ...]:
        options = {"direction": True, "identify": True}
        return self._acquaintances.look(await self._timed(self._rpc.call("swarm/peers", options=options)))

    @property
    def adding(self) -> bool:
        """Whether a file is being added, which would have to begin again if the node went now."""
        return self._files.adding

    async def pins(self) -> set[str]:
        found = await self._unary(lambda client: client.pin.ls(type="recursive"))
        return set(found["Keys"] or ())

    async def _unary(self, call: Callable[[Any], T]) -> T:
        return await unary(self._rpc.multiaddr, call)

    # -- adding and forgetting ----------------------------------------------------------------------------------------

    async def add_in_place(self, path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
        return await self._files.add_in_place(path, on_bytes)

    async def remove_in_place(self, cid: str) -> None:
        await self._files.remove_in_place(cid)

    async def broken_references(self, cid: str) -> list[str]:
        return await self._files.broken_references(cid)

    async def drop_blocks(self, cids: Sequence[str]) -> None:
        await self._files.drop_blocks(cids)

    async def add_bytes(self, data: bytes) -> str:
        if len(data) > 1 << 20:
            raise Bug("IPFS", f"{len(data)} bytes are no small object")
        cid = str(await self._unary(lambda client: client.add_bytes(data, opts={**PROFILE, "pin": True})))
        if cid != leaf_cid(data):
            raise Bug("IPFS", "the node gives a small object another CID")
        return cid

    # -- the DHT ------------------------------------------------------------------------------------------------------

    async def ping(self, peer_id: str, *, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                said = self._rpc.lines("ping", peer_id, timeout_s=None, options={"count": 1})
                async with contextlib.aclosing(said) as lines:
                    async for line in lines:
                        # The first line only announces what is about to be done.
                        if line.get("Success") and line.get("Time"):
                            return
        except (TimeoutError, RpcError) as error:
            raise Unserved("peer", "it does not answer", "try again") from error
        raise Unserved("peer", "it does not answer", "try again")

    async def provide(self, block: bytes, *, deadline_s: float) -> str:
        cid = await self.add_bytes(block)
        hint = "it needs a connection to a public node"
        try:
            async with asyncio.timeout(deadline_s):
                await self._rpc.read("routing/provide", cid, timeout_s=None)
        except TimeoutError as error:
            raise Unserved("IPFS", f"the DHT took no word within {deadline_s:g} s", hint) from error
        except RpcError as error:
            raise Unserved("IPFS", error.why, hint) from error
        return cid

    async def unprovide(self, cid: str) -> None:
        await self._files.unpin(cid)
        await self._files.drop_blocks([cid])

    async def providers(self, cid: str, *, limit: int, deadline_s: float) -> AsyncIterator[Provider]:
        own = (await self.identity()).peer_id
        async for provider in find_providers(self._rpc, cid, own=own, limit=limit, deadline_s=deadline_s):
            yield provider

    # -- reading ------------------------------------------------------------------------------------------------------

    async def read_bytes(self, cid: str, *, limit: int, deadline_s: float) -> bytes:
        return await self._reader.read_bytes(cid, limit=limit, deadline_s=deadline_s)

    async def size(self, cid: str, *, deadline_s: float) -> int:
        return await self._reader.size(cid, deadline_s=deadline_s)

    async def leaves(self, cid: str, *, deadline_s: float) -> list[str]:
        return [leaf.cid for leaf in (await self._reader.layout(cid, deadline_s=deadline_s)).leaves]

    def read_range(self, cid: str, offset: int, length: int, *, stall_s: float) -> AsyncIterator[bytes]:
        return self._reader.read_range(cid, offset, length, stall_s=stall_s)

    # -- pubsub -------------------------------------------------------------------------------------------------------

    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > _MAX_MESSAGE:
            raise Bug("IPFS", f"a pubsub message of {len(data)} bytes would be lost")
        body = b'--swarmctl\r\nContent-Disposition: form-data; name="file"; filename="m"\r\n\r\n' + data + b"\r\n--swarmctl--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=swarmctl"}
        async with self._publishing:
            # A receiver drops what it validates after a later message of the same author, and it validates side by side.
            await asyncio.sleep(self._last_publish + _PACE_S - time.monotonic())
            for attempt in range(_PUBLISH_TRIES):
                try:
                    await self._rpc.read("pubsub/pub", topic_argument(topic), body=body, headers=headers)
                    self._last_publish = time.monotonic()
                    return
                except TimeoutError as error:
                    raise gone(error) from error
                except RpcError as error:
                    # Another client of the same node has used a later sequence number in between.
                    if "validation ignored" not in error.why or attempt == _PUBLISH_TRIES - 1:
                        raise
                    await asyncio.sleep(0.01 * 2**attempt)

    async def subscribe(self, topic: str) -> AsyncIterator[PubsubMessage]:
        async for found in self._rpc.lines("pubsub/sub", topic_argument(topic), timeout_s=None):
            message = read_message(found)
            if message is not None:
                yield message
        raise Unavailable("IPFS", "the node ended the subscription", "swarmctl status tells its state")

    async def topic_peers(self, topic: str) -> list[str]:
        found = await self._timed(self._rpc.call("pubsub/peers", topic_argument(topic)))
        return list(found["Strings"] or ())

    # -- other nodes --------------------------------------------------------------------------------------------------

    async def connect(self, multiaddr: str, *, deadline_s: float) -> None:
        """As in `IpfsNode`. In every network: the peers that we are told to connect to are few, and Kubo would trim them like any other."""
        await self._dial(multiaddr, deadline_s)
        await self._timed(self._rpc.call("swarm/peering/add", multiaddr))
        oldest = self._peerings.add(multiaddr)
        if oldest is not None:
            await self._timed(self._rpc.call("swarm/peering/rm", oldest))

    async def _dial(self, multiaddr: str, deadline_s: float) -> None:
        """Returns with a direct connection: a relayed one carries nothing of ours, it is there to punch a hole.

        The far node tries that once when the relayed connection comes in, and drops it unsaid while it does not yet know its own
        outside address (go-libp2p holepunch: up to some seconds after its start); so it is given another occasion.
        """
        hint = "check that the node runs and can be reached from here"
        peer = multiaddr.rpartition("/p2p/")[2]
        relayed = False
        try:
            async with asyncio.timeout(deadline_s):
                for patience in _punching_times():
                    await self._rpc.call("swarm/connect", *both_transports(multiaddr), timeout_s=None)
                    relayed = not await self._direct_within(peer, patience)
                    if not relayed:
                        return
                    await self._hang_up_relayed(peer)
        except TimeoutError as error:
            why = "only a relay reaches it" if relayed else "no answer"
            raise Unserved(multiaddr, f"{why} within {deadline_s:g} s", hint) from error
        except RpcError as error:
            raise Unserved(multiaddr, error.why, hint) from error

    async def _direct_within(self, peer: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while peer not in await self.peers():
            if time.monotonic() > end:
                return False
            await asyncio.sleep(_PUNCH_LOOK_S)
        return True

    async def _hang_up_relayed(self, peer: str) -> None:
        for connection in await self.connections():
            if connection.peer_id == peer and connection.relayed:
                with contextlib.suppress(RpcError):  # it has ended by itself
                    await self._rpc.call("swarm/disconnect", f"{connection.address}/p2p/{peer}")

    async def listen(self, protocol: str, port: int, *, report_peer_id: bool) -> None:
        own = f"/p2p/{(await self.identity()).peer_id}"
        target = f"/ip4/127.0.0.1/tcp/{port}"
        options = {"report-peer-id": report_peer_id}
        async with self._tunnels:
            await self._timed(self._rpc.call("p2p/close", options={"protocol": protocol, "listen-address": own}))
            await self._timed(self._rpc.call("p2p/listen", protocol, target, options=options))

    @asynccontextmanager
    async def dial(self, protocol: str, peer_id: str) -> AsyncIterator[tuple[str, int]]:
        # A tunnel dials only when somebody connects to it, and then closes without a reason; so the reason is asked for here.
        await self._dial(f"/p2p/{peer_id}", _DIAL_S)
        address = await self._open_tunnel(protocol, peer_id)
        try:
            yield "127.0.0.1", int(address.rpartition("/")[2])
        finally:
            with contextlib.suppress(BackendError):  # the node is gone, and the tunnel with it
                await self._timed(self._rpc.call("p2p/close", options={"listen-address": address}))

    async def _open_tunnel(self, protocol: str, peer_id: str) -> str:
        """Kubo picks the port and does not tell it, so what is new in its list is ours."""
        async with self._tunnels:
            before = await self._tunnels_to(protocol, peer_id)
            await self._timed(self._rpc.call("p2p/forward", protocol, "/ip4/127.0.0.1/tcp/0", f"/p2p/{peer_id}"))
            new = await self._tunnels_to(protocol, peer_id) - before
        if len(new) != 1:
            raise Unavailable("IPFS", "it opened no tunnel that can be told from others", "try again")
        return new.pop()

    async def _tunnels_to(self, protocol: str, peer_id: str) -> set[str]:
        found = await self._timed(self._rpc.call("p2p/ls"))
        ours = (protocol, f"/p2p/{peer_id}")
        return {entry["ListenAddress"] for entry in found["Listeners"] or () if (entry["Protocol"], entry["TargetAddress"]) == ours}

    async def _timed(self, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except TimeoutError as error:
            raise gone(error) from error


def _punching_times() -> Iterator[float]:
    """Seconds to wait for a hole after each relayed connection; with lost packets one attempt takes longer."""
    seconds = 1.0
    while True:
        yield seconds
        seconds *= 1.5
