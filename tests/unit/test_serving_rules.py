"""What is served, and when it no longer is: the rules beside an engine that only counts, and a real ledger."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from blake3 import blake3

from daemon.answering.serving import Serving
from daemon.engine.interface import Served, ServeOptions, Source
from daemon.errors import ModelLoadError, NotFound, Refused, SwarmError
from daemon.ledger import LedgerThread
from registry.records import GgufFacts, Identity, Model
from registry.store import Ledger

DATA = b"the bytes of a model"
KEY = blake3(DATA).hexdigest()
MODEL = Model(
    Identity(len(DATA), KEY, "bb" * 32, "bafy", "cc" * 20, "dd" * 32), "tiny", GgufFacts("llama", None, None, None, None, None, None),
    added="2026-11-21T12:00:00Z", origin="published",
)  # fmt: skip


class Engine:
    """Keeps models by name only; `refuses` is what a load ends with, and `goes_on` lets it end."""

    def __init__(self) -> None:
        self.asked: list[ServeOptions] = []
        self.kept: dict[str, Served] = {}
        self.refuses: SwarmError | None = None
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def keep(self, key: str, source: Source, options: ServeOptions) -> Served:
        await source.check()
        await self.goes_on.wait()
        if self.refuses is not None:
            raise self.refuses
        return await self.keep_idle(key, source, options, 7.0)

    async def keep_idle(self, key: str, source: Source, options: ServeOptions, tokens_per_second: float) -> Served:
        self.asked.append(options)
        return self.kept.setdefault(key, Served(512, 2, 2, None, tokens_per_second, options, "idle"))

    async def unload(self, key: str) -> bool:
        if not self.goes_on.is_set():
            self.refuses = ModelLoadError("the model", "it was stopped")
            self.goes_on.set()
        return self.kept.pop(key, None) is not None

    def models(self) -> dict[str, Served]:
        return dict(self.kept)


class Library:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.held = {KEY: MODEL}
        self.blocked = False
        self.checks = 0

    def models(self) -> list[Model]:
        return list(self.held.values())

    def path(self, model: Model) -> Path:
        return self.file

    def usable(self, model: Model) -> Path:
        if model.quarantined is not None or self.blocked:
            raise Refused(model.name, "it is quarantined, or its publisher is blocked")
        return self.file

    def current(self, model: Model) -> Model:
        if model.identity.blake3 not in self.held:
            raise NotFound(model.name, "no such model here")
        return self.held[KEY]

    async def check(self, model: Model) -> Model:
        self.checks += 1
        self.held[KEY] = replace(model, quarantined="its bytes changed on disk")
        return self.held[KEY]


class Parts:
    def __init__(self, file: Path, ledger: LedgerThread) -> None:
        file.write_bytes(DATA)
        self.file = file
        self.ledger = ledger
        self.engine: Any = Engine()
        self.library: Any = Library(file)
        self.changes = 0
        self.serving = self.begun()

    def begun(self) -> Serving:
        """As after the start of the daemon."""
        self.engine.kept.clear()
        return Serving(self.engine, self.library, self.ledger, self.changed)

    def changed(self) -> None:
        self.changes += 1


@pytest_asyncio.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Parts]:
    ledger = await LedgerThread.open(tmp_path / "ledger.db")
    yield Parts(tmp_path / "model.gguf", ledger)
    await ledger.close()


async def test_serving_again_changes_only_what_is_given(parts: Parts) -> None:
    await parts.serving.serve(MODEL, ServeOptions(slots=2))
    await parts.serving.serve(MODEL, ServeOptions())
    await parts.serving.serve(MODEL, ServeOptions(context=512, keep_alive=-1))
    assert parts.engine.asked == [ServeOptions(slots=2), ServeOptions(slots=2), ServeOptions(context=512, slots=2, keep_alive=-1)]
    assert set(parts.serving.served()) == {KEY}
    await parts.serving.stop(MODEL)
    await parts.serving.serve(MODEL, ServeOptions())
    assert parts.engine.asked[-1] == ServeOptions()


async def test_what_failed_is_not_served(parts: Parts) -> None:
    parts.engine.refuses = ModelLoadError("the model", "llama.cpp refused the file")
    with pytest.raises(ModelLoadError):
        await parts.serving.serve(MODEL, ServeOptions())
    assert parts.serving.served() == {} and not parts.changes


@pytest.mark.parametrize("what", ["removed", "quarantined", "blocked"])
async def test_what_was_removed_quarantined_or_blocked_answers_no_more(parts: Parts, what: str) -> None:
    await parts.serving.serve(MODEL, ServeOptions())
    assert parts.serving.usable(MODEL)
    if what == "removed":
        parts.library.held.clear()
    elif what == "quarantined":
        await parts.library.check(MODEL)
    else:
        parts.library.blocked = True
    assert parts.serving.served() == {} and not parts.serving.usable(MODEL)  # at once
    assert set(parts.engine.kept) == {KEY}
    await parts.serving.stop_unsound()
    assert parts.engine.kept == {}  # and its memory soon after
    with pytest.raises(NotFound if what == "removed" else Refused):
        await parts.serving.serve(MODEL, ServeOptions())


async def test_other_bytes_under_the_name_are_never_loaded(parts: Parts) -> None:
    await parts.serving.serve(MODEL, ServeOptions())
    source = parts.serving._files[KEY]
    await source.check()
    parts.file.write_bytes(b"the bytes of a mODEL")
    with pytest.raises(Refused, match="its bytes changed"):
        await source.check()
    assert parts.library.checks == 1
    assert parts.serving.served() == {}


async def test_a_file_is_hashed_once_for_each_stamp_and_each_time_it_is_served(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    async def digest(path: Path) -> str:
        hashed.append(path)
        return KEY

    monkeypatch.setattr("daemon.answering.serving.digest", digest)
    await parts.serving.serve(MODEL, ServeOptions())
    source = parts.serving._files[KEY]
    await source.check()
    assert len(hashed) == 1
    parts.file.touch()
    await source.check()
    assert len(hashed) == 2
    await parts.serving.serve(MODEL, ServeOptions())
    assert len(hashed) == 3


async def test_stop_ends_a_load_and_does_not_wait_for_it(parts: Parts) -> None:
    parts.engine.goes_on.clear()
    serving = asyncio.create_task(parts.serving.serve(MODEL, ServeOptions()))
    while parts.serving._files.get(KEY) is None or parts.serving._files[KEY].hashed is None:
        await asyncio.sleep(0)
    await parts.serving.stop(MODEL)
    with pytest.raises(ModelLoadError, match="stopped"):
        await serving
    assert parts.serving.served() == {}


async def test_what_is_served_is_served_again_after_a_restart(parts: Parts) -> None:
    await parts.serving.serve(MODEL, ServeOptions(slots=2, keep_alive=0.5))
    serving = parts.begun()
    assert serving.served() == {}
    await serving.open()
    assert parts.engine.asked[-1] == ServeOptions(slots=2, keep_alive=0.5)
    assert (serving.served()[KEY].state, serving.served()[KEY].tokens_per_second) == ("idle", 7.0)
    await serving.stop(MODEL)
    serving = parts.begun()
    await serving.open()
    assert serving.served() == {}


@pytest.mark.parametrize("what", ["removed", "quarantined", "blocked"])
async def test_what_may_not_be_served_any_more_is_forgotten_at_the_start(
    parts: Parts, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    await parts.serving.serve(MODEL, ServeOptions())
    if what == "removed":
        parts.library.held.clear()
    elif what == "quarantined":
        await parts.library.check(MODEL)
    else:
        parts.library.blocked = True
    for _ in range(2):
        serving = parts.begun()
        await serving.open()
        assert serving.served() == {} and serving.engine() == []
    assert [record.getMessage().partition(":")[0].split(" ", 1)[1] for record in caplog.records] == ["is served no more"]
    parts.library.held[KEY], parts.library.blocked = MODEL, False
    serving = parts.begun()
    await serving.open()
    assert serving.served() == {}


@pytest.mark.parametrize(
    "damaged",
    [
        "", "{", "[" * 100_000, "null", "[]", '"text"', "[1]", '{"KEY": null}', '{"KEY": []}', '{"KEY": {}}', '{"KEY": {"options": {}}}',
        '{"KEY": {"options": [], "tokens_per_second": 1}}', '{"KEY": {"options": {"moon": 1}, "tokens_per_second": 1}}',
        '{"KEY": {"options": {"slots": "2"}, "tokens_per_second": 1}}', '{"KEY": {"options": {"slots": 1.5}, "tokens_per_second": 1}}',
        '{"KEY": {"options": {"slots": 99999999999}, "tokens_per_second": 1}}',
        '{"KEY": {"options": {"keep_alive": Infinity}, "tokens_per_second": 1}}',
        '{"KEY": {"options": {}, "tokens_per_second": NaN}}', '{"KEY": {"options": {}, "tokens_per_second": true}}',
    ],
)  # fmt: skip
async def test_a_damaged_list_serves_nothing_and_stops_nobody(parts: Parts, damaged: str) -> None:
    await parts.ledger.call(Ledger.set_meta, "serving", damaged.replace("KEY", KEY))
    await parts.serving.open()
    assert parts.serving.served() == {} and parts.engine.asked == []
    await parts.serving.serve(MODEL, ServeOptions(slots=2))
    serving = parts.begun()
    await serving.open()
    assert set(serving.served()) == {KEY}


async def test_one_damaged_entry_takes_no_other_with_it(parts: Parts) -> None:
    await parts.serving.serve(MODEL, ServeOptions(slots=2))
    listed = json.loads(await parts.ledger.call(Ledger.get_meta, "serving") or "")
    await parts.ledger.call(Ledger.set_meta, "serving", json.dumps({"00" * 32: 7, **listed}))
    serving = parts.begun()
    await serving.open()
    assert set(serving.served()) == {KEY} and parts.engine.asked[-1] == ServeOptions(slots=2)
