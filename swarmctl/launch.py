"""The daemon as a process: found by daemon.json, started when a command needs it, asked to stop."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmctl.client import Client, healthy
from swarmctl.failure import BUG, IN_THE_WAY, Failure

READY_S = 15.0
GONE_S = 10.0
MAX_LOG = 8 * 1024 * 1024  # bytes; a longer log is set aside once, as daemon.log.1


@dataclass(frozen=True)
class Daemon:
    """A daemon that answers."""

    url: str
    pid: int
    version: str


def find(home: Path) -> Daemon | None:
    """The daemon of this data folder; None when daemon.json is missing or was left behind by one that is gone."""
    try:
        document = json.loads((home / "daemon.json").read_text(encoding="utf-8"))
        daemon = Daemon(str(document["url"]), int(document["pid"]), str(document["version"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Failure(IN_THE_WAY, f"daemon.json: cannot be read: {error.strerror}", "check the data folder's permissions") from error
    except (ValueError, KeyError, TypeError):
        return None
    return daemon if alive(daemon.pid) and healthy(daemon.url) else None


def token(home: Path) -> str:
    """The bearer token: SWARMCTL_TOKEN, else the data folder's."""
    if given := os.environ.get("SWARMCTL_TOKEN"):
        return given
    try:
        return (home / "token").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(IN_THE_WAY, f"token: cannot be read from {home}", "set SWARMCTL_TOKEN, or check --home") from error


def command(home: Path, settings: Sequence[str]) -> list[str]:
    # -P: a folder called `daemon` where somebody happens to work must not be run instead.
    return [sys.executable, "-P", "-m", "daemon.main", "--home", str(home), *settings]


def environment() -> Mapping[str, str]:
    """What children that run our other packages get: in a checkout that is not installed they lie beside this one."""
    root = Path(__file__).resolve().parent.parent
    if root.name in ("site-packages", "dist-packages"):
        return os.environ
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}


def ensure(home: Path, settings: Sequence[str], say: Callable[[str], None]) -> tuple[Daemon, bool]:
    """The daemon, and whether it was started now. Raises `Failure` with the daemon's own reason and code when it does not start."""
    if running := find(home):
        return running, False
    with _one_at_a_time(home):
        if running := find(home):
            return running, False
        say("starting the daemon")
        return _start(home, settings), True


def stop(home: Path) -> int | None:
    """Ask the daemon to stop and wait until its process is gone. Its pid, or None when there was none."""
    with _one_at_a_time(home) if home.is_dir() else contextlib.nullcontext():
        daemon = find(home)
        if daemon is None:
            return None
        Client(daemon.url, token(home)).post("/api/stop")
        deadline = time.monotonic() + GONE_S
        while alive(daemon.pid):
            if time.monotonic() > deadline:
                raise Failure(IN_THE_WAY, f"daemon: process {daemon.pid} is still there after {GONE_S:.0f} s", f"see {_log(home)}")
            time.sleep(0.02)
        return daemon.pid


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended but was not yet collected by its parent does not."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def _log(home: Path) -> Path:
    return home / "logs" / "daemon.log"


@contextlib.contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    """Two commands at once must not start two daemons, of which one would only complain."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (home / "logs").mkdir(exist_ok=True, mode=0o700)
        folder = os.open(home / "logs", os.O_RDONLY)
    except OSError as error:
        raise Failure(IN_THE_WAY, f"data folder: {home} cannot be used: {error.strerror}", "choose another with --home") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _start(home: Path, settings: Sequence[str]) -> Daemon:
    path = _log(home)
    if path.exists() and path.stat().st_size > MAX_LOG:
        path.replace(path.with_suffix(".log.1"))
    with path.open("ab") as log:
        begin = log.tell()
        child = subprocess.Popen(
            command(home, settings), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment()
        )
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        ended = child.poll()
        if found := find(home):
            return found
        if ended is not None:
            raise _why(ended, path, begin)
        time.sleep(0.02)
    raise Failure(IN_THE_WAY, f"daemon: not ready after {READY_S:.0f} s", f"it may still be starting; see {path}")


def _why(code: int, path: Path, begin: int) -> Failure:
    """The reason that the daemon gave on its last line, with its exit code."""
    with path.open("rb") as log:
        log.seek(begin)
        lines = log.read(1024 * 1024).decode("utf-8", "replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code < 0:
        return Failure(IN_THE_WAY, f"daemon: it was ended by signal {-code} while it started", f"see {path}")
    if not errors:
        return Failure(code if 1 <= code <= 8 else BUG, f"daemon: it ended with {code} while it started", f"see {path}")
    message, _, hint = errors[-1].partition("; ")
    return Failure(code if 1 <= code <= 8 else BUG, message, hint)
