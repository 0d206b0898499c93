"""The servers that are compared: a node of ours, llama.cpp's own server, and the one of llama-cpp-python. `.ci/bench.py` prepares them.

All of them compute on all cores, on loopback, with the same context, and with their defaults otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import psutil

from daemon.engine import blas
from daemon.engine.cores import usable_cores
from tests.bench.load import Target
from tests.conftest import CACHE
from tests.functional.asking import workers
from tests.functional.nodes import Node

BENCH = CACHE / "bench"
GEMMA = BENCH / "gemma-3-270m-q4_k_m.gguf"
CORES = usable_cores()
_START_S = 120.0


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


@contextlib.asynccontextmanager
async def _process(command: list[str], url: str, ready: str, log: Path, **environment: str) -> AsyncIterator[None]:
    """A server that answers `GET url/ready` with 200 once it can be asked; it is ended at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(_START_S):
            while True:
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}; its log is {log}"
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{url}/{ready}") as response:
                        if response.status == 200:
                            break
                await asyncio.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.asynccontextmanager
async def llama_server(model: Path, slots: int, context: int, log: Path, *, unified: bool) -> AsyncIterator[Target]:
    """`unified`: one KV cache for all chats, as ours; otherwise each has its equal share of the context."""
    binary = BENCH / "llama-server"
    assert binary.is_file(), "there is no llama-server in .cache/bench; run `make bench-engine`"
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    options = {"-m": model, "--host": "127.0.0.1", "--port": port, "-np": slots, "-c": context, "-t": CORES, "-tb": CORES}
    words = [str(word) for pair in options.items() for word in pair]
    async with _process([str(binary), *words, *(["-kvu"] if unified else [])], url, "health", log):
        yield Target(url, "any")


@contextlib.asynccontextmanager
async def python_server(model: Path, context: int, log: Path) -> AsyncIterator[Target]:
    """Without `interrupt_requests false` a new request would cut the running one off."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    options = {
        "model": model, "host": "127.0.0.1", "port": port, "n_ctx": context, "n_threads": CORES, "n_threads_batch": CORES,
        "interrupt_requests": "false", "verbose": "false",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    as_fast = await asyncio.to_thread(blas.environment)  # as ours: it is the same llama.cpp
    environment = {"PYTHONPATH": str(BENCH / "site"), **as_fast}
    async with _process([sys.executable, "-P", "-m", "llama_cpp.server", *words], url, "v1/models", log, **environment):
        yield Target(url, str(model))


class Ours:
    """A node that serves one model at a time."""

    def __init__(self, node: Node) -> None:
        self.node = node.up("--ipfs-enabled", "false")
        self.headers = {"Authorization": f"Bearer {(node.home / 'token').read_text().strip()}"}
        self._codes: dict[Path, str] = {}

    @property
    def url(self) -> str:
        return str(self.node.status["api"])

    @contextlib.contextmanager
    def serve(self, model: Path, slots: int, context: int) -> Iterator[Target]:
        if model not in self._codes:
            self._codes[model] = self.node.run("publish", str(model))["code"]
        code = self._codes[model]
        self.node.run("serve", code, "--slots", str(slots), "--context", str(context))
        try:
            yield Target(self.url, code, self.headers)
        finally:
            self.node.run("stop", code)

    def memory(self) -> dict[str, int]:
        """Resident bytes of the daemon and of its worker."""
        assert self.node.daemon is not None
        daemon = psutil.Process(self.node.daemon.pid)
        return {"daemon": daemon.memory_info().rss, "worker": sum(worker.memory_info().rss for worker in workers(self.node))}
