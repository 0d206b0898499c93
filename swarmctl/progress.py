"""Progress of a transfer on stderr: a bar on a terminal, a line now and then elsewhere, NDJSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from swarmctl.render import by_source, safe, size

LINE_EVERY_S = 5.0


class Progress(Protocol):
    def show(self, transfer: Mapping[str, Any]) -> None: ...
    def __enter__(self) -> Progress: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None: ...


def progress(as_json: bool) -> Progress:
    """The kind that fits whoever reads stderr."""
    if as_json:
        return _Lines(lambda transfer: json.dumps(transfer), 0.0)
    return _Bar() if sys.stderr.isatty() else _Lines(describe, LINE_EVERY_S)


def describe(transfer: Mapping[str, Any]) -> str:
    """One line: how far, how fast, from where."""
    name = safe(transfer["name"] or transfer["ref"])
    if not transfer["size"]:
        return f"{name}: {safe(transfer['state'])}"
    figures = f"{size(transfer['received'])} of {size(transfer['size'])}, {size(transfer['rate'])}/s, {transfer['peers']} peers"
    return f"{name}: {safe(transfer['state'])}, {figures} ({by_source(transfer['sources'])})"


class _Lines:
    def __init__(self, line: Any, every_s: float) -> None:
        self._line = line
        self._every_s = every_s
        self._next = 0.0
        self._state = ""
        self._noted = 0

    def show(self, transfer: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now >= self._next or transfer["state"] != self._state:
            self._next, self._state = now + self._every_s, transfer["state"]
            print(self._line(transfer), file=sys.stderr, flush=True)
        if self._every_s:  # JSON carries the notes in the transfer
            for note in transfer["notes"][self._noted :]:
                print(f"note: {safe(note)}", file=sys.stderr, flush=True)
            self._noted = len(transfer["notes"])

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        pass


class _Bar:
    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.fields[label]}", markup=False), BarColumn(), TextColumn("{task.fields[figures]}", markup=False))
        self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bars.add_task("", total=None, label="", figures="")
        self._noted = 0

    def show(self, transfer: Mapping[str, Any]) -> None:
        figures = f"{size(transfer['received'])}/{size(transfer['size'])} {size(transfer['rate'])}/s {transfer['peers']} peers"
        label = f"{safe(transfer['name'] or transfer['ref'], 40)} {safe(transfer['state'])}"
        self._bars.update(self._task, total=transfer["size"], completed=transfer["received"], label=label, figures=figures)
        for note in transfer["notes"][self._noted :]:
            self._bars.console.print(f"note: {safe(note)}", markup=False, highlight=False)
        self._noted = len(transfer["notes"])

    def __enter__(self) -> _Bar:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._bars.stop()
