"""Reading files from IPFS: their layout, their leaves, ranges of them; each with a deadline or a stall limit.

Ranges are read leaf by leaf, not by `cat?offset&length`. Measured on Kubo 0.43.0, two nodes: parallel `cat` ranges hung 12 times in
4 GiB (the asker's Bitswap wants leaves that the giver does not list as wanted; it looks as if the end of a range cancels prefetched
leaves that the next range has just asked for); leaf by leaf none hung in 8 GiB, at the same speed or better.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from daemon.errors import Unserved, UsageError, VerificationError
from daemon.ipfs.dag import MAX_DEPTH, MAX_LEAF, MAX_LEAVES, Child, FileNode, Layout, Part, parse_file_node
from daemon.ipfs.rpc import Rpc, RpcError
from registry.cid import parse_cid
from registry.errors import Malformed

_AHEAD = 4  # leaves in flight per range, so 16 over four ranges; more brought nothing that could be told from noise
_WALKERS = 8
_LAYOUTS = 8


class Reader:
    """Reads through one RPC. Every method raises `Unavailable` when the node is gone and `UsageError` for what is no file."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._layouts: OrderedDict[str, _Watched] = OrderedDict()

    def forget(self, cid: str) -> None:
        self._layouts.pop(cid, None)

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

    async def read_range(self, cid: str, offset: int, length: int, *, stall_s: float) -> AsyncIterator[bytes]:
        watched = self._watch(cid, await self.layout(cid, deadline_s=stall_s))
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

    async def layout(self, cid: str, *, deadline_s: float, offline: bool = False) -> Layout:
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
