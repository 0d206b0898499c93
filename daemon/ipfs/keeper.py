"""Keeps an IPFS node at hand: our own Kubo child, started again with backoff when it dies, or a configured RPC."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Literal

from daemon.config import Config
from daemon.errors import SwarmError, Unavailable
from daemon.ipfs import install
from daemon.ipfs.interface import IpfsNode
from daemon.ipfs.kubo import KuboProcess
from daemon.ipfs.node import KuboNode
from daemon.ipfs.rpc import Rpc

log = logging.getLogger(__name__)

State = Literal["off", "starting", "ready", "down"]
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
_LONG_LIFE_S = 60.0  # a node that lived this long starts again without a growing pause
_RPC_POLL_S = 5.0


class IpfsKeeper:
    """`node` is the node while it answers, else None. `run()` is one supervised loop for the daemon's whole life."""

    def __init__(self, config: Config, on_ready: Callable[[IpfsNode], Awaitable[None]], on_gone: Callable[[], Awaitable[None]]) -> None:
        self._config = config
        self._on_ready = on_ready
        self._on_gone = on_gone
        self._process: KuboProcess | None = None
        self.node: IpfsNode | None = None
        self.state: State = "starting" if config.ipfs.enabled else "off"
        self.reason = ""
        self.version = ""
        self._fresh = asyncio.Event()
        self._up = asyncio.Event()  # set while `node` is there
        self.settled = asyncio.Event()  # ready, or failed for the first time

    async def next_node(self) -> IpfsNode:
        """The node that comes up next (now, if nobody has asked about it yet)."""
        await self._fresh.wait()
        self._fresh.clear()
        if self.node is None:
            return await self.next_node()
        return self.node

    async def node_within(self, seconds: float) -> IpfsNode | None:
        """The node, waiting for it as long as it is starting; None when there is none by then."""
        if self.state != "off":
            try:
                async with asyncio.timeout(seconds):
                    await self._up.wait()
            except TimeoutError:
                pass
        return self.node

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                await (self._use_rpc() if self._config.ipfs.rpc else self._use_child())
            except SwarmError as error:
                log.error("IPFS: %s", error)
                self.state, self.reason = "down", error.why
                self.settled.set()
            if time.monotonic() - began > _LONG_LIFE_S:
                pause = _FIRST_PAUSE_S
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _use_child(self) -> None:
        """One life of our own Kubo, from start to exit."""
        config = self._config
        binary = await asyncio.to_thread(install.find, config.ipfs.binary, install.default_cache())
        if binary is None:
            raise Unavailable("Kubo", "it is not installed", "swarmctl doctor --setup installs it")
        process = KuboProcess(
            binary, config.home / "ipfs", network=config.network, port=config.ipfs.port, max_connections=config.ipfs.max_connections,
            log=config.home / "logs" / "kubo.log",
        )  # fmt: skip
        self._process = process
        try:
            await process.start()
            async with Rpc(process.api) as rpc:
                await self._live(KuboNode(rpc, repo=config.home / "ipfs"), process.wait)
            raise Unavailable("Kubo", "it died", "it is started again; logs/kubo.log says more")
        finally:
            await self._leave()
            await process.stop()
            self._process = None

    async def _use_rpc(self) -> None:
        """A node that somebody else runs: ours to use, not to start or stop."""
        try:
            async with Rpc(self._config.ipfs.rpc) as rpc:
                node = KuboNode(rpc, repo=None)
                await self._live(node, lambda: _until_silent(node))
        finally:
            await self._leave()

    async def _live(self, node: IpfsNode, ended: Callable[[], Awaitable[object]]) -> None:
        self.version = await node.version()
        await self._on_ready(node)
        self.node, self.state, self.reason = node, "ready", ""
        self.settled.set()
        self._fresh.set()
        self._up.set()
        await ended()

    async def _leave(self) -> None:
        was_ready, self.node = self.node is not None, None
        self._up.clear()
        if was_ready:
            self.state, self.reason = "down", "it stopped answering"
            await self._on_gone()


async def _until_silent(node: IpfsNode) -> None:
    while True:
        await asyncio.sleep(_RPC_POLL_S)
        await node.version()
