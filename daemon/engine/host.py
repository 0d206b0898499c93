"""The local engine: one worker process per loaded model, within the memory and the cores of this machine."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from daemon.config import Engine as Settings
from daemon.engine.gguf import GgufHeader, estimate_memory, inspect
from daemon.engine.interface import Provider, Served, ServeOptions
from daemon.engine.memory import free_memory, usable_cores
from daemon.engine.process import WorkerProcess
from daemon.engine.protocol import Load
from daemon.errors import NoMemory, NotFound, Unavailable, UsageError

MAX_SLOTS: Final = 64
MAX_CONTEXT: Final = 1 << 22
MIN_CONTEXT: Final = 64


class EngineHost:
    """Implements `Engine`. `on_exit(key, reason)` is called when a worker ends that nobody stopped."""

    def __init__(
        self,
        settings: Settings,
        logs: Path,
        on_exit: Callable[[str, str], None],
        *,
        queue: int = 32,
        load_timeout: float = 300.0,
        free_memory: Callable[[], int] = free_memory,
    ) -> None:
        """`logs` gets `worker-<key>.log`; `queue` chats per model may wait; `load_timeout` is in seconds."""
        self._settings = settings
        self._logs = logs
        self._on_exit = on_exit
        self._queue = queue
        self._load_timeout = load_timeout
        self._free_memory = free_memory
        self._cores = usable_cores()
        self._loaded: dict[str, _Loaded] = {}
        # One load at a time, so that two cannot count on the same free memory.
        self._loading = asyncio.Lock()
        self._starting: asyncio.Task[WorkerProcess] | None = None
        self._closed = False

    async def load(self, key: str, path: Path, options: ServeOptions) -> Served:
        """See `Engine`. A model that is loaded already stays as it is, whatever `options` say."""
        async with self._loading:
            if self._closed:
                raise Unavailable("the engine", "it is shutting down", "start the daemon again")
            if key not in self._loaded:
                header = await asyncio.to_thread(inspect, path)
                resolved = self._resolve(header, options)
                needed = estimate_memory(header, resolved.context or 0, resolved.slots or 0)
                await self._check_memory(needed)
                worker = await self._start(key, path, header, resolved)
                self._loaded[key] = _Loaded(worker, resolved, needed, header.tensor_bytes, automatic=options.threads is None)
                worker.on_gone = functools.partial(self._gone, key, worker)
                worker.on_activity = self._share_cores
            return self._loaded[key].served()

    async def unload(self, key: str) -> bool:
        loaded = self._loaded.pop(key, None)
        if loaded is None:
            return False
        await loaded.worker.stop()
        return True

    def served(self) -> dict[str, Served]:
        return {key: loaded.served() for key, loaded in self._loaded.items()}

    def provider(self, key: str) -> Provider:
        if key not in self._loaded:
            raise NotFound("the model", "it is not loaded", "serve it first")
        return self._loaded[key].worker

    async def close(self) -> None:
        """End every worker, also one that is being loaded. Idempotent."""
        self._closed = True
        if self._starting is not None:
            self._starting.cancel()
        async with self._loading:
            await asyncio.gather(*(self.unload(key) for key in list(self._loaded)))

    async def _start(self, key: str, path: Path, header: GgufHeader, options: ServeOptions) -> WorkerProcess:
        load = Load(
            path=await asyncio.to_thread(os.path.abspath, path),  # the worker has another current folder
            context=options.context or 0,
            slots=options.slots or 0,
            threads=options.threads or 1,
            gpu_layers=-1 if options.gpu_layers is None else options.gpu_layers,
            template=header.chat_template,
        )
        log = self._logs / f"worker-{key[:12]}.log"
        self._starting = asyncio.create_task(WorkerProcess.start(load, log, queue=self._queue, timeout=self._load_timeout))
        try:
            return await self._starting
        except asyncio.CancelledError:
            if self._closed:
                raise Unavailable("the engine", "it is shutting down", "start the daemon again") from None
            raise
        finally:
            self._starting = None

    def _resolve(self, header: GgufHeader, options: ServeOptions) -> ServeOptions:
        """Every option filled in. What was asked for must fit; what comes from the settings is made to fit."""
        trained = header.facts.context_length or MAX_CONTEXT
        context = min(self._settings.context, trained) if options.context is None else options.context
        slots = min(self._settings.slots, MAX_SLOTS) if options.slots is None else options.slots
        threads = (self._settings.threads or self._cores) if options.threads is None else options.threads
        if not MIN_CONTEXT <= context <= min(trained, MAX_CONTEXT):
            raise UsageError("context", f"{context} tokens do not fit this model", f"use {MIN_CONTEXT} to {min(trained, MAX_CONTEXT)}")
        if not 1 <= slots <= MAX_SLOTS:
            raise UsageError("slots", f"{slots} is out of range", f"use 1 to {MAX_SLOTS}")
        if not 1 <= threads <= 4 * self._cores:
            raise UsageError("threads", f"{threads} is out of range", f"use 1 to {4 * self._cores}; this machine has {self._cores} cores")
        gpu_layers = self._settings.gpu_layers if options.gpu_layers is None else options.gpu_layers
        return ServeOptions(context=context, threads=threads, gpu_layers=gpu_layers, slots=slots)

    async def _check_memory(self, needed: int) -> None:
        if self._settings.memory:
            available = self._settings.memory - sum(loaded.needed for loaded in self._loaded.values())
        else:
            # The kernel calls mapped weights available, but a model that answers needs them all the time.
            available = await asyncio.to_thread(self._free_memory) - sum(loaded.weights for loaded in self._loaded.values())
        if needed > available:
            why = f"it needs about {_mebibytes(needed)} of memory, {_mebibytes(max(available, 0))} are available"
            raise NoMemory("the model", why, "stop another model, serve with less context or take a smaller quantization")

    def _gone(self, key: str, worker: WorkerProcess, reason: str) -> None:
        loaded = self._loaded.get(key)
        if loaded is not None and loaded.worker is worker:
            del self._loaded[key]
            self._on_exit(key, reason)

    def _share_cores(self) -> None:
        """Threads of all workers that are answering together are as many as cores: one too many slows down all of them."""
        busy = [loaded for loaded in self._loaded.values() if loaded.automatic and loaded.worker.active]
        for loaded in busy:
            wanted = max(1, (self._settings.threads or self._cores) // len(busy))
            if loaded.threads != wanted:
                loaded.threads = wanted
                loaded.worker.set_threads(wanted)


class _Loaded:
    """A worker, how it was loaded, and what it costs."""

    def __init__(self, worker: WorkerProcess, options: ServeOptions, needed: int, weights: int, *, automatic: bool) -> None:
        self.worker = worker
        self.options = options
        self.needed = needed  # bytes, by the estimate
        self.weights = weights  # bytes of it that are mapped from the file
        self.automatic = automatic  # nobody chose its number of threads
        self.threads = options.threads or 1

    def served(self) -> Served:
        worker = self.worker
        return Served(
            context=worker.context,
            slots=worker.slots,
            free_slots=max(0, worker.slots - worker.active),
            pid=worker.pid,
            tokens_per_second=worker.tokens_per_second,
            options=self.options,
        )


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
