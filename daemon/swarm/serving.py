"""Which models of the library answer: checked before they are loaded, withdrawn when their worker is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from blake3 import blake3

from daemon.engine.interface import Engine, Provider, Served, ServeOptions
from daemon.errors import Refused
from daemon.transfer.library import Library
from registry.records import Model

log = logging.getLogger(__name__)


class Serving:
    def __init__(self, engine: Engine, library: Library, on_change: Callable[[], None]) -> None:
        self._engine = engine
        self._library = library
        self._on_change = on_change
        self._changing: dict[str, asyncio.Lock] = {}

    async def serve(self, model: Model, options: ServeOptions) -> Served:
        """Load a model and offer it. Raises `Refused`, `ModelLoadError`, `NoMemory` or `UsageError`.

        The bytes are hashed first: a flipped bit would otherwise become a wrong answer under a right name.
        """
        key = model.identity.blake3
        async with self._changing.setdefault(key, asyncio.Lock()):
            running = self._engine.served().get(key)
            if running is not None and running.options == options:
                return running
            path = self._library.usable(model)
            digest = await asyncio.to_thread(lambda: blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest())
            if digest != key:
                await self._library.check(model)
                raise Refused(model.name, "its bytes changed on disk", f"swarmctl rm {model.identity.cid} and pull it again")
            if running is not None:
                await self._engine.unload(key)
            served = await self._engine.load(key, path, options)
            self._on_change()
            return served

    async def stop(self, model: Model) -> bool:
        """End the model's worker; False when it was not served."""
        async with self._changing.setdefault(model.identity.blake3, asyncio.Lock()):
            stopped = await self._engine.unload(model.identity.blake3)
        self._on_change()
        return stopped

    def served(self) -> dict[str, Served]:
        return self._engine.served()

    def provider(self, model: Model) -> Provider:
        """What answers for a served model. Raises `NotFound` when it is not served."""
        return self._engine.provider(model.identity.blake3)

    def worker_gone(self, key: str, reason: str) -> None:
        """The engine says that a worker died; nobody shall be sent here for its model any more."""
        log.error("the worker of %s died and the model is no longer served: %s", key, reason)
        self._on_change()
