"""The daemon's side of one worker process: start it, talk to it, know when and why it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO, Final

import daemon
from daemon.engine import blas, codec
from daemon.engine.interface import CAPABILITIES, Capability, Delta, EmbeddingRequest, Embeddings, Request
from daemon.engine.protocol import Load, Message, ProtocolError, encode, receive
from daemon.errors import Busy, ContextOverflow, InferenceError, ModelLoadError, SwarmError, UsageError

_STOP_S: Final = 2.0  # from SIGTERM to SIGKILL
# What llama.cpp and the dynamic linker may need; keys and tokens of the daemon's environment are none of a worker's business.
_ENVIRONMENT: Final = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES",
    "GOMP_SPINCOUNT",
)  # fmt: skip
_CAUSES: Final[dict[int, str]] = {signal.SIGKILL: " (out of memory?)", signal.SIGVTALRM: " (its chat template ran for too long)"}
# What a worker may say of a request.
_ERRORS: Final[dict[str, type[SwarmError]]] = {cls.__name__: cls for cls in (UsageError, ContextOverflow, InferenceError)}
_WANTED: Final[dict[str, Capability]] = {"chat": "chat", "completion": "completions", "embedding": "embeddings"}
_REBUILD: Final = (
    "rebuild llama-cpp-python for this machine: CMAKE_ARGS=\"-DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16' "
    "-DCMAKE_CXX_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'\" pip install --force-reinstall --no-cache-dir llama-cpp-python"
)


class GpuLoadError(ModelLoadError):
    """It failed while llama.cpp was given a GPU; without one it may work."""


class WorkerProcess:
    """One loaded model. Made by `start`; a `Provider` until it has ended."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path, queue: int) -> None:
        self._process = process
        self._folder = folder
        self._queue = queue
        self._inboxes: dict[int, asyncio.Queue[Message]] = {}
        self._next_id = 0
        self._stage = "start"
        self._on_gpu = False  # llama.cpp is loading and was built for a GPU
        self._ready: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._gone: str | None = None
        self._stopping = False
        self._listener = asyncio.create_task(self._listen(), name=f"worker {process.pid}")
        self.on_gone: Callable[[str], None] = lambda reason: None
        self.on_activity: Callable[[], None] = lambda: None
        self.context = self.slots = 0
        self.tokens_per_second = 0.0
        self.offline = False
        self.capabilities: frozenset[Capability] = CAPABILITIES

    @classmethod
    async def start(cls, load: Load, log: Path, *, queue: int, timeout: float) -> WorkerProcess:
        """Load a model in a new process. Raises `ModelLoadError`; whatever happens, no process is left behind then.

        `queue` chats may wait beyond those that are answered; `timeout` is in seconds.
        """
        try:
            folder, output = await asyncio.to_thread(_prepare, log)
        except OSError as error:
            why = f"its worker has no folder ({error.strerror})"
            raise ModelLoadError("the model", why, "check the disk of the data folder") from error
        try:
            process = await _spawn(folder, output)
        except OSError as error:
            await asyncio.to_thread(shutil.rmtree, folder, True)
            why = f"its worker could not be started ({error.strerror})"
            raise ModelLoadError("the model", why, "check the limits on processes") from error
        finally:
            output.close()
        worker = cls(process, folder, queue)
        try:
            await worker._load(load, timeout)
        except BaseException:
            await worker.stop()
            raise
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def gone(self) -> str | None:
        """Why it has ended; None while it runs."""
        return self._gone

    @property
    def active(self) -> int:
        """Requests that run or wait."""
        return len(self._inboxes)

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """See `Provider`. Closing the iterator cancels the answer at its next token."""
        async with aclosing(self._ask(request)) as replies:
            async for reply in replies:
                delta = codec.load_delta(reply)
                yield delta
                if delta.finish is not None:
                    return

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """See `Provider`."""
        async with aclosing(self._ask(request)) as replies:
            return codec.load_embeddings((await anext(replies))["embeddings"])

    async def _ask(self, request: Request | EmbeddingRequest) -> AsyncGenerator[Message, None]:
        """What the worker says to one request, without end. Closing it cancels the request if the worker still works on it."""
        if self._gone is not None:
            raise InferenceError("the model", self._gone, "serve it again")
        told = codec.dump_request(request)
        if (wanted := _WANTED[told["kind"]]) not in self.capabilities:
            able = " and ".join(sorted(self.capabilities))
            raise UsageError("the model", f"it cannot do {wanted}, only {able}", "choose another model")
        if self.active >= self.slots + self._queue:
            raise Busy("the model", f"{self.active} chats are running or waiting already", "try again in a moment")
        self._next_id += 1
        request_id, inbox = self._next_id, asyncio.Queue[Message]()
        self._inboxes[request_id] = inbox
        self.on_activity()
        try:
            await self._send({"type": "ask", "id": request_id, "request": told})
            while True:
                yield _result(await inbox.get())
        finally:
            del self._inboxes[request_id]
            if self._gone is None:
                # The worker takes no notice when it has finished the request already.
                self._process_input.write(encode({"type": "cancel", "id": request_id}))
            self.on_activity()

    def set_threads(self, count: int) -> None:
        """From the next decode on."""
        if self._gone is None:
            self._process_input.write(encode({"type": "threads", "count": count}))

    async def stop(self) -> None:
        """End the process; its memory is free when this returns. Idempotent, at most a few seconds."""
        self._stopping = True
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(asyncio.shield(self._listener), _STOP_S)
        except TimeoutError:
            self._kill()
            await self._listener
        except asyncio.CancelledError:
            self._kill()  # whoever cannot wait leaves no process behind either
            raise

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    @property
    def _process_input(self) -> asyncio.StreamWriter:
        assert self._process.stdin is not None
        return self._process.stdin

    async def _send(self, message: Message) -> None:
        try:
            self._process_input.write(encode(message))
            await self._process_input.drain()
        except ProtocolError:
            raise UsageError("the conversation", "it is too large", "shorten it") from None
        except ConnectionError:
            pass  # the worker has just ended; the listener tells every chat why

    async def _load(self, load: Load, timeout: float) -> None:
        await self._send({"type": "load", "load": load})
        try:
            ready = await asyncio.wait_for(self._ready, timeout)
        except TimeoutError:
            raise ModelLoadError("the model", f"it was not loaded within {timeout:g} s", "try again when the disk is less busy") from None
        if ready["type"] in ("failed", "gone"):
            hint = _REBUILD if self._bad_build() else "the worker's log in the data folder tells more"
            kind = GpuLoadError if self._on_gpu and load["gpu_layers"] else ModelLoadError
            raise kind("the model", ready["why"], hint)
        self.context, self.slots = ready["context"], ready["slots"]
        self.tokens_per_second, self.offline = ready["tokens_per_second"], ready["offline"]
        self.capabilities = frozenset(ready["capabilities"])

    def _bad_build(self) -> bool:
        return self._stage in ("load", "warm-up") and self._process.returncode in (-signal.SIGSEGV, -signal.SIGILL)

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        try:
            while (message := await receive(self._process.stdout)) is not None:
                self._dispatch(message)
        except (ProtocolError, LookupError, TypeError, ValueError):
            # It has read a stranger's file, so it may say anything; whoever waits for it must hear of its end all the same.
            self._kill()
        # Its side of the pipe is closed: it has ended or is about to.
        code = await self._process.wait()
        self._gone = "it was stopped" if self._stopping else self._why(code)
        self._process_input.close()
        gone: Message = {"type": "gone", "why": self._gone}
        if not self._ready.done():
            self._ready.set_result(gone)
        for inbox in self._inboxes.values():
            inbox.put_nowait(gone)
        if not self._stopping:
            self.on_gone(self._gone)
        await asyncio.to_thread(shutil.rmtree, self._folder, True)

    def _dispatch(self, message: Message) -> None:
        if message["type"] == "stage":
            self._stage, self._on_gpu = message["stage"], message.get("gpu", False)
        elif message["type"] in ("ready", "failed"):
            if not self._ready.done():
                self._ready.set_result(message)
        elif message["type"] == "deltas":
            for request_id, delta in message["deltas"]:
                self._deliver(request_id, delta)
        else:
            self._deliver(message["id"], message)

    def _deliver(self, request_id: int, message: Message) -> None:
        inbox = self._inboxes.get(request_id)
        if inbox is not None:  # a cancelled request may still have been answered
            inbox.put_nowait(message)

    def _why(self, code: int) -> str:
        if code >= 0:
            return f"its worker ended with exit code {code}"
        if self._bad_build():
            name = _signal_name(code)
            return f"llama.cpp died by {name} at its first decode, so it was built for instructions (AMX?) that this machine lacks"
        return f"its worker died by {_signal_name(code)}{_CAUSES.get(-code, '')}"


def _result(message: Message) -> Message:
    """A delta or a frame that the worker sent about a request. Raises what it says went wrong."""
    if message.get("type") == "error":
        raise _ERRORS[message["kind"]](message["what"], message["why"], message["hint"])
    if message.get("type") == "gone":
        raise InferenceError("the answer", f"cut off: {message['why']}", "ask again")
    return message


def _prepare(log: Path) -> tuple[Path, BinaryIO]:
    """The worker's private folder (0700) and its log. A daemon that was killed could not remove the folder of its worker."""
    log.parent.mkdir(parents=True, exist_ok=True)
    for left_over in log.parent.glob(f"{log.stem}-*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{log.stem}-", suffix=".tmp", dir=log.parent)), log.open("wb")


async def _spawn(folder: Path, output: BinaryIO) -> asyncio.subprocess.Process:
    environment = {
        # By default the threads of a decode wait for each other by spinning, and where anything else wants a core they spin away
        # the time that the others need: 1-3 tokens/s on 2 busy cores. Not to spin at all costs two thirds of the speed on idle
        # ones, where the next operation of a graph follows within microseconds. So they spin for about as long as that.
        "GOMP_SPINCOUNT": "1000",
        **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "TMPDIR": str(folder),
        # The same code that runs here, wherever the current folder is.
        "PYTHONPATH": str(Path(daemon.__file__).parent.parent),
        # A thread would keep the worker from leaving the network; llama.cpp asks for its own number later.
        "OPENBLAS_NUM_THREADS": "1",
        **await asyncio.to_thread(blas.environment),
        # ggml would start a debugger for a backtrace when it aborts.
        "GGML_NO_BACKTRACE": "1",
    }
    return await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "daemon.engine.worker", str(os.getpid()),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=output, cwd=folder, env=environment,
        start_new_session=True,
    )  # fmt: skip


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
