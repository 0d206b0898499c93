"""Network namespaces, each held by one process; commands enter them with `nsenter`.

There are no names to clash and no files to clean up: a namespace lives as long as a process is in it. Its holder reads a pipe of
ours and ends with it, so even a test run that is killed lets go. What such a run leaves running inside (its nodes) is found by a
mark in its environment and killed by the next one.

As root the namespaces are made directly. Without root the first holder makes a user namespace, in which the same commands are
allowed (user_namespaces(7)), and everything else happens in there.
"""

from __future__ import annotations

import os
import subprocess
import time
from functools import cache

import psutil

MARK = "SMALL_INTERNET_OF"  # in the environment of all that runs for a world: "pid birth" of the owner
DEADLINE_S = 20.0


class Refused(RuntimeError):
    """A command that builds the network failed; the text has the command and what it said."""


# An ordinary user's PATH often lacks the folders of ip and iptables, which work for that user in a user namespace.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


@cache
def mark() -> dict[str, str]:
    """The mark of this process, as an environment variable."""
    return {MARK: _life(psutil.Process())}


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": PATH, **mark()}


def remove_leftovers() -> None:
    """Kill what runs of this user that died without cleaning up have left in their namespaces."""
    for process in psutil.process_iter(["environ"]):
        owner = (process.info["environ"] or {}).get(MARK)
        if owner is not None and not _lives(owner):
            _kill(process)


class Namespace:
    """One network namespace, its loopback still down. `close()` kills whatever runs in it; repeating that is safe."""

    def __init__(self, first: Namespace | None = None) -> None:
        """`first`: the namespace that made the user namespace, where there is one.

        Raises `Refused` when the kernel makes none, `FileNotFoundError` where there is no unshare(1) or nsenter(1).
        """
        rootless = os.geteuid() != 0
        as_root = ("--map-root-user",) if rootless and first is None else ()
        # Joining its user namespace is all that is needed of the first one: the network is a new one.
        join = ("nsenter", *_user_of(first._holder.pid), "--") if rootless and first is not None else ()
        self._holder = subprocess.Popen(
            [*join, "unshare", *as_root, "--net", "--", "sh", "-c", "echo held; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(),
        )  # fmt: skip
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "held\n":
            _, said = self._holder.communicate()
            raise Refused(" ".join(said.split()) or "unshare --net failed")
        self.pid = self._holder.pid
        user = _user_of(self.pid) if rootless else ()
        self.within = ("nsenter", *user, f"--net=/proc/{self.pid}/ns/net", "--")
        self._net = os.readlink(f"/proc/{self.pid}/ns/net")
        self._started: list[subprocess.Popen[str]] = []

    def do(self, *command: str, given: str = "") -> str:
        """What a command prints that runs in here. Raises `Refused`."""
        done = subprocess.run(
            [*self.within, *command], input=given, capture_output=True, text=True, timeout=DEADLINE_S,
            env=_environment(),
        )
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            raise Refused(f"{' '.join(command)}: {said} {given}".strip())
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command that goes on in here with its output in a pipe; ended by `close`."""
        child = subprocess.Popen(
            [*self.within, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=_environment()
        )  # fmt: skip
        self._started.append(child)
        return child

    def ip(self, *lines: str) -> None:
        """Commands of ip(8), without the word `ip`."""
        self.do("ip", "-batch", "-", given="".join(f"{line}\n" for line in lines))

    def sysctl(self, name: str, value: str) -> None:
        """One setting below /proc/sys/net; `name` with slashes."""
        self.do("sh", "-c", f"echo {value} > /proc/sys/net/{name}")

    def rules(self, text: str) -> None:
        """Rules in the form of iptables-restore(8), put to those that are there."""
        self.do("iptables-restore", "--noflush", given=f"{text}\n")

    def processes(self) -> list[psutil.Process]:
        """All that runs in here, the holder included."""
        return [process for process in psutil.process_iter() if _net_of(process) == self._net]

    def close(self) -> None:
        end = time.monotonic() + DEADLINE_S
        # A process may start another while the list is read, so it is read until it is empty.
        while running := self.processes():
            for process in running:
                _kill(process)
            if time.monotonic() > end:
                raise Refused(f"these do not end: {running}")
            time.sleep(0.01)
        for child in (*self._started, self._holder):
            with child:  # reaps it and closes its pipes
                pass


def _user_of(pid: int) -> tuple[str, ...]:
    return (f"--user=/proc/{pid}/ns/user", "--preserve-credentials")


def _net_of(process: psutil.Process) -> str:
    """The kernel's name of its network namespace; empty for one that is gone or another user's."""
    try:
        return os.readlink(f"/proc/{process.pid}/ns/net")
    except OSError:
        return ""


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _life(process: psutil.Process) -> str:
    """A process apart from a later one with the same number."""
    return f"{process.pid} {process.create_time():.2f}"


def _lives(life: str) -> bool:
    """Nobody may have reaped the dead one: then its number and birth are still there."""
    try:
        process = psutil.Process(int(life.split()[0]))
        return process.status() != psutil.STATUS_ZOMBIE and _life(process) == life
    except psutil.NoSuchProcess:
        return False
