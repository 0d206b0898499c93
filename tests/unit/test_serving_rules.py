"""What is served, and when it no longer is: the rules beside an engine that only counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from daemon.engine.interface import Served, ServeOptions
from daemon.errors import NotFound
from daemon.swarm.serving import Serving
from registry.records import GgufFacts, Identity, Model

DATA = b"the bytes of a model"
KEY = blake3(DATA).hexdigest()
MODEL = Model(
    Identity(len(DATA), KEY, "bb" * 32, "bafy", "cc" * 20, "dd" * 32), "tiny", GgufFacts("llama", None, None, None, None, None, None),
    added="2026-11-21T12:00:00Z", origin="published",
)  # fmt: skip


class Engine:
    def __init__(self) -> None:
        self.loads = 0
        self.loaded: dict[str, Served] = {}

    async def load(self, key: str, path: Path, options: ServeOptions) -> Served:
        self.loads += 1
        resolved = ServeOptions(options.context or 4096, options.threads or 2, -1, options.slots or 4)
        return self.loaded.setdefault(key, Served(resolved.context or 0, 4, 4, 1, 0.0, resolved))

    async def unload(self, key: str) -> bool:
        return self.loaded.pop(key, None) is not None

    def served(self) -> dict[str, Served]:
        return dict(self.loaded)


class Library:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.here = True

    def sound(self, blake3: str) -> bool:
        return self.here

    def usable(self, model: Model) -> Path:
        return self.path

    def current(self, model: Model) -> Model:
        if not self.here:
            raise NotFound(model.name, "no such model here")
        return model


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Engine, Library, Serving]:
    (tmp_path / "model.gguf").write_bytes(DATA)
    engine: Any = Engine()
    library: Any = Library(tmp_path / "model.gguf")
    return engine, library, Serving(engine, library, lambda: None)


async def test_serving_again_changes_nothing_unless_something_else_is_asked_for(parts: tuple[Engine, Library, Serving]) -> None:
    engine, _, serving = parts
    await serving.serve(MODEL, ServeOptions())
    await serving.serve(MODEL, ServeOptions())
    await serving.serve(MODEL, ServeOptions(context=4096, threads=2))
    assert engine.loads == 1
    assert (await serving.serve(MODEL, ServeOptions(context=512))).context == 512
    assert engine.loads == 2


async def test_what_was_removed_or_quarantined_answers_no_more(parts: tuple[Engine, Library, Serving]) -> None:
    engine, library, serving = parts
    await serving.serve(MODEL, ServeOptions())
    assert set(serving.served()) == {KEY}
    library.here = False
    assert serving.served() == {}  # at once
    assert set(engine.loaded) == {KEY}
    await serving.stop_unsound()
    assert engine.loaded == {}  # and its memory soon after
    with pytest.raises(NotFound):
        await serving.serve(MODEL, ServeOptions())
