"""Which models of the library answer: those that are served to the swarm, and any other when this node's own user asks for it.

*Served* is what `serve` said, until `stop`, also over a restart of the daemon. *Loaded* is what has a worker just now; the engine
sees to that. Whatever is loaded was checked before: the publisher is trusted, and the bytes are what the name promises.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from daemon.engine.interface import Engine, Provider, Served, ServeOptions
from daemon.errors import NotFound, Refused, SwarmError
from daemon.ledger import LedgerThread
from daemon.transfer.identify import digest
from daemon.transfer.library import Library
from daemon.transfer.store import Stamp, stamp_of
from daemon.waiting import KeyLocks
from registry.records import Model
from registry.store import Ledger

log = logging.getLogger(__name__)

_LIST = "serving"  # in the ledger: what is served, by blake3
_LARGEST: Final = 1 << 31  # of any number in it


class _File:
    """A `Source`: one model's file. It is hashed before the first load, and again when its stamp is another."""

    def __init__(self, library: Library, model: Model) -> None:
        self.model = model
        self.hashed: Stamp | None = None  # the stamp that it had when its bytes were right
        self._library = library

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def path(self) -> Path:
        return self._library.path(self.model)

    async def check(self) -> None:
        """See `Source`. A flipped bit would otherwise become a wrong answer under a right name."""
        model = self._library.current(self.model)
        path = self._library.usable(model)
        stamp = await asyncio.to_thread(_stamp, path)
        if stamp is not None and stamp == self.hashed:
            return
        if await digest(path) != model.identity.blake3:
            await self._library.check(model)
            raise Refused(model.name, "its bytes changed on disk", f"swarmctl rm {model.identity.cid} and pull it again")
        self.hashed = stamp


@dataclass(frozen=True, slots=True)
class _Entry:
    """A model that is served, how somebody wanted it, and how fast it was."""

    model: Model
    options: ServeOptions
    tokens_per_second: float


class Serving:
    def __init__(self, engine: Engine, library: Library, ledger: LedgerThread, on_change: Callable[[], None]) -> None:
        self._engine = engine
        self._library = library
        self._ledger = ledger
        self._on_change = on_change
        self._files: dict[str, _File] = {}  # by blake3, as everything here
        self._served: dict[str, _Entry] = {}
        self._changing = KeyLocks()

    async def open(self) -> None:
        """Serve again what was served when the daemon ended; each is loaded when somebody asks for it."""
        text = await self._ledger.call(Ledger.get_meta, _LIST)
        listed = _listed(text or "{}")
        known = {model.identity.blake3: model for model in self._library.models()}
        for key, (options, rate) in listed.items():
            model = known.get(key)
            if model is None:
                log.warning("%s is served no more: it is not here", key)
                continue
            try:
                self._library.usable(model)
                await self._engine.keep_idle(key, self._file(model), options, rate)
            except SwarmError as error:
                log.warning("%s is served no more: %s", model.name, error)
                continue
            self._served[key] = _Entry(model, options, rate)
        if set(listed) != set(self._served):
            await self._remember()

    async def serve(self, model: Model, options: ServeOptions) -> Served:
        """Load a model and offer it. Raises `NotFound`, `Refused`, `ModelLoadError`, `NoMemory` or `UsageError`.

        Serving it again changes the options that are given and leaves the others as they are.
        """
        key = model.identity.blake3
        async with self._changing(key):
            model = self._library.current(model)  # it may have changed while this waited
            self._library.usable(model)
            before = self._served.get(key)
            options = _over(before.options if before is not None else ServeOptions(), options)
            file = self._file(model)
            file.hashed = None  # whoever serves a model wants to be sure of it
            served = await self._engine.keep(key, file, options)
            self._served[key] = _Entry(model, options, served.tokens_per_second)
            await self._remember()
            self._on_change()
            return served

    async def stop(self, model: Model) -> bool:
        """Serve a model no more, and give its memory back; False when there was nothing to stop."""
        return await self._stop(model.identity.blake3)

    async def stop_unsound(self) -> None:
        """Stop what was removed, quarantined or blocked, which nobody is sent to any more."""
        known = self._engine.models()
        for key, file in list(self._files.items()):
            if (key in known or key in self._served) and not self.usable(file.model):
                log.warning("%s is served no more: its file was changed or removed, or its publisher is blocked", file.name)
                await self._stop(key)

    async def _stop(self, key: str) -> bool:
        # At once, and not when a load that `serve` waits for is over: this ends it.
        stopped = await self._engine.unload(key)
        async with self._changing(key):
            stopped = await self._engine.unload(key) or stopped
            if self._served.pop(key, None) is not None:
                await self._remember()
        self._on_change()
        return stopped

    def served(self) -> dict[str, Served]:
        """What answers for everybody. A model whose bytes are no longer sure does not, even before its worker is ended."""
        known = self._engine.models()
        return {key: known[key] for key, entry in self._served.items() if key in known and self.usable(entry.model)}

    def engine(self) -> list[tuple[Model, Served]]:
        """Every model that is served or loaded, and how it is."""
        return [(self._files[key].model, state) for key, state in self._engine.models().items()]

    def usable(self, model: Model) -> bool:
        """Whether it may be loaded, as far as is known without reading it."""
        try:
            self._library.usable(self._library.current(model))
        except (NotFound, Refused):
            return False
        return True

    def provider(self, model: Model) -> Provider:
        """What answers for a local model, served or not; it is loaded when it is asked. What may not be loaded says so then."""
        return self._engine.provider(model.identity.blake3, self._file(model))

    def changed(self, key: str) -> None:
        """The engine says that a model was loaded, or that its worker died."""
        if key in self._served:
            self._on_change()

    def _file(self, model: Model) -> _File:
        file = self._files.setdefault(model.identity.blake3, _File(self._library, model))
        file.model = model  # its name may be another
        return file

    async def _remember(self) -> None:
        listed = {
            key: {
                "options": {name: value for name, value in asdict(entry.options).items() if value is not None},
                "tokens_per_second": entry.tokens_per_second,
            }
            for key, entry in self._served.items()
        }
        await self._ledger.call(Ledger.set_meta, _LIST, json.dumps(listed))


def _listed(text: str) -> dict[str, tuple[ServeOptions, float]]:
    """The options and the speed of each entry of the list. One that is damaged is left out: it must not keep the daemon from starting."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        log.warning("the list of what is served is damaged: nothing is served")
        return {}
    found = {}
    for key, entry in given.items():
        try:
            options = ServeOptions(**{name: _number(name, value) for name, value in entry["options"].items()})
            found[key] = options, _number("tokens_per_second", entry["tokens_per_second"])
        except (AttributeError, KeyError, TypeError):
            log.warning("%s is served no more: what the ledger says of it is damaged", key)
    return found


def _number(name: str, value: Any) -> Any:
    """`value`, if it is a number that `name` can be. Raises `TypeError`."""
    kind = int | float if name in ("keep_alive", "tokens_per_second") else int
    if isinstance(value, bool) or not isinstance(value, kind) or not -1 <= value <= _LARGEST:
        raise TypeError
    return value


def _over(options: ServeOptions, given: ServeOptions) -> ServeOptions:
    return replace(options, **{name: value for name, value in asdict(given).items() if value is not None})


def _stamp(path: Path) -> Stamp | None:
    try:
        return stamp_of(path)
    except OSError:
        return None  # whoever reads it will say why
