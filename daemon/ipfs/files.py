"""Files in place: how Kubo's filestore is given a file, asked whether it still holds, and made to forget it.

Sources: kubo core/commands/add.go, filestore.go; docs/experimental-features.md.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote_plus

from daemon.errors import Unavailable, Unserved, VerificationError
from daemon.ipfs.dag import Child
from daemon.ipfs.reading import Reader
from daemon.ipfs.rpc import UNARY_S, Rpc, RpcError, gone, refused

# The profile unixfs-v1-2025 in full, because a configured node may have other defaults.
PROFILE = {
    "cid-version": 1, "raw-leaves": True, "chunker": "size-1048576", "max-file-links": 1024, "hash": "sha2-256", "trickle": False,
}  # fmt: skip

_ADD_S = 120.0  # Kubo is silent while it works through what it has read
_READ = 4 << 20  # bytes read from a file at once
_BATCH = 512  # CIDs per call: they travel in the URL

_MISSING, _OK = 30, 0  # of `filestore/verify`


class Files:
    """`home` is the folder that holds every file to be added in place; None for a node that somebody else runs."""

    def __init__(self, rpc: Rpc, reader: Reader, home: Path | None) -> None:
        self._rpc = rpc
        self._reader = reader
        self._home = home
        self._adding = 0

    @property
    def adding(self) -> bool:
        """Whether a file is being added, which would have to begin again if the node went now."""
        return self._adding > 0

    async def add_in_place(self, path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
        """As in `IpfsNode`. Leaves that IPFS already has as copies stay copies: `drop_blocks` them first.

        Raises `Unavailable` when the node cannot read the file where it lies.
        """
        self._adding += 1
        try:
            return await self._add(path, on_bytes)
        finally:
            self._adding -= 1

    async def _add(self, path: Path, on_bytes: Callable[[int], None] | None) -> str:
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
                "add", timeout_s=_ADD_S, options={**PROFILE, "nocopy": True, "pin": True, "progress": False},
                body=_body(head, path, size, tail, on_bytes), headers=headers,
            )  # fmt: skip
        except TimeoutError as error:
            raise gone(error) from error
        except RpcError as error:
            if "filestore" not in error.why:
                raise
            raise self._cannot_refer(path) from error
        cid = _final_hash(answer)
        if self._home is None and await self._broken((await self._reader.layout(cid, deadline_s=UNARY_S, offline=True)).leaves[:1]):
            await self.remove_in_place(cid)
            raise self._cannot_refer(path)
        return cid

    def _cannot_refer(self, path: Path) -> Unavailable:
        why = "the configured IPFS node cannot serve it from where it lies" if self._home is None else "it is outside the data folder"
        return Unavailable(path.name, why, "leave ipfs.rpc empty to use a node of our own")

    def _as_kubo_sees(self, path: Path) -> Path:
        """The path as it begins with the home's own spelling, because Kubo compares text; links below it stay as they are."""
        absolute = path.absolute()
        if self._home is None or absolute.is_relative_to(self._home):
            return absolute
        if absolute.is_relative_to(self._home.resolve()):
            return self._home / absolute.relative_to(self._home.resolve())
        raise self._cannot_refer(path)

    async def remove_in_place(self, cid: str) -> None:
        self._reader.forget(cid)
        try:
            layout = await self._reader.layout(cid, deadline_s=UNARY_S, offline=True)
        except (RpcError, Unserved):
            layout = None  # nothing of it is here, or not enough to find the rest
        await self.unpin(cid)
        await self.drop_blocks([cid] if layout is None else [*(leaf.cid for leaf in layout.leaves), *layout.nodes])

    async def unpin(self, cid: str) -> None:
        """What is not pinned is no error."""
        try:
            await self._rpc.call("pin/rm", cid)
        except TimeoutError as error:
            raise gone(error) from error
        except RpcError as error:
            if "not pinned" not in error.why:
                raise

    async def broken_references(self, cid: str) -> list[str]:
        return await self._broken((await self._reader.layout(cid, deadline_s=UNARY_S, offline=True)).leaves)

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

    async def drop_blocks(self, cids: Sequence[str]) -> None:
        try:
            for batch in _batches(cids):
                async for result in self._rpc.lines("block/rm", *batch, timeout_s=_ADD_S, options={"force": True, "quiet": True}):
                    # A block that something else pins stays, and should.
                    if (why := result.get("Error")) and "pinned" not in why:
                        raise refused("block/rm", str(why))
        except TimeoutError as error:
            raise gone(error) from error


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
