"""What tests of the local engine share: files to load, questions, and a look at processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemon.engine.host import EngineHost
from daemon.engine.interface import ChatRequest, Delta, Provider, Sampling, ServeOptions
from daemon.engine.process import WorkerProcess
from daemon.errors import SwarmError

KEY = "ab" * 32
OTHER = "cd" * 32


class File:
    """A `Source`: a file as it is. `refusal` says no; `checks` counts the loads."""

    def __init__(self, path: Path, name: str = "tiny", refusal: SwarmError | None = None) -> None:
        self.path = path
        self.name = name
        self.refusal = refusal
        self.checks = 0

    async def check(self) -> None:
        self.checks += 1
        if self.refusal is not None:
            raise self.refusal


def nothing(key: str) -> None:
    """For an engine whose changes interest nobody."""


async def load(engine: EngineHost, path: Path, **options: Any) -> Provider:
    await engine.keep(KEY, File(path), ServeOptions(**options))
    return engine.provider(KEY, File(path))


def worker_of(engine: EngineHost, key: str = KEY) -> WorkerProcess:
    loaded = engine._residents[key].loaded
    assert loaded is not None
    return loaded.worker


def ask(content: str = "Tell me a story about a lighthouse.", **options: Any) -> ChatRequest:
    return ChatRequest(({"role": "user", "content": content},), Sampling(**{"temperature": 0.0, "max_tokens": 24, **options}))


async def answer(provider: Provider, request: ChatRequest) -> tuple[str, Delta]:
    deltas = [delta async for delta in provider.generate(request)]
    assert deltas[-1].finish is not None and deltas[-1].usage is not None
    assert all(delta.finish is None and delta.text for delta in deltas[:-1])
    return "".join(delta.text for delta in deltas), deltas[-1]


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def alive(pid: int | None) -> bool:
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie that its parent has not collected yet has ended all the same.
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def children() -> list[int]:
    """The workers of this process (Linux)."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in found if b"daemon.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
