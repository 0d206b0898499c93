"""An IPFS node over the RPC of Kubo: the one implementation of `IpfsNode`.

Unary calls go through `ipfshttpclient` on threads (one client per call: its sessions are not thread-safe); what it cannot do
on a modern Kubo goes through daemon/ipfs/rpc.py.

Ranges are read leaf by leaf, not by `cat?offset&length`: at the end of a range `cat` cancels the leaves that it had prefetched,
Kubo's Bitswap loses the same leaves when the next range wants them at that moment, and the read hangs (seen).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote_plus

import ipfshttpclient

from daemon.errors import BackendError, Bug, Unavailable, Unserved, UsageError, VerificationError
from daemon.ipfs.dag import MAX_DEPTH, MAX_LEAF, MAX_LEAVES, Child, FileNode, Layout, Part, parse_file_node
from daemon.ipfs.interface import PeerIdentity, PubsubMessage
from daemon.ipfs.pubsub import read_message, topic_argument
from daemon.ipfs.rpc import Rpc, RpcError, gone, refused
from registry.cid import leaf_cid, parse_cid
from registry.errors import Malformed

T = TypeVar("T")

# The profile unixfs-v1-2025 in full, because a configured node may have other defaults.
_PROFILE = {"cid-version": 1, "raw-leaves": True, "chunker": "size-1048576", "max-file-links": 1024, "hash": "sha2-256", "trickle": False}
_UNARY_S = 5.0  # ipfshttpclient's calls cannot be cancelled, so they must be short
_ADD_S = 120.0  # Kubo is silent while it works through what it has read
_READ = 4 << 20  # bytes read from a file at once
_AHEAD = 4  # leaves in flight per range; 16 in all over four ranges were best on two cores
_WALKERS = 8
_BATCH = 512  # CIDs per call: they travel in the URL
_LAYOUTS = 8
_PEERINGS = 64  # peers that Kubo is told to hold on to; the oldest is let go
_DIAL_S = 10.0
_MAX_MESSAGE = 1 << 20  # Kubo drops larger ones without a word
_PUBLISH_TRIES = 8

_MISSING, _OK = 30, 0  # of `filestore/verify`


class KuboNode:
    """`repo` is the repository of our own Kubo, whose parent folder holds every file to be added in place; None for a foreign RPC."""

    def __init__(self, rpc: Rpc, *, repo: Path | None) -> None:
        self._rpc = rpc
        self._home = repo.parent if repo is not None else None
        self._layouts: OrderedDict[str, _Watched] = OrderedDict()
        self._peerings: OrderedDict[str, None] = OrderedDict()
        self._publishing = asyncio.Lock()
        self._tunnels = asyncio.Lock()

    # -- the node ---------------------------------------------------------------------------------------------------

    async def identity(self) -> PeerIdentity:
        found = await self._unary(lambda client: client.id())
        return PeerIdentity(found["ID"], tuple(found["Addresses"] or ()))

    async def version(self) -> str:
        return str((await self._unary(lambda client: client.version()))["Version"])

    async def peers(self) -> list[str]:
        found = await self._unary(lambda client: client.swarm.peers())
        return [peer["Peer"] for peer in found["Peers"] or ()]

    async def pins(self) -> set[str]:
        found = await self._unary(lambda client: client.pin.ls(type="recursive"))
        return set(found["Keys"] or ())

    async def _unary(self, call: Callable[[Any], T]) -> T:
        def run() -> T:
            # `session=True` skips the version check, which knows no Kubo of this decade.
            client = ipfshttpclient.Client(self._rpc.multiaddr, session=True, timeout=_UNARY_S)
            try:
                return call(client)
            finally:
                client.close()

        try:
            return await asyncio.to_thread(run)
        except ipfshttpclient.exceptions.ErrorResponse as error:
            raise refused("call", str(error.args[0] if error.args else error)) from error
        except ipfshttpclient.exceptions.Error as error:
            raise gone(error) from error

    # -- adding and forgetting ----------------------------------------------------------------------------------------

    async def add_in_place(self, path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
        """As in `IpfsNode`. Leaves that IPFS already has as copies stay copies: `drop_blocks` them first.

        Raises `Unavailable` when the node cannot read the file where it lies.
        """
        seen = await asyncio.to_thread(self._as_kubo_sees, path)
        size = (await asyncio.to_thread(os.stat, path)).st_size
        head = (
            "--swarmctl\r\n"
            f'Content-Disposition: form-data; name="file"; filename="{quote_plus(path.name)}"\r\n'
            "Content-Type: application/octet-stream\r\n"
            f"Abspath-Encoded: {quote_plus(str(seen))}\r\n\r\n"
        ).encode()
        tail = b"\r\n--swarmctl--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=swarmctl", "Content-Length": str(len(head) + size + len(tail))}
        try:
            answer = await self._rpc.read(
                "add", timeout_s=_ADD_S, options={**_PROFILE, "nocopy": True, "pin": True, "progress": False},
                body=_body(head, path, size, tail, on_bytes), headers=headers,
            )  # fmt: skip
        except TimeoutError as error:
            raise gone(error) from error
        except RpcError as error:
            if "filestore" not in error.why:
                raise
            raise self._cannot_refer(path) from error
        cid = _final_hash(answer)
        if self._home is None and await self._broken((await self._layout(cid, _UNARY_S, offline=True)).leaves[:1]):
            await self.remove_in_place(cid)
            raise self._cannot_refer(path)
        return cid

    def _cannot_refer(self, path: Path) -> Unavailable:
        why = "the configured IPFS node cannot serve it from where it lies" if self._home is None else "it is outside the data folder"
        return Unavailable(path.name, why, "leave ipfs.rpc empty to use a node of our own")

    def _as_kubo_sees(self, path: Path) -> Path:
        """The path below the home as Kubo knows it (links resolved), because it compares prefixes; a link *inside* it is kept."""
        if self._home is None:
            return path.absolute()
        home = self._home.resolve()
        absolute = path.absolute()
        for base in (home, self._home.absolute()):
            if absolute.is_relative_to(base):
                return home / absolute.relative_to(base)
        raise self._cannot_refer(path)

    async def remove_in_place(self, cid: str) -> None:
        self._layouts.pop(cid, None)
        try:
            layout = await self._layout(cid, _UNARY_S, offline=True)
        except (RpcError, Unserved):
            layout = None  # nothing of it is here, or not enough to find the rest
        try:
            await self._rpc.call("pin/rm", cid)
        except RpcError as error:
            if "not pinned" not in error.why:
                raise
        await self.drop_blocks([cid] if layout is None else [*(leaf.cid for leaf in layout.leaves), *layout.nodes])

    async def broken_references(self, cid: str) -> list[str]:
        return await self._broken((await self._layout(cid, _UNARY_S, offline=True)).leaves)

    async def _broken(self, leaves: Sequence[Child]) -> list[str]:
        broken: list[str] = []
        for batch in _batches([leaf.cid for leaf in leaves]):
            async for found in self._rpc.lines("filestore/verify", *batch, timeout_s=_ADD_S):
                name = found["Key"]["/"]
                # What is no reference may be a plain copy, which Kubo checks by itself when it reads it.
                if found["Status"] != _OK and not (found["Status"] == _MISSING and await self._has(name)):
                    broken.append(name)
        return broken

    async def _has(self, cid: str) -> bool:
        try:
            await self._rpc.call("block/stat", cid, options={"offline": True})
        except RpcError:
            return False
        return True

    async def add_bytes(self, data: bytes) -> str:
        if len(data) > 1 << 20:
            raise Bug("IPFS", f"{len(data)} bytes are no small object")
        cid = str(await self._unary(lambda client: client.add_bytes(data, opts={**_PROFILE, "pin": True})))
        if cid != leaf_cid(data):
            raise Bug("IPFS", "the node gives a small object another CID")
        return cid

    async def drop_blocks(self, cids: Sequence[str]) -> None:
        for batch in _batches(cids):
            async for result in self._rpc.lines("block/rm", *batch, timeout_s=_ADD_S, options={"force": True, "quiet": True}):
                # A block that something else pins stays, and should.
                if (why := result.get("Error")) and "pinned" not in why:
                    raise refused("block/rm", str(why))

    # -- reading ------------------------------------------------------------------------------------------------------

    async def read_bytes(self, cid: str, *, limit: int, deadline_s: float) -> bytes:
        _checked(cid)
        with _unserved(cid, deadline_s):
            async with asyncio.timeout(deadline_s):
                data = await self._rpc.read("cat", cid, timeout_s=None, limit=limit + 1, options={"length": limit + 1})
        if len(data) > limit:
            raise VerificationError(cid, f"it is larger than {limit} bytes", "check the reference with whoever gave it")
        return data

    async def size(self, cid: str, *, deadline_s: float) -> int:
        with _unserved(cid, deadline_s):
            async with asyncio.timeout(deadline_s):
                return (await self._node(_checked(cid), offline=False)).size

    async def leaves(self, cid: str, *, deadline_s: float) -> list[str]:
        return [leaf.cid for leaf in (await self._layout(cid, deadline_s)).leaves]

    async def read_range(self, cid: str, offset: int, length: int, *, stall_s: float) -> AsyncIterator[bytes]:
        watched = self._watch(cid, await self._layout(cid, stall_s))
        parts = watched.layout.parts(offset, length)
        flying: deque[tuple[Part, asyncio.Task[bytes]]] = deque()

        def launch(count: int) -> None:
            flying.extend((part, asyncio.create_task(self._leaf(watched, part.leaf))) for part in islice(parts, count))

        came = 0
        try:
            launch(_AHEAD)
            while flying:
                part, task = flying[0]
                data = await watched.arrival(cid, task, stall_s)
                flying.popleft()
                launch(1)
                came += part.take
                yield data if part.take == len(data) else data[part.skip : part.skip + part.take]
        finally:
            for _, task in flying:
                task.cancel()
            await asyncio.gather(*(task for _, task in flying), return_exceptions=True)
        if came != length:
            raise Unserved(cid, f"it ends {length - came} bytes before the range does", "check the reference with whoever gave it")

    async def _leaf(self, watched: _Watched, leaf: Child) -> bytes:
        with _unserved(leaf.cid, 0):
            data = await self._rpc.read("cat", leaf.cid, timeout_s=None, limit=MAX_LEAF)
        if len(data) != leaf.size:
            raise VerificationError(leaf.cid, "its size is not what the node above it says", "check the reference with whoever gave it")
        watched.last_arrival = time.monotonic()
        return data

    def _watch(self, cid: str, layout: Layout) -> _Watched:
        watched = self._layouts.setdefault(cid, _Watched(layout))
        self._layouts.move_to_end(cid)
        if len(self._layouts) > _LAYOUTS:
            self._layouts.popitem(last=False)
        return watched

    async def _layout(self, cid: str, deadline_s: float, *, offline: bool = False) -> Layout:
        """Raises `Unserved` at the deadline, `UsageError` when `cid` names no file."""
        if (known := self._layouts.get(cid)) is not None:
            return known.layout
        with _unserved(cid, deadline_s):
            async with asyncio.timeout(deadline_s):
                layout = await self._walk(_checked(cid), offline=offline)
        return self._watch(cid, layout).layout

    async def _walk(self, root: Child, *, offline: bool) -> Layout:
        """Level by level: in a balanced tree all leaves have one depth, which the first path down tells."""
        top = await self._node(root, offline=offline)
        level = [(root, top)]
        nodes: list[str] = []
        gate = asyncio.Semaphore(_WALKERS)

        async def fetch(child: Child) -> tuple[Child, FileNode]:
            async with gate:
                return child, await self._node(child, offline=offline)

        for _ in range(MAX_DEPTH):
            if not level[0][1].children:
                return _layout(top, [Child(child.cid, child.raw, node.size) for child, node in level], nodes)
            nodes += [child.cid for child, _ in level]
            below = [child for _, node in level for child in node.children]
            if len(below) > MAX_LEAVES:
                break
            if below[0].raw or not (await fetch(below[0]))[1].children:
                return _layout(top, below, nodes)
            level = await asyncio.gather(*(fetch(child) for child in below))
        raise UsageError(root.cid, "its tree is too large", "only files up to 1 TiB are taken")

    async def _node(self, child: Child, *, offline: bool) -> FileNode:
        options = {"offline": True} if offline else {}
        if child.raw:
            found = await self._rpc.call("block/stat", child.cid, timeout_s=None, options=options)
            return FileNode(int(found["Size"]), ())
        block = await self._rpc.read("block/get", child.cid, timeout_s=None, limit=MAX_LEAF, options=options)
        try:
            return await asyncio.to_thread(parse_file_node, block)
        except Malformed as error:
            raise UsageError(child.cid, str(error), "give the CID of one file") from error

    # -- pubsub -------------------------------------------------------------------------------------------------------

    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > _MAX_MESSAGE:
            raise Bug("IPFS", f"a pubsub message of {len(data)} bytes would be lost")
        body = b'--swarmctl\r\nContent-Disposition: form-data; name="file"; filename="m"\r\n\r\n' + data + b"\r\n--swarmctl--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=swarmctl"}
        async with self._publishing:
            for attempt in range(_PUBLISH_TRIES):
                try:
                    await self._rpc.read("pubsub/pub", topic_argument(topic), body=body, headers=headers)
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
        peer = multiaddr.rpartition("/p2p/")[2]
        self._peerings[peer] = None
        self._peerings.move_to_end(peer)
        if len(self._peerings) > _PEERINGS:
            oldest, _ = self._peerings.popitem(last=False)
            await self._timed(self._rpc.call("swarm/peering/rm", oldest))

    async def _dial(self, multiaddr: str, deadline_s: float) -> None:
        hint = "check that the node runs and can be reached from here"
        try:
            async with asyncio.timeout(deadline_s):
                await self._rpc.call("swarm/connect", multiaddr, timeout_s=None)
        except TimeoutError as error:
            raise Unserved(multiaddr, f"no answer within {deadline_s:g} s", hint) from error
        except RpcError as error:
            raise Unserved(multiaddr, error.why, hint) from error

    async def listen(self, protocol: str, port: int) -> None:
        own = f"/p2p/{(await self.identity()).peer_id}"
        async with self._tunnels:
            await self._timed(self._rpc.call("p2p/close", options={"protocol": protocol, "listen-address": own}))
            await self._timed(self._rpc.call("p2p/listen", protocol, f"/ip4/127.0.0.1/tcp/{port}"))

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


class _Watched:
    """A file that is being read, and when the last leaf of it came, whichever read had asked for it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.last_arrival = 0.0

    async def arrival(self, cid: str, task: asyncio.Task[bytes], stall_s: float) -> bytes:
        """Waits for one leaf as long as *any* leaf of the file comes: on a slow link many leaves share the line."""
        began = time.monotonic()
        while (left := max(began, self.last_arrival) + stall_s - time.monotonic()) > 0:
            done, _ = await asyncio.wait({task}, timeout=left)
            if done:
                return task.result()
        raise Unserved(cid, f"no byte came for {stall_s:g} s", "the download can be resumed")


def _layout(top: FileNode, leaves: Sequence[Child], nodes: Sequence[str]) -> Layout:
    if any(leaf.size > MAX_LEAF for leaf in leaves) or sum(leaf.size for leaf in leaves) != top.size:
        raise UsageError("IPFS", "the file has a layout that is not supported", "ask for a CID made with Kubo's default layout")
    return Layout(top.size, tuple(leaves), tuple(nodes))


def _checked(cid: str) -> Child:
    try:
        parsed = parse_cid(cid)
    except Malformed as error:
        raise UsageError("CID", str(error), "check the reference") from error
    return Child(parsed.canonical, parsed.codec == "raw", 0)


@contextmanager
def _unserved(cid: str, deadline_s: float) -> Iterator[None]:
    """What goes wrong while reading a block is the fault of whoever should have it."""
    try:
        yield
    except TimeoutError as error:
        raise Unserved(cid, f"nobody gave it within {deadline_s:g} s", "join a node that has it") from error
    except RpcError as error:
        raise Unserved(cid, error.why, "join a node that has it") from error


async def _body(head: bytes, path: Path, size: int, tail: bytes, on_bytes: Callable[[int], None] | None) -> AsyncIterator[bytes]:
    """The multipart body of an add; the next chunk is read while one is being sent."""
    yield head
    handle = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset = 0
        while offset < size:
            chunk = await asyncio.to_thread(os.pread, handle, min(_READ, size - offset), offset)
            if not chunk:
                raise VerificationError(path.name, "the file shrank while it was read", "publish it again")
            offset += len(chunk)
            yield chunk
            if on_bytes is not None:
                on_bytes(offset)
    finally:
        os.close(handle)
    yield tail


def _final_hash(answer: bytes) -> str:
    """The last line of `add` has the root's hash; a reply that was cut by a late error has none."""
    lines = answer.splitlines()
    found = json.loads(lines[-1]) if lines else {}
    if not found.get("Hash"):
        raise Unavailable("IPFS", "the add did not finish", "logs/kubo.log says more")
    return str(found["Hash"])


def _batches(cids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (cids[i : i + _BATCH] for i in range(0, len(cids), _BATCH))
