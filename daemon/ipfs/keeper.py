"""Keeps an IPFS node at hand: our own Kubo child, started again with backoff when it dies, or a configured RPC."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from daemon.config import Config
from daemon.errors import SwarmError, Unavailable
from daemon.ipfs import entering, install
from daemon.ipfs.interface import IpfsNode
from daemon.ipfs.kubo import KuboProcess
from daemon.ipfs.node import KuboNode
from daemon.ipfs.peerings import Peerings
from daemon.ipfs.reach import Reach
from daemon.ipfs.rpc import Rpc

log = logging.getLogger(__name__)

State = Literal["off", "starting", "ready", "down"]
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
_LONG_LIFE_S = 60.0  # a node that lived this long starts again without a growing pause
_RPC_POLL_S = 5.0
_RELAY_ANSWERS_S = 2.0
_RELAYS_AGAIN_S = 30.0
_FRESH_S = 10.0
_IDLE_LOOK_S = 0.2
_PATIENCE_S = 3600.0  # for what is in use: no answer takes as long, and a count that is wrong must not hold it for ever
_LEAST_LIFE_S = 20.0  # between two starts that were asked for


class IpfsKeeper:
    """`node` is the node while it answers, else None. `run()` is one supervised loop for the daemon's whole life.

    `reach` is what was known at the end of the last life; `busy()` says whether somebody uses the node in a way that a new start
    would cut (a tunnel, a stream). Reads are not meant: they fail with `Unavailable` and are tried again.
    """

    def __init__(
        self,
        config: Config,
        on_ready: Callable[[IpfsNode], Awaitable[None]],
        on_gone: Callable[[], Awaitable[None]],
        *,
        reach: Reach | None = None,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._on_ready = on_ready
        self._on_gone = on_gone
        self._busy = busy
        self._binary: Path | None = None  # found, and not known to be bad
        self._process: KuboProcess | None = None
        self._peerings = Peerings()
        self._company: entering.Company = ()  # of the life before, where it was ended on purpose
        self._wanted = reach or Reach()
        # Relays are taken up once they have been seen to answer (see `_chosen`).
        self._running = replace(self._wanted, relays=())
        self._changed = asyncio.Event()
        self._changed.set()
        self._begun = False
        self._started = -_LEAST_LIFE_S  # monotonic seconds of the last start that was asked for
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

    def want(self, reach: Reach) -> None:
        """From now on the node shall stand in the network like this.

        Where that needs a new start of our own Kubo, it happens as soon as nobody uses it (`busy`), after
        an hour in any case, and 20 s after the last such start at the earliest; `on_gone` and `on_ready`
        are called around it. Relays that do not answer are left out; while none does, they are tried
        again every 30 s. In a closed network, and of a node that somebody else runs, nothing changes.
        """
        if reach == self._wanted:
            return
        self._wanted = reach
        if not self._begun:
            self._running = replace(reach, relays=())
        self._changed.set()

    @property
    def reach(self) -> Reach:
        """What our own Kubo was told at its last start."""
        return self._running

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        self._begun = True
        pause = _FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                if self._config.ipfs.rpc:
                    await self._use_rpc()
                else:
                    await self._use_child()
                    continue  # it was to start again
            except SwarmError as error:
                log.error("IPFS: %s", error)
                self._binary = None
                self.state, self.reason = "down", error.why
                self.settled.set()
            if time.monotonic() - began > _LONG_LIFE_S:
                pause = _FIRST_PAUSE_S
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _use_child(self) -> None:
        """One life of our own Kubo. Returns when it shall start again, raises `Unavailable` when it died."""
        home = self._config.home
        process = await self._make_process()
        self._process = process
        try:
            await process.start()
            async with Rpc(process.api) as rpc:
                node = KuboNode(rpc, repo=home / "ipfs", peerings=self._peerings)
                await self._live(node, lambda: self._end_of_life(process, rpc, node))
                self.state, self.reason = "starting", "it starts again with other relays"
                await self._leave()
                # While the client is open, so that reads under way end with an error and are tried again.
                await process.stop()
        finally:
            await self._leave()
            await process.stop()
            self._process = None

    async def _make_process(self) -> KuboProcess:
        config = self._config
        if self._binary is None:
            find = partial(install.find, config.ipfs.binary, install.default_cache())
            self._binary = await asyncio.to_thread(find)
        if self._binary is None:
            raise Unavailable("Kubo", "it is not installed", "swarmctl doctor --setup installs it")
        return KuboProcess(
            self._binary,
            config.home / "ipfs",
            network=config.network,
            port=config.ipfs.port,
            max_connections=config.ipfs.max_connections,
            log=config.home / "logs" / "kubo.log",
            reach=self._running,
        )

    async def _end_of_life(self, process: KuboProcess, rpc: Rpc, node: KuboNode) -> None:
        """Returns when the child shall start again. Raises `Unavailable` when it died."""
        await entering.hold(rpc, self._peerings.addresses())
        entered = asyncio.create_task(self._enter(process, rpc))
        died = asyncio.create_task(process.wait())
        due = asyncio.create_task(self._due(rpc, node))
        tasks: tuple[asyncio.Task[Any], ...] = (died, due, entered)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not died.done() and not due.done():
                entered.result()
                await asyncio.wait((died, due), return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                raise Unavailable("Kubo", "it died", "it is started again; logs/kubo.log says more")
            due.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _enter(self, process: KuboProcess, rpc: Rpc) -> None:
        public = self._config.network == "public"
        bootstrap = (*self._wanted.bootstrap, *self._config.ipfs.bootstrap) if public else ()
        company, self._company = self._company, ()
        held = self._peerings.addresses()
        await asyncio.gather(
            entering.meet_relays(rpc, self._running.relays, process.let_through),
            entering.enter(rpc, held=held, company=company, bootstrap=bootstrap),
        )

    # -- another start ------------------------------------------------------------------------------------------------

    async def _due(self, rpc: Rpc, node: KuboNode) -> None:
        """Returns when the child must start again for what is wanted to hold, and nobody minds."""
        while True:
            await self._something_to_try()
            self._changed.clear()
            if self._config.network != "public" or not self._wanted.needs_restart(self._running):
                continue
            chosen = await self._chosen(rpc)
            looked = time.monotonic()
            if not chosen.needs_restart(self._running) or not await self._idle(node):
                continue
            if time.monotonic() - looked > _FRESH_S:
                self._changed.set()  # who answered so long ago may be gone
            else:
                log.info("IPFS starts again: %s, %d relays", chosen.reachability, len(chosen.relays))
                self._company = await entering.company(rpc)
                self._running = chosen
                self._started = time.monotonic()
                return

    async def _something_to_try(self) -> None:
        """Waits until something else is wanted, or it is time to try relays again of which none has answered."""
        hopes = bool(self._wanted.relays) and not self._running.relays
        try:
            async with asyncio.timeout(_RELAYS_AGAIN_S if hopes else None):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _idle(self, node: KuboNode) -> bool:
        """Waits until a start would cut nothing. False when something else is wanted by then."""
        await self._pause_until(self._started + _LEAST_LIFE_S)
        patience = time.monotonic() + _PATIENCE_S
        while (self._busy() or node.adding) and not self._changed.is_set():
            if time.monotonic() > patience:
                log.warning("IPFS starts again although it is in use")
                break
            await asyncio.sleep(_IDLE_LOOK_S)
        return not self._changed.is_set()

    async def _pause_until(self, moment: float) -> None:
        left = moment - time.monotonic()
        if left > 0:
            await asyncio.sleep(left)

    async def _chosen(self, rpc: Rpc) -> Reach:
        """What is wanted, with those of its relays that answer now.

        libp2p waits three minutes for all static relays before it is content with some (go-libp2p autorelay, `bootDelay`):
        one dead relay in the list would leave us without any.
        """
        wanted = self._wanted
        relays = await entering.answering(rpc, wanted.relays, deadline_s=_RELAY_ANSWERS_S)
        return replace(wanted, relays=relays)

    # -- while it answers ---------------------------------------------------------------------------------------------

    async def _use_rpc(self) -> None:
        """A node that somebody else runs: ours to use, not to start or stop."""
        try:
            async with Rpc(self._config.ipfs.rpc) as rpc:
                node = KuboNode(rpc, repo=None, peerings=self._peerings)
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
            if self.state == "ready":
                self.state, self.reason = "down", "it stopped answering"
            await self._on_gone()


async def _until_silent(node: IpfsNode) -> None:
    while True:
        await asyncio.sleep(_RPC_POLL_S)
        await node.version()
