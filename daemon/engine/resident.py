"""One model of this node and its worker, which comes and goes: loaded on first use, ended when idle, started again when it dies.

- Whoever asks holds a lease from before the worker is there until the answer has ended; a worker under lease is never unloaded.
- Any number of askers share one load. When none of them waits any more, the load is cancelled.
- After a death, or a load that llama.cpp refused, nobody tries again before a pause is over, which doubles until an answer has
  ended well. A kept model is then loaded by itself; an asker waits for it if that is soon.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from daemon.engine.interface import (
    CAPABILITIES,
    Capability,
    Delta,
    EmbeddingRequest,
    Embeddings,
    ModelState,
    Request,
    Served,
    ServeOptions,
    Source,
)
from daemon.engine.process import WorkerProcess
from daemon.errors import ModelLoadError, Restarting, SwarmError, Unavailable

log = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 60.0
_DOUBLED: Final = 16  # times at most: the longest pause is reached long before, and a float ends at 2**1024
PATIENCE_S: Final = 5.0  # an asker waits so long for the end of a pause


@dataclass(slots=True)
class Loaded:
    """A worker, how it was loaded, and what it costs."""

    worker: WorkerProcess
    options: ServeOptions  # all filled in
    needed: int  # bytes, by the estimate
    to_embed: int  # bytes more as soon as it embeds; 0: they are in `needed`
    automatic: bool  # nobody chose its number of threads
    threads: int


Start = Callable[["Resident", ServeOptions], Awaitable[Loaded]]


class Resident:
    """A `Provider`."""

    def __init__(
        self,
        key: str,
        source: Source,
        start: Start,
        widen: Callable[[Resident], Awaitable[None]],
        expired: Callable[[Resident], None],
        changed: Callable[[str], None],
    ) -> None:
        """`start` makes a worker, `widen` makes room for it to embed, `expired` ends an idle one, `changed` tells others."""
        self.key = key
        self.source = source
        self._start = start
        self._widen = widen
        self._expired = expired
        self._changed = changed
        self.kept = False
        self.asked = ServeOptions()  # what somebody chose
        self.options = ServeOptions()  # all filled in, once known
        self.loaded: Loaded | None = None
        self.used = 0.0  # when it was last asked, by the clock of the loop
        self._tokens_per_second = 0.0
        self._capabilities = CAPABILITIES
        self._leases = 0
        self._loading: asyncio.Task[None] | None = None
        self._waiting = 0  # for `_loading`
        self._stops = 0  # whoever waited across a stop gives up
        self._expiry: asyncio.TimerHandle | None = None
        self._failures = 0  # since an answer ended well
        self._retry_at: float | None = None  # by the clock of the loop
        self._restarting: asyncio.Task[None] | None = None
        self._restarts = 0
        self._reason: str | None = None

    # -- what answers -----------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> frozenset[Capability]:
        """All there are until a worker has said which."""
        return self._capabilities

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """See `Provider`. Loads the model when it has to, and raises what `load` raises then."""
        async with self._lease() as worker, aclosing(worker.generate(request)) as deltas:
            async for delta in deltas:
                if delta.finish is not None:
                    self._failures = 0
                yield delta

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """See `Provider`, and `generate`."""
        async with self._lease() as worker:
            await self._widen(self)
            vectors = await worker.embed(request)
            self._failures = 0
            return vectors

    @asynccontextmanager
    async def _lease(self) -> AsyncIterator[WorkerProcess]:
        self._leases += 1
        self._touch()
        try:
            yield await self._worker()
        finally:
            self._leases -= 1
            self._touch()

    async def _worker(self) -> WorkerProcess:
        stops = self._stops
        while self.loaded is None:
            await self._pause()
            if self._stops != stops:
                raise _stopped()
            await self.load()
        return self.loaded.worker

    async def _pause(self) -> None:
        if self._retry_at is None:
            return
        left = self._retry_at - asyncio.get_running_loop().time()
        if left > PATIENCE_S:
            hint = f"it is started again in {math.ceil(left)} s; ask another node, or again then"
            raise Restarting("the model", self._reason or "its worker died", hint)
        await asyncio.sleep(max(left, 0))

    # -- loading ----------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Have a worker. Raises `ModelLoadError`, `NoMemory`, `UsageError`, what the source raises, or `Unavailable` when stopped."""
        stops = self._stops
        while self.loaded is None and not await self._join(self._loading or self._begin(self.asked)):
            # Those who had begun it went away, and this came while it was being ended.
            if self._stops != stops:
                raise _stopped()

    async def settle(self) -> None:
        """Wait for a load that others have begun, whatever comes of it. Raises `Unavailable` when stopped."""
        stops = self._stops
        while self._loading is not None:
            with suppress(SwarmError):
                await self._join(self._loading)
        if self._stops != stops:
            raise _stopped()

    async def load_with(self, asked: ServeOptions) -> None:
        """Have a worker that runs with `asked`; one with other options is ended when these are known to fit. Raises as `load` does.

        Nobody else may be loading: see `settle`.
        """
        stops = self._stops
        self._reset()
        if not await self._join(self._begin(asked)) or self._stops != stops:
            raise _stopped()

    def _begin(self, asked: ServeOptions) -> asyncio.Task[None]:
        task = asyncio.create_task(self._load(asked), name=f"load {self.key[:12]}")
        self._loading = task
        task.add_done_callback(self._load_ended)
        return task

    def _load_ended(self, task: asyncio.Task[None]) -> None:
        if self._loading is task:
            self._loading = None
        if not task.cancelled():
            task.exception()  # nobody may be there any more to hear it

    async def _join(self, task: asyncio.Task[None]) -> bool:
        """Wait for a load and raise what it raises; False when it was given up."""
        self._waiting += 1
        try:
            await asyncio.wait({task})
        finally:
            self._waiting -= 1
            if not self._waiting and not task.done():
                task.cancel()
                await asyncio.wait({task})
        if task.cancelled():
            return False
        task.result()
        return True

    async def _load(self, asked: ServeOptions) -> None:
        try:
            loaded = await self._start(self, asked)
        except ModelLoadError as error:
            self._failed(error.why)
            raise
        except SwarmError:
            self._retry_at = None  # to wait does not help
            raise
        self._restarts += self._retry_at is not None
        self._retry_at = None
        self.loaded, self.asked, self.options = loaded, asked, loaded.options
        self._tokens_per_second, self._capabilities = loaded.worker.tokens_per_second, loaded.worker.capabilities
        loaded.worker.on_gone = lambda reason: self._died(loaded, reason)
        self._touch()
        self._changed(self.key)
        if loaded.worker.gone is not None:  # before anybody listened
            self._died(loaded, loaded.worker.gone)

    # -- dying ------------------------------------------------------------------------------------------------------

    def _died(self, loaded: Loaded, reason: str) -> None:
        if self.loaded is loaded:
            self.let_go()
            self._failed(reason)

    def _failed(self, reason: str) -> None:
        pause = min(FIRST_PAUSE_S * 2 ** min(self._failures, _DOUBLED), LONGEST_PAUSE_S)
        self._failures += 1
        self._reason = reason
        self._retry_at = asyncio.get_running_loop().time() + pause
        log.error("%s: %s; it may be loaded again in %g s", self.source.name, reason, pause)
        if self.kept:
            self.keep()
        self._changed(self.key)

    def keep(self) -> None:
        """From now on it is started again by itself."""
        self.kept = True
        if self.loaded is None and self._retry_at is not None and self._restarting is None:
            self._restarting = asyncio.create_task(self._restart(), name=f"restart {self.key[:12]}")

    async def _restart(self) -> None:
        """Load a kept model until it is there, or until waiting alone will not help."""
        try:
            while self.loaded is None and self._retry_at is not None:
                await asyncio.sleep(max(self._retry_at - asyncio.get_running_loop().time(), 0))
                with suppress(ModelLoadError):  # noted, with the next time to try
                    await self.load()
        except SwarmError as error:
            log.warning("%s is loaded again when somebody asks: %s", self.source.name, error)
        finally:
            self._restarting = None
            self._changed(self.key)

    # -- ending -----------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """It has a worker that nobody uses or is about to use."""
        return self.loaded is not None and not self._leases

    def let_go(self) -> WorkerProcess:
        """The worker, for the caller to end; the next asker loads another."""
        assert self.loaded is not None
        worker, self.loaded = self.loaded.worker, None
        self._disarm()
        return worker

    async def stop(self) -> bool:
        """End worker and load, and whoever waits for them; False when there was nothing to end."""
        self._stops += 1
        was_kept, self.kept = self.kept, False
        self.asked = ServeOptions()
        self._reset()
        tasks = {task for task in (self._restarting, self._loading) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._restarting in tasks:
            self._restarting = None  # it was cancelled before its first step, so its `finally` never came
        was_loaded = self.loaded is not None
        if was_loaded:
            await self.let_go().stop()
        return was_kept or bool(tasks) or was_loaded

    def _reset(self) -> None:
        """A person decided anew: what failed before does not count."""
        self._failures, self._retry_at, self._reason = 0, None, None

    # -- idling -----------------------------------------------------------------------------------------------------

    def _touch(self) -> None:
        """It was used just now: the time of idling begins anew, or stands still."""
        loop = asyncio.get_running_loop()
        self.used = loop.time()
        self._disarm()
        seconds = self.options.keep_alive
        if self.idle and seconds is not None and seconds >= 0:
            self._expiry = loop.call_later(seconds, self._expired, self)

    def _disarm(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    # -- telling ----------------------------------------------------------------------------------------------------

    def expect(self, asked: ServeOptions, options: ServeOptions, tokens_per_second: float = 0.0) -> None:
        """How it is or will be loaded: what of that somebody chose, and all of it. And how fast it was before."""
        self.asked, self.options = asked, options
        self._tokens_per_second = self._tokens_per_second or tokens_per_second
        self._touch()

    @property
    def known(self) -> bool:
        """`options` are those that it has, or will have."""
        return self.kept or self.loaded is not None

    def state(self) -> ModelState:
        if self.loaded is not None:
            return "loaded"
        if self._retry_at is not None and self.kept:
            return "restarting"
        return "loading" if self._loading is not None else "idle"

    def served(self) -> Served:
        loaded, options, state = self.loaded, self.options, self.state()
        slots = loaded.worker.slots if loaded else options.slots or 0
        return Served(
            context=loaded.worker.context if loaded else options.context or 0,
            slots=slots,
            free_slots=0 if state == "restarting" else max(0, slots - self._leases),
            pid=loaded.worker.pid if loaded else None,
            tokens_per_second=self._tokens_per_second,
            options=options,
            state=state,
            memory=loaded.needed if loaded else 0,
            restarts=self._restarts,
            reason=self._reason,
            expires=max(self._expiry.when() - asyncio.get_running_loop().time(), 0) if self._expiry else None,
        )


def _stopped() -> Unavailable:
    return Unavailable("the model", "it was stopped meanwhile", "serve it again")
