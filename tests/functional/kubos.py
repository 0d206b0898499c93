"""Real Kubo nodes for tests: one process and one client each, in a folder of its own, on 127.0.0.1."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from daemon.ipfs.kubo import KuboProcess
from daemon.ipfs.node import KuboNode
from daemon.ipfs.rpc import Rpc


@dataclass(frozen=True)
class Running:
    home: Path
    process: KuboProcess
    rpc: Rpc
    node: KuboNode

    def write(self, name: str, data: bytes) -> Path:
        path = self.home / name
        path.write_bytes(data)
        return path

    async def repo_size(self) -> int:
        return int((await self.rpc.call("repo/stat", options={"size-only": True}))["RepoSize"])


def make_process(binary: Path, home: Path) -> KuboProcess:
    return KuboProcess(binary, home / "ipfs", network="loopback", port=0, max_connections=32, log=home / "logs" / "kubo.log")


@asynccontextmanager
async def running(binary: Path, home: Path) -> AsyncIterator[Running]:
    process = make_process(binary, home)
    await process.start()
    try:
        async with Rpc(process.api) as rpc:
            yield Running(home, process, rpc, KuboNode(rpc, repo=home / "ipfs"))
    finally:
        await process.stop()


@asynccontextmanager
async def two(binary: Path, folder: Path) -> AsyncIterator[tuple[Running, Running]]:
    """Two nodes that know each other."""
    async with running(binary, folder / "a") as a, running(binary, folder / "b") as b:
        await b.node.connect((await a.node.identity()).addresses[0], deadline_s=10)
        yield a, b


async def until(condition: Callable[[], object], deadline_s: float = 10) -> None:
    """Poll an awaitable-returning or plain condition until it is true."""
    end = time.monotonic() + deadline_s
    while True:
        found = condition()
        if await found if asyncio.iscoroutine(found) else found:
            return
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.02)
