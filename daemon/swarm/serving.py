"""Which models of the library answer: checked before they are loaded, withdrawn when their worker is gone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict

from daemon.engine.interface import Engine, Provider, Served, ServeOptions
from daemon.errors import Refused
from daemon.transfer.identify import digest
from daemon.transfer.library import Library
from daemon.waiting import KeyLocks
from registry.records import Model

log = logging.getLogger(__name__)


class Serving:
    def __init__(self, engine: Engine, library: Library, on_change: Callable[[], None]) -> None:
        self._engine = engine
        self._library = library
        self._on_change = on_change
        self._changing = KeyLocks()  # by blake3

    async def serve(self, model: Model, options: ServeOptions) -> Served:
        """Load a model and offer it. Raises `NotFound`, `Refused`, `ModelLoadError`, `NoMemory` or `UsageError`.

        The bytes are hashed first: a flipped bit would otherwise become a wrong answer under a right name.
        """
        key = model.identity.blake3
        async with self._changing(key):
            model = self._library.current(model)  # it may have changed while this waited
            path = self._library.usable(model)
            running = self._engine.served().get(key)
            if running is not None and _fits(running.options, options):
                return running
            if await digest(path) != key:
                await self._library.check(model)
                raise Refused(model.name, "its bytes changed on disk", f"swarmctl rm {model.identity.cid} and pull it again")
            if running is not None:
                await self._engine.unload(key)
            served = await self._engine.load(key, path, options)
            self._on_change()
            return served

    async def stop(self, model: Model) -> bool:
        """End the model's worker; False when it was not served."""
        return await self._stop(model.identity.blake3)

    async def stop_unsound(self) -> None:
        """End the workers of models that were removed or quarantined, which nobody is sent to any more."""
        for key in self._engine.served():
            if not self._library.sound(key):
                log.warning("%s is served no more: its file was changed or removed", key)
                await self._stop(key)

    async def _stop(self, key: str) -> bool:
        async with self._changing(key):
            stopped = await self._engine.unload(key)
        self._on_change()
        return stopped

    def served(self) -> dict[str, Served]:
        """What answers, by blake3. A model whose bytes are no longer sure does not, even before its worker is ended."""
        return {key: served for key, served in self._engine.served().items() if self._library.sound(key)}

    def provider(self, model: Model) -> Provider:
        """What answers for a served model. Raises `NotFound` when it is not served."""
        return self._engine.provider(model.identity.blake3)

    def worker_gone(self, key: str, reason: str) -> None:
        """The engine says that a worker died; nobody shall be sent here for its model any more."""
        log.error("the worker of %s died and the model is no longer served: %s", key, reason)
        self._on_change()


def _fits(running: ServeOptions, wanted: ServeOptions) -> bool:
    """Whether a worker runs as `wanted`, whose None asks for nothing in particular."""
    return all(value is None or value == getattr(running, name) for name, value in asdict(wanted).items())
