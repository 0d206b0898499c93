"""Our own Kubo: a child process with a repository under the data folder, started, watched and stopped.

Its RPC is on a unix socket in a folder that only we may enter, its telemetry is off; what it is told
besides stands in settings.py.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

from daemon import orphan
from daemon.config import Network
from daemon.errors import Unavailable
from daemon.ipfs.gate import RelayGate
from daemon.ipfs.reach import Reach
from daemon.ipfs.rpc import Rpc
from daemon.ipfs.settings import apply_settings

_SOCKET_PATH_LIMIT = 103  # bytes; sun_path has 104 on macOS and 108 on Linux, the last one is a NUL
_LOCK_WAIT_S = 5.0  # a child whose daemon was killed needs a moment to die
_READY_S = 30.0
_POLL_S = 0.02
_STOP_S = 3.5
_MAX_LOG = 4 << 20  # bytes; a longer log starts anew with the child
_HINT = "logs/kubo.log says more; swarmctl doctor checks the set-up"


class KuboProcess:
    """One life of Kubo: `start()`, then `wait()` for its end or `stop()` it. A supervisor makes a new one for the next life.

    `repo` is an absolute path; files to be added in place must be named with its parent as it is spelt here.
    """

    def __init__(
        self,
        binary: Path,
        repo: Path,
        *,
        network: Network,
        port: int,
        max_connections: int,
        log: Path,
        reach: Reach | None = None,
    ) -> None:
        self._binary = binary
        self._repo = repo
        self._network: Network = network
        self._port = port
        self._max_connections = max_connections
        self._log = log
        self._reach = reach or Reach()
        self._gates: list[RelayGate] = []
        self._socket = _socket_path(self._repo)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def api(self) -> str:
        """The multiaddr of the RPC."""
        return f"/unix{self._socket}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def let_through(self, peer: str) -> None:
        """The relay `peer` is connected, or cannot be: libp2p may ask it for a reservation now (gate.py)."""
        for gate in self._gates:
            if gate.peer == peer:
                gate.close()

    async def start(self) -> None:
        """Returns when the RPC answers; then connect to the relays, and call `let_through` for each.

        Raises `Unavailable` with Kubo's last word when it does not come up."""
        try:
            if not await asyncio.to_thread(self._prepare_folders):
                await self._init()
            await self._wait_for_lock()
            for relay in self._reach.relays:
                self._gates.append(await RelayGate.open(relay))
            await asyncio.to_thread(self._configure)
            log_start = await self._spawn()
            await self._until_ready(log_start)
        except OSError as error:
            await self.stop()
            raise Unavailable("Kubo", f"it cannot be started: {error.strerror or error}", _HINT) from error
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> int:
        """The exit code, when the child has ended; negative for a signal."""
        if self._process is None:
            raise Unavailable("Kubo", "it was not started", _HINT)
        return await self._process.wait()

    async def stop(self) -> None:
        """Ends the child within about four seconds, first politely. Calling it again does nothing."""
        for gate in self._gates:
            gate.close()
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            # The group, because where the kernel has no death signal a watcher stands between us and Kubo.
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    # -- the steps of a start -----------------------------------------------------------------------------------------

    def _prepare_folders(self) -> bool:
        """Whether there is a repository already."""
        self._repo.parent.mkdir(parents=True, exist_ok=True)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > _MAX_LOG:
            self._log.unlink()
        if self._socket.parent != self._repo:
            _private_folder(self._socket.parent)
        return (self._repo / "config").exists()

    async def _init(self) -> None:
        """Made beside and renamed, so that a crash in the middle leaves no half repository."""
        fresh = self._repo.with_name(self._repo.name + ".new")
        await asyncio.to_thread(shutil.rmtree, fresh, ignore_errors=True)
        profiles = "unixfs-v1-2025" if self._network == "public" else "test,unixfs-v1-2025"
        process = await asyncio.create_subprocess_exec(
            *orphan.command([str(self._binary), "init", f"--profile={profiles}"]), env=_environment(fresh),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if process.returncode != 0:
            raise Unavailable("Kubo", f"its repository cannot be made: {_last_word(output, process.returncode)}", _HINT)
        await asyncio.to_thread(self._adopt, fresh)

    def _adopt(self, fresh: Path) -> None:
        fresh.chmod(0o700)
        fresh.replace(self._repo)

    async def _wait_for_lock(self) -> None:
        deadline = asyncio.get_running_loop().time() + _LOCK_WAIT_S
        while await asyncio.to_thread(_is_locked, self._repo / "repo.lock"):
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable("Kubo", "another process uses its repository", "stop that process, or use another --home")
            await asyncio.sleep(0.1)

    def _configure(self) -> None:
        """The configuration is written anew for each life, so that a changed setting takes effect. Nobody holds the lock here."""
        path = self._repo / "config"
        try:
            config = json.loads(path.read_bytes())
            gated = replace(self._reach, relays=tuple(gate.address for gate in self._gates))
            apply_settings(
                config, self._network, self._port, self._max_connections, self.api, gated
            )
        except (ValueError, TypeError, KeyError) as error:
            raise Unavailable("Kubo", "the config of its repository is damaged", "move the folder ipfs away; it is made anew") from error
        self._repo.chmod(0o700)
        draft = path.with_suffix(".new")
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(config, indent=2))
        draft.replace(path)
        # What a killed predecessor leaves; with its socket there Kubo ends with "address already in use".
        for stale in (self._repo / "api", self._repo / "gateway", self._socket):
            stale.unlink(missing_ok=True)

    async def _spawn(self) -> int:
        """Starts the daemon; returns where its part of the log begins."""
        log, begin = await asyncio.to_thread(_open_log, self._log)
        try:
            # A session of its own: a Ctrl-C in the terminal is for us, who stop Kubo last.
            self._process = await asyncio.create_subprocess_exec(
                *orphan.command([str(self._binary), "daemon", "--migrate=true"]), env=_environment(self._repo),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(log)
        return begin

    async def _until_ready(self, log_start: int) -> None:
        assert self._process is not None
        ended = asyncio.create_task(self._process.wait())
        ready = asyncio.create_task(self._answers())
        try:
            done, _ = await asyncio.wait({ended, ready}, timeout=_READY_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (ended, ready):
                task.cancel()
            await asyncio.gather(ended, ready, return_exceptions=True)
        if ready in done:
            return
        if not done:
            raise Unavailable("Kubo", f"it did not get ready within {_READY_S:.0f} s", _HINT)
        output = await asyncio.to_thread(_tail, self._log, log_start)
        raise Unavailable("Kubo", f"it ended while starting: {_last_word(output, ended.result())}", _HINT)

    async def _answers(self) -> None:
        async with Rpc(self.api) as rpc:
            while True:
                await asyncio.sleep(_POLL_S)
                try:
                    await rpc.call("id", timeout_s=2.0)
                    return
                except (Unavailable, TimeoutError):
                    continue  # not yet; the end of the process or the deadline is what ends this


def _socket_path(repo: Path) -> Path:
    """In the repository, or where that path is too long for a socket, in a folder of ours under the system's temporary one."""
    inside = repo / "rpc.sock"
    if len(os.fsencode(inside)) <= _SOCKET_PATH_LIMIT:
        return inside
    mark = hashlib.sha256(os.fsencode(repo)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"swarmctl-{os.getuid()}-{mark}" / "rpc.sock"


def _private_folder(folder: Path) -> None:
    """Anybody may have made a folder of that name in a shared place: it must be ours, no link, and closed to others."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Unavailable("Kubo", f"{folder} is not a private folder of ours", "remove it, or use a --home with a shorter path")


def _is_locked(path: Path) -> bool:
    """Whether a process holds Kubo's lock (go4.org/lock: a POSIX record lock on the whole file)."""
    try:
        with path.open("r+b") as handle:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):
        return True
    return False


def _open_log(path: Path) -> tuple[int, int]:
    """A descriptor to append to, and the size so far."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    return log, os.fstat(log).st_size


def _environment(repo: Path) -> dict[str, str]:
    # What somebody exported for a Kubo of their own must not change ours, and our settings, secrets among them, are not its business.
    others = ("IPFS_", "LIBP2P_", "GOLOG_", "KUBO_", "SWARMCTL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return {**kept, "IPFS_PATH": str(repo), "IPFS_TELEMETRY": "off"}


def _tail(log: Path, start: int) -> bytes:
    with log.open("rb") as handle:
        handle.seek(max(start, handle.seek(0, os.SEEK_END) - 16384))
        return handle.read()


def _last_word(output: bytes, code: int | None) -> str:
    """The line that tells why: Kubo's own `Error:`, else the last one."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("Error:").strip() for line in lines if line.startswith("Error:")]
    told = (errors or lines or [""])[-1][:300]
    return "".join(c for c in told if c.isprintable()) or f"exit code {code}"
