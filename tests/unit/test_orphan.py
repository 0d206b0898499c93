"""No child outlives its parent, however that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from daemon import orphan

# Starts a sleeping child through orphan.py, prints its pid and waits.
PARENT = """
import subprocess, sys
from daemon import orphan
sleeper = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
child = subprocess.Popen(orphan.command(sleeper), stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def is_gone(pid: int) -> bool:
    """Within a second; a zombie that nobody has reaped is gone too."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_child_dies_with_a_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.kill()
        parent.wait()
        assert is_gone(child)


def test_child_whose_parent_died_before_it_asked_the_kernel_does_not_run(tmp_path: Path) -> None:
    # A pid that is not its parent is what such a child sees.
    stranger = str(os.getppid())
    ran = tmp_path / "ran"
    argv = [sys.executable, "-I", "-S", orphan.__file__, stranger, "/bin/sh", "-c", f"echo > {ran}"]
    assert subprocess.run(argv, timeout=10).returncode == -signal.SIGKILL
    assert not ran.exists()


def test_exit_code_and_signals_are_those_of_the_command() -> None:
    assert subprocess.run(orphan.command(["/bin/sh", "-c", "exit 7"]), timeout=10).returncode == 7
    with subprocess.Popen(orphan.command(["/bin/sh", "-c", "echo up; exec sleep 60"]), stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        child.terminate()
        assert child.wait(10) != 0


def test_command_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    found = subprocess.run(orphan.command([str(tmp_path / "none")]), capture_output=True, text=True, timeout=10)
    assert found.returncode == 127
    assert found.stderr == f"{tmp_path / 'none'}: No such file or directory\n"


# The other half of orphan.py, run here by pretending to be elsewhere.
WATCHER = """
import sys
sys.platform = "darwin"
from daemon import orphan
sys.exit(orphan.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_watcher_passes_the_exit_on(script: str, code: int) -> None:
    argv = [sys.executable, "-c", WATCHER, str(os.getpid()), "/bin/sh", "-c", script]
    assert subprocess.run(argv, timeout=10).returncode == code


def test_watcher_kills_the_command_of_a_parent_that_is_gone() -> None:
    argv = [sys.executable, "-c", WATCHER, str(os.getppid()), "/bin/sleep", "60"]
    assert subprocess.run(argv, timeout=10).returncode == 137


def test_watcher_passes_a_stop_on() -> None:
    argv = [sys.executable, "-c", WATCHER, str(os.getpid()), "/bin/sh", "-c", "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as watcher:
        assert watcher.stdout is not None and watcher.stdout.readline() == b"up\n"
        watcher.terminate()
        assert watcher.wait(10) == 9
