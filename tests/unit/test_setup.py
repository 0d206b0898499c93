"""What set-up decides. The AMX fault itself cannot be made on a machine that has no AMX: here a stand-in dies by its signals."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent
CI = ROOT / ".ci"


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("swarmctl_setup", CI / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("returncode", "machine", "without_amx", "decision"),
    [
        (0, "x86_64", False, "done"),
        (0, "aarch64", True, "done"),
        (-signal.SIGSEGV, "x86_64", False, "rebuild"),
        (-signal.SIGILL, "AMD64", False, "rebuild"),
        (-signal.SIGSEGV, "x86_64", True, "fail"),  # once is enough: it is not AMX then
        (-signal.SIGILL, "arm64", False, "fail"),  # the flags mean nothing there
        (-signal.SIGKILL, "x86_64", False, "fail"),  # out of memory, most likely
        (1, "x86_64", False, "fail"),
    ],
)
def test_what_a_proof_leads_to(setup: ModuleType, returncode: int, machine: str, without_amx: bool, decision: str) -> None:
    assert setup.after_proof(returncode, machine, without_amx) == decision


def dies(by: int) -> int:
    return subprocess.run([sys.executable, "-c", f"import os; os.kill(os.getpid(), {by})"]).returncode


@pytest.mark.parametrize("by", [signal.SIGSEGV, signal.SIGILL])
def test_a_prover_that_dies_gets_one_rebuild_and_must_pass_then(setup: ModuleType, by: int) -> None:
    steps: list[str] = []

    def prove() -> int:
        steps.append("prove")
        return dies(by) if "rebuild" not in steps else 0

    setup.prove_or_rebuild(prove, lambda: steps.append("rebuild"), "x86_64")
    assert steps == ["prove", "rebuild", "prove"]

    steps.clear()
    with pytest.raises(setup.Failed):
        setup.prove_or_rebuild(lambda: dies(by), lambda: steps.append("rebuild"), "x86_64")
    assert steps == ["rebuild"]


def test_a_wrong_answer_is_no_reason_to_rebuild(setup: ModuleType) -> None:
    with pytest.raises(setup.Failed):
        setup.prove_or_rebuild(lambda: 1, lambda: pytest.fail("rebuilt"), "x86_64")


AVX_512 = "flags : fpu avx2 avx512vl"


def test_the_rebuild_switches_every_amx_flag_off_and_has_a_wheel_cache_of_its_own(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple[str, ...], dict[str, str]]] = []
    monkeypatch.setattr(setup, "pip_install", lambda _lane, *args, progress="", **env: calls.append((args, env)))
    monkeypatch.setattr(setup, "pip_cache", lambda: tmp_path)
    monkeypatch.setattr(setup, "openblas", lambda: tmp_path / "scipy_openblas32")
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    ends = iter([-signal.SIGSEGV, 0])

    class Lane:
        def say(self, text: str) -> None: ...

        def run(self, command: list[str]) -> int:
            return next(ends)

    there = threading.Event()
    there.set()
    setup.build_llama(Lane(), Path("lock"), there, AVX_512)
    options = [shlex.split(environment["CMAKE_ARGS"]) for _, environment in calls]
    assert all(found[-1] == "-DGGML_CUDA=ON" and "-DGGML_BLAS=ON" in found for found in options)
    for flag in ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"):
        assert [sum(flag in option.split() for option in found) for found in options] == [0, 2]
    caches = [arguments[arguments.index("--cache-dir") + 1] for arguments, _ in calls]
    assert caches[0] != caches[1] and all(Path(cache).parent == tmp_path for cache in caches)
    assert all("--force-reinstall" in arguments for arguments, _ in calls)


def test_llama_cpp_is_built_with_openblas_where_that_is_faster(setup: ModuleType) -> None:
    openblas = Path("/an environment/scipy_openblas32")
    assert setup.llama_options(openblas, "", amx=True) == []  # its own defaults
    assert setup.llama_options(openblas, "flags : avx2", amx=False) == setup.compiled_with(*setup.NO_AMX)
    options = setup.llama_options(openblas, AVX_512, amx=True)
    assert "-DBLAS_LIBRARIES=/an environment/scipy_openblas32/lib/libscipy_openblas.so" in options
    assert shlex.split(shlex.join(options)) == options


def test_locks_are_pinned_hashed_and_name_no_index(setup: ModuleType) -> None:
    for name in ("requirements.txt", "tools.txt", "model.txt", "bench.txt", "gemma.txt"):
        text = (CI / name).read_text()
        requirements = re.findall(r"^([a-z0-9._-]+)(==\S+)?.*?\n((?:    --hash.*\n)*)", text, re.MULTILINE)
        assert requirements and all(version and hashes for _, version, hashes in requirements)
        assert not re.search(r"https?:|^-", text, re.MULTILINE)


def test_the_lock_splits_without_loss(setup: ModuleType) -> None:
    lock = (CI / "requirements.txt").read_text()
    others, llama = setup.split_lock(lock, setup.LLAMA)
    assert llama.startswith("llama-cpp-python==") and "--hash=" in llama
    assert sorted((others + llama).splitlines()) == sorted(lock.splitlines())
    with pytest.raises(setup.Failed):
        setup.split_lock(lock, "absent")


def test_network_tools_are_fetched_where_that_is_possible_and_needed(setup: ModuleType) -> None:
    def with_these(*names: str) -> Callable[[str], bool]:
        return names.__contains__

    assert setup.tools_to_get(with_these("apt-get"), root=True) == ["iproute2", "iptables"]
    assert setup.tools_to_get(with_these("apt-get", "ip"), root=True) == ["iptables"]
    assert setup.tools_to_get(with_these("apt-get", "ip", "iptables"), root=True) == []
    assert setup.tools_to_get(with_these("apt-get"), root=False) == []
    assert setup.tools_to_get(with_these("dnf"), root=True) == []


POLITE = "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1] + '.asked', 'w').close(), sys.exit()))"
STUBBORN = "signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1] + '.asked', 'w').close())"
WORK = "; open(sys.argv[1], 'w').write(str(os.getpid()))\nwhile True: time.sleep(1)"


@pytest.mark.parametrize("manner", [POLITE, STUBBORN], ids=["polite", "stubborn"])
def test_a_failing_lane_ends_the_commands_of_the_others(
    setup: ModuleType, manner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "CACHE", tmp_path)
    screen, children = setup.Screen(), setup.Children()
    pid_file = tmp_path / "pid"
    ended = threading.Event()

    def long() -> None:
        lane = setup.Lane("long", screen, children)
        try:
            lane.must([sys.executable, "-c", f"import os, signal, sys, time; {manner}{WORK}", str(pid_file)])
        finally:
            ended.set()

    def failing() -> None:
        deadline = time.monotonic() + 30
        while not (pid_file.is_file() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        raise setup.Failed("the disk is full")

    with pytest.raises(setup.Failed, match="the disk is full"):
        setup.side_by_side({"long": long, "failing": failing}, screen, children)
    assert ended.wait(30)
    assert (tmp_path / "pid.asked").exists(), "asked before it was killed, so that ninja can end its compilers"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_a_step_is_done_once_until_what_it_depends_on_changes(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "VENV", tmp_path)

    def needed(wanted: str) -> bool:
        with setup.once("step", wanted) as answer:
            return bool(answer)

    assert [needed("a"), needed("a"), needed("b"), needed("b")] == [True, False, True, False]
    with pytest.raises(OSError), setup.once("step", "c"):
        raise OSError
    assert needed("b"), "a step that failed has no stamp"
