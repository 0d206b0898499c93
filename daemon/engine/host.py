"""The local engine: which models have a worker, within the memory and the cores of this machine."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from daemon.config import Engine as Settings
from daemon.engine import blas, cores
from daemon.engine.gguf import GgufHeader, inspect
from daemon.engine.interface import Provider, Served, ServeOptions, Source
from daemon.engine.memory import estimate_embedding, estimate_memory, free_memory, held_by
from daemon.engine.process import GpuLoadError, WorkerProcess
from daemon.engine.protocol import Load
from daemon.engine.resident import Loaded, Resident
from daemon.errors import NoMemory, Unavailable, UsageError
from daemon.supervise import Supervisor

log = logging.getLogger(__name__)

MAX_SLOTS: Final = 64
MAX_CONTEXT: Final = 1 << 22
MIN_CONTEXT: Final = 64
MAX_BATCH: Final = 1 << 13
MIN_BATCH: Final = 64  # every slot takes part in each decode
_LOOK_S: Final = 0.25  # between two looks at who uses the cores


class EngineHost:
    """Implements `Engine`. `on_change(key)` is called when a model is loaded, dies or is about to be tried again."""

    def __init__(
        self,
        settings: Settings,
        logs: Path,
        on_change: Callable[[str], None],
        *,
        queue: int = 32,
        load_timeout: float = 300.0,
        free_memory: Callable[[], int] = free_memory,
        read_cores: Callable[[Sequence[int]], cores.Reading | None] = cores.read,
    ) -> None:
        """`logs` gets `worker-<key>.log`; `queue` chats per model may wait; `load_timeout` is in seconds."""
        self._settings = settings
        self._logs = logs
        self._on_change = on_change
        self._queue = queue
        self._load_timeout = load_timeout
        self._free_memory = free_memory
        self._read_cores = read_cores
        self._cores = cores.usable_cores()
        self._threads = settings.threads or self._cores  # of all workers together
        self._supervisor = Supervisor()
        self._residents: dict[str, Resident] = {}  # every model that was ever asked for
        # One load at a time, so that two cannot count on the same free memory.
        self._loading = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    async def keep(self, key: str, source: Source, options: ServeOptions) -> Served:
        """See `Engine`."""
        resident = self._resident(key, source)
        # What somebody's chat is loading may be just what is wanted here; to load it again would cut that chat off.
        await resident.settle()
        if not resident.known or not _fits(resident.options, replace(options, keep_alive=None)):
            await resident.load_with(options)
        else:
            keep_alive = self._settings.keep_alive if options.keep_alive is None else options.keep_alive
            resident.expect(options, replace(resident.options, keep_alive=keep_alive))
        resident.keep()
        return resident.served()

    async def keep_idle(self, key: str, source: Source, options: ServeOptions, tokens_per_second: float) -> Served:
        """See `Engine`."""
        resident = self._resident(key, source)
        header = await asyncio.to_thread(inspect, source.path)
        resident.expect(options, self._resolve(header, options), tokens_per_second)
        resident.keep()
        return resident.served()

    async def unload(self, key: str) -> bool:
        """See `Engine`."""
        resident = self._residents.get(key)
        return resident is not None and await resident.stop()

    def models(self) -> dict[str, Served]:
        """See `Engine`."""
        return {key: one.served() for key, one in self._residents.items() if one.kept or one.state() in ("loaded", "loading")}

    def provider(self, key: str, source: Source) -> Provider:
        """See `Engine`."""
        return self._resident(key, source)

    async def close(self) -> None:
        """End every worker, also those that are being loaded. Idempotent."""
        self._closed = True
        await self._supervisor.close()
        await asyncio.gather(*(resident.stop() for resident in self._residents.values()), *self._ending)

    def _resident(self, key: str, source: Source) -> Resident:
        if key not in self._residents:
            self._residents[key] = Resident(key, source, self._start, self._widen, self._expired, self._on_change)
        self._residents[key].source = source
        return self._residents[key]

    # -- loading ----------------------------------------------------------------------------------------------------

    async def _start(self, resident: Resident, asked: ServeOptions) -> Loaded:
        if self._closed:
            raise Unavailable("the engine", "it is shutting down", "start the daemon again")
        await resident.source.check()
        path = resident.source.path
        header = await asyncio.to_thread(inspect, path)
        options = self._resolve(header, asked)
        slots, batch = options.slots or 0, options.batch or 0
        needed, to_embed = estimate_memory(header, options.context or 0, slots, batch), estimate_embedding(header, slots, batch)
        if header.for_texts:
            needed, to_embed = needed + to_embed, 0
        load = Load(
            path=await asyncio.to_thread(os.path.abspath, path),  # the worker has another current folder
            context=options.context or 0,
            slots=slots,
            threads=options.threads or 1,
            batch=batch,
            gpu_layers=-1 if options.gpu_layers is None else options.gpu_layers,
            blas=blas.reads(header),
            template=header.chat_template,
        )
        async with self._loading:
            await self._make_room(resident, needed, _SMALLER)
            worker = await self._worker(resident, load)
        worker.on_activity = self._share_cores
        return Loaded(worker, options, needed, to_embed, automatic=asked.threads is None, threads=load["threads"])

    async def _widen(self, resident: Resident) -> None:
        """Room to embed: most models never do, and the logits of a whole batch may take more than their weights.

        Raises `NoMemory`.
        """
        loaded = resident.loaded
        if loaded is None or not loaded.to_embed:
            return  # and never waits for the load of another model
        async with self._loading:
            if loaded.to_embed:  # still: another text may have come first
                await self._make_room(resident, loaded.to_embed, "stop another model, or serve with a smaller batch", stays=True)
                loaded.needed, loaded.to_embed = loaded.needed + loaded.to_embed, 0

    async def _worker(self, resident: Resident, load: Load) -> WorkerProcess:
        log_file = self._logs / f"worker-{resident.key[:12]}.log"
        try:
            return await WorkerProcess.start(load, log_file, queue=self._queue, timeout=self._load_timeout)
        except GpuLoadError as error:
            if load["gpu_layers"] >= 0:
                raise  # somebody chose the number of layers
            log.warning("%s could not be loaded on the GPU, so it is loaded without: %s", resident.source.name, error.why)
        load["gpu_layers"] = 0
        return await WorkerProcess.start(load, log_file, queue=self._queue, timeout=self._load_timeout)

    def _resolve(self, header: GgufHeader, asked: ServeOptions) -> ServeOptions:
        """Every option filled in. What was asked for must fit; what comes from the settings is made to fit."""
        settings = self._settings
        trained = header.facts.context_length or MAX_CONTEXT
        context = min(settings.context, trained) if asked.context is None else asked.context
        slots = min(settings.slots, MAX_SLOTS) if asked.slots is None else asked.slots
        threads = (settings.threads or self._cores) if asked.threads is None else asked.threads
        batch = min(settings.batch, context) if asked.batch is None else asked.batch
        if not MIN_CONTEXT <= context <= min(trained, MAX_CONTEXT):
            raise UsageError("context", f"{context} tokens do not fit this model", f"use {MIN_CONTEXT} to {min(trained, MAX_CONTEXT)}")
        if not 1 <= slots <= MAX_SLOTS:
            raise UsageError("slots", f"{slots} is out of range", f"use 1 to {MAX_SLOTS}")
        if not 1 <= threads <= 4 * self._cores:
            raise UsageError("threads", f"{threads} is out of range", f"use 1 to {4 * self._cores}; this machine has {self._cores} cores")
        if not MIN_BATCH <= batch <= min(context, MAX_BATCH):
            raise UsageError("batch", f"{batch} tokens are out of range", f"use {MIN_BATCH} to {min(context, MAX_BATCH)}")
        return ServeOptions(
            context=context,
            threads=threads,
            gpu_layers=settings.gpu_layers if asked.gpu_layers is None else asked.gpu_layers,
            slots=slots,
            batch=batch,
            keep_alive=settings.keep_alive if asked.keep_alive is None else asked.keep_alive,
        )

    # -- memory -----------------------------------------------------------------------------------------------------

    async def _make_room(self, resident: Resident, needed: int, hint: str, stays: bool = False) -> None:
        """End the worker of `resident`, unless it `stays`, and idle ones, the least recently used first, until `needed` bytes are free.

        Raises `NoMemory` with `hint`, and ends none, when that would not be enough.
        """
        while True:
            if self._ending:
                await asyncio.wait(self._ending)  # never `gather`: when this load is cancelled they must still end
            free = await self._free()
            # Nothing is awaited between this look and `let_go`, so nobody can begin to use one of them.
            idle = sorted((one for one in self._residents.values() if one.idle and one is not resident), key=lambda one: one.used)
            leaving = idle if stays or resident.loaded is None else [resident, *idle]
            available = free + sum(one.loaded.needed for one in leaving if one.loaded is not None)
            if needed > available:
                raise NoMemory(resident.source.name, self._shortage(resident, needed, available, leaving), hint)
            if needed <= free and (stays or resident.loaded is None):
                return
            log.info("%s is unloaded to make room for %s", leaving[0].source.name, resident.source.name)
            self._end(leaving[0])

    async def _free(self) -> int:
        """Bytes for models that are not loaded yet."""
        loaded = [one.loaded for one in self._residents.values() if one.loaded is not None]
        if self._settings.memory:
            return self._settings.memory - sum(one.needed for one in loaded)

        def free() -> int:
            # The kernel calls mapped weights available, but a model that answers needs them all the time.
            return self._free_memory() - sum(max(0, one.needed - held_by(one.worker.pid)) for one in loaded)

        return await asyncio.to_thread(free)

    def _shortage(self, resident: Resident, needed: int, available: int, leaving: list[Resident]) -> str:
        staying = [one.source.name for one in self._residents.values() if one.loaded is not None and one not in [resident, *leaving]]
        answering = f" while {', '.join(staying)} is answering" if staying else ""
        return f"it needs about {_mebibytes(needed)} of memory, {_mebibytes(max(available, 0))} are available{answering}"

    def _expired(self, resident: Resident) -> None:
        if resident.idle:
            log.info("%s is unloaded: nobody asked for a while", resident.source.name)
            self._end(resident)

    def _end(self, resident: Resident) -> None:
        """Its memory is free when the task in `_ending` is done."""
        task = asyncio.create_task(resident.let_go().stop(), name=f"unload {resident.key[:12]}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    # -- cores ------------------------------------------------------------------------------------------------------

    def _share_cores(self) -> None:
        """Threads of all workers that are answering together are as many as cores: one too many slows down all of them."""
        busy = [one for one in self._automatic() if one.worker.active]
        for one in busy:
            wanted = max(1, self._threads // len(busy))
            if one.threads != wanted:
                one.threads = wanted
                one.worker.set_threads(wanted)
        if busy and not (self._settings.threads or self._closed or "cores" in self._supervisor.state()):
            self._supervisor.run("cores", self._watch_cores, restart=True)

    def _automatic(self) -> list[Loaded]:
        """Those whose number of threads nobody chose."""
        loaded = [one.loaded for one in self._residents.values() if one.loaded is not None]
        return [one for one in loaded if one.automatic]

    async def _watch_cores(self) -> None:
        """Leave alone the cores that others want, for as long as a model is loaded.

        The threads of a decode wait for each other some thousand times a second, and each time for a whole time slice where one of
        them has to share its core: beside one busy process, one thread is faster than two on two cores.
        """
        before: cores.Reading | None = None
        try:
            while pids := [one.worker.pid for one in self._automatic()]:
                now = await asyncio.to_thread(self._read_cores, pids)
                if before is not None and now is not None and before.pids == now.pids:
                    self._threads = cores.left(before, now, self._cores)
                    self._share_cores()
                before = now
                await asyncio.sleep(_LOOK_S)
        finally:
            self._threads = self._cores


_SMALLER: Final = "stop another model, serve with less context or take a smaller quantization"


def _fits(running: ServeOptions, wanted: ServeOptions) -> bool:
    """Whether a worker runs as `wanted`, whose None asks for nothing in particular."""
    return all(value is None or value == getattr(running, name) for name, value in asdict(wanted).items())


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
