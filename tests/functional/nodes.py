"""Real nodes for tests: each is the `swarmctl` command on a data folder of its own, on loopback and free ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
SWARMCTL = (sys.executable, "-c", "from swarmctl.cli import main; main()")
DEADLINE_S = 60.0


class Failed(AssertionError):
    """A command ended with an error. `code` is its exit code, `error` the line on stderr."""

    def __init__(self, words: tuple[str, ...], code: int, stderr: str) -> None:
        super().__init__(f"swarmctl {' '.join(words)} ended with {code}: {stderr}")
        self.code = code
        self.error = next((line for line in reversed(stderr.splitlines()) if line.startswith("error: ")), "")
        self.stderr = stderr


def until(probe: Callable[[], T | None], what: str, deadline_s: float = DEADLINE_S) -> T:
    """The first true value of `probe`; fails the test when it does not come."""
    end = time.monotonic() + deadline_s
    while True:
        if found := probe():
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not happen within {deadline_s:.0f} s")
        time.sleep(0.05)


class Node:
    """One node. `up()` starts its daemon, `run()` is a command with --json, `stop()` ends it and is safe to repeat."""

    def __init__(
        self, home: Path, kubo: Path, environment: Mapping[str, str] | None = None, within: Sequence[str] = ()
    ) -> None:
        """`within`: a command that runs the daemon and every `swarmctl`, in a namespace for instance."""
        self.home = home
        self.within = tuple(within)
        ours = {"SWARMCTL_IPFS_BINARY": str(kubo), "SWARMCTL_HOME": str(home), "SWARMCTL_NETWORK": "loopback"}
        self.environment = {**os.environ, **ours, **(environment or {})}
        self.daemon: subprocess.Popen[str] | None = None
        self.status: dict[str, Any] = {}

    def up(self, *settings: str, within: Sequence[str] = ()) -> Node:
        """`within`: a command that runs the daemon's command alone, in limits of its own."""
        log = (self.home.parent / f"{self.home.name}.log").open("a")
        self.daemon = subprocess.Popen(
            [*self.within, *within, sys.executable, "-m", "daemon.main", "--home", str(self.home), *settings],
            env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
        )  # fmt: skip
        daemon = self.daemon
        until(lambda: (self.home / "daemon.json").exists() or daemon.poll() is not None, "the daemon")
        log.close()
        self.status = self.run("status")
        return self

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """A command that goes on while the test does something else."""
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*self.within, *SWARMCTL, *words], env=self.environment, **{**pipes, **options})

    def run(self, *words: str, timeout: float = DEADLINE_S) -> Any:
        """The document that a command prints with --json. Raises `Failed`."""
        command = self.start(*words, "--json")
        try:
            stdout, stderr = command.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            command.kill()
            raise
        if command.returncode:
            raise Failed(words, command.returncode, stderr)
        return json.loads(stdout)

    def fails(self, *words: str) -> Failed:
        """The failure of a command that must not succeed: one error line, no traceback, an error object on stdout."""
        command = self.start(*words, "--json")
        stdout, stderr = command.communicate(timeout=DEADLINE_S)
        assert command.returncode, f"swarmctl {' '.join(words)} succeeded: {stdout}"
        failed = Failed(words, command.returncode, stderr)
        assert failed.error, stderr
        assert "Traceback" not in stderr
        error = json.loads(stdout)["error"]
        assert set(error) == {"code", "message", "hint"}
        assert error["code"] == failed.code
        return failed

    def join(self, other: Node) -> None:
        self.run("join", other.status["addresses"][0])

    def kill(self) -> None:
        """kill -9, as the power would."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()
        (self.home / "daemon.json").unlink(missing_ok=True)

    def stop(self) -> None:
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.send_signal(signal.SIGTERM)
            self.daemon.wait(timeout=20)

    def blobs(self) -> list[str]:
        return sorted(path.name for path in (self.home / "models").glob("*.gguf"))


def nodes(folder: Path, kubo: Path) -> Iterator[Callable[[str], Node]]:
    """A maker of nodes by name; all of them are stopped at the end, whatever happened."""
    made: dict[str, Node] = {}

    def make(name: str) -> Node:
        made[name] = Node(folder / name, kubo)
        return made[name]

    try:
        yield make
    finally:
        for node in made.values():
            node.stop()
