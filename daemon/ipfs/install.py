"""Which Kubo is run, and where it comes from when there is none.

Found, in this order: the one that the settings name, one on PATH that is new enough, one in our virtual environment, the one
that was installed into a cache folder. Installed, in this order:

- the official release, if its archive has the sha512 that is pinned here; only one member is read from it, by its exact name;
- `go build` from the committed `gomod/go.mod` and `gomod/go.sum`, which check the hash of every module.

A source that cannot be reached, stalls or gives other bytes is passed over, with the reason in the final error. The set-up of a
checkout runs this file before any package is installed, so it needs the standard library alone; it blocks, so the daemon calls it
in a thread.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from daemon.errors import SwarmError, Unavailable, VerificationError

Version = tuple[int, int, int, bool]  # major, minor, patch, and True for a release: sorts after its own pre-releases
Say = Callable[[str], None]

MINIMUM: Version = (0, 43, 0, True)  # below it pubsub has CVE-2026-46679
GOMOD = Path(__file__).parent / "gomod"

_CONNECT_S = 6.0  # for all hosts together; a machine without a network should not wait before it builds
_HEAD_START_S = 3.0  # of a host before the next one is asked too
_STALL_S = 20.0
_MAX_ARCHIVE = 256 << 20  # the release is about 50 MB
_MAX_BINARY = 512 << 20
_CHUNK = 1 << 18
_HINT = "put Kubo 0.43 or newer on PATH, or install Go, or connect to the internet, and try again"


@dataclass(frozen=True, slots=True)
class Release:
    """An official release: where its archives lie, and the sha512 (hex) of each by platform (`linux-amd64`)."""

    version: str
    bases: tuple[str, ...]
    sha512: Mapping[str, str]

    def archive(self, target: str) -> str:
        return f"kubo_v{self.version}_{target}.tar.gz"


KUBO = Release(
    version="0.43.1",
    # The distribution host of the project's former maintainers is the last resort: it is down since October 2026.
    bases=("https://github.com/ipfs/kubo/releases/download/v0.43.1", "https://dist.ipfs.tech/kubo/v0.43.1"),
    sha512=MappingProxyType(
        {
            "linux-amd64": "ff53b2428794fc8cca39505d28c15b4cceaef4b90a09284f291f611fcdc8c063"
            "99690575fc89cbd4d85ef71f3652581296c6f2e710386f887c8edf36b6e89d71",
            "linux-arm64": "70f082584651ef78fb5b07448be53bb0adf141aadcb7eea15ffa59bd9ca78fed"
            "46781c2cf5915b3528c591052f97486067fedb0a7a1415abd5bfd44942921501",
            "darwin-amd64": "efe0c1561595fbf7b5bdc3fc651863697c2bf388eed5f8c94c163f60d9575201"
            "808538abba84f652718f015ad1af6e3c01ced1321ddb2082f934ba8952e4a4ab",
            "darwin-arm64": "bc282d781d856736051ce6d216ba47d52bec703f1a54ab5fa20fba26a92e4af3"
            "e8fb131e220cdf01f20205f1effb1a5b7bedbdeff15e8edbbe8e5b01923a7cbb",
        }
    ),
)


def default_cache() -> Path:
    """Where Kubo is installed outside a checkout."""
    import platformdirs  # here, because set-up runs this file before the package is there

    return Path(platformdirs.user_cache_dir("swarmctl")) / "kubo"


def find(configured: str = "", cache: Path | None = None) -> Path | None:
    """The Kubo to run, or None. `configured` is the setting `ipfs.binary`; `cache` is where `install` puts it.

    Raises `Unavailable` when the configured one does not run or is too old: nobody is given another than they asked for.
    """
    if configured:
        path = shutil.which(configured)
        if path is None or not _new_enough(Path(path)):
            why = f"{configured} is no Kubo of version 0.43 or newer that runs here"
            raise Unavailable("ipfs.binary", why, "correct or remove the setting")
        return Path(path)
    on_path = shutil.which("ipfs")
    candidates = [Path(on_path)] if on_path else []
    candidates.append(Path(sys.prefix) / "bin" / "ipfs")  # where the set-up of a checkout puts it
    candidates.append((default_cache() if cache is None else cache) / "ipfs")
    return next((path for path in candidates if _new_enough(path)), None)


def install(cache: Path, *, release: Release = KUBO, gomod: Path = GOMOD, say: Say = print) -> Path:
    """Put a Kubo into `cache` and return its path. Raises `Unavailable` with the reason of every source that failed."""
    cache.mkdir(parents=True, exist_ok=True)
    reasons: list[str] = []
    with tempfile.TemporaryDirectory(dir=cache, prefix=".new-") as folder:
        new = Path(folder) / "ipfs"
        sources: tuple[Callable[[], None], ...] = (lambda: _download(release, new, say), lambda: _build(gomod, new, say))
        for source in sources:
            try:
                source()
                return _put_in_place(new, cache / "ipfs", say)
            except SwarmError as error:
                say(error.message)
                reasons.append(error.message)
                new.unlink(missing_ok=True)
    raise Unavailable("Kubo", "could not be installed: " + "; ".join(reasons), _HINT)


def parse_version(text: str) -> Version | None:
    """`0.43.0`, `0.43.0-rc1`, `ipfs version 0.44.0-dev` -> something that compares; None for anything else."""
    match = re.fullmatch(r"(?:ipfs version )?v?(\d{1,6})\.(\d{1,6})\.(\d{1,6})(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", text.strip())
    if match is None:
        return None
    return int(match[1]), int(match[2]), int(match[3]), match[4] is None


def target() -> str:
    """This machine in the words of Go's downloads, such as `linux-amd64`."""
    machine = platform.machine().lower()
    return platform.system().lower() + "-" + {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _new_enough(binary: Path) -> bool:
    version = _version_of(binary)
    return version is not None and version >= MINIMUM


def _version_of(binary: Path) -> Version | None:
    # Left alone it would want $HOME and load the plugins of the user's one.
    environment = {**os.environ, "IPFS_PATH": f"{binary}.no-repository", "IPFS_TELEMETRY": "off"}
    try:
        command = [str(binary), "version", "--number"]
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return parse_version(done.stdout)


def _put_in_place(new: Path, final: Path, say: Say) -> Path:
    new.chmod(0o755)
    if not _new_enough(new):
        raise Unavailable("Kubo", "what was made does not run here or is too old")
    new.replace(final)
    say(f"Kubo is in {final}")
    return final


# --- the official release


def _download(release: Release, new: Path, say: Say) -> None:
    """The `ipfs` of the release at `new`, from the first host that gives the right bytes."""
    digest = release.sha512.get(target())
    if digest is None:
        raise Unavailable("Kubo release", f"none is pinned for {target()}")
    archive = new.parent / "kubo.tar.gz"
    left = [f"{base}/{release.archive(target())}" for base in release.bases]
    reasons: list[str] = []
    while left:
        url, response = _first_answer(left, reasons)
        left.remove(url)
        try:
            with response:
                say(f"downloading Kubo {release.version} from {_host(url)}")
                _receive(response, archive, digest)
            _extract(archive, new)
            return
        except SwarmError as error:
            reasons.append(f"{_host(url)}: {error.why}")
        except (OSError, HTTPException) as error:
            reasons.append(f"{_host(url)}: {_short(error)}")
    raise Unavailable("Kubo release", "; ".join(reasons))


def _first_answer(urls: list[str], reasons: list[str]) -> tuple[str, HTTPResponse]:
    """The first of `urls` that answers 200, of all within six seconds.

    They are asked in their order: the next one when the one before has failed, or has been silent for three seconds, so that one
    dead host, or no name server, costs seconds. Those that failed are taken out of `urls`.
    """
    answers: queue.SimpleQueue[tuple[str, HTTPResponse | Exception]] = queue.SimpleQueue()
    chosen = threading.Lock()  # held for good by the first answer
    unasked = list(urls)

    def ask(url: str) -> None:
        try:
            response = urllib.request.urlopen(url, timeout=_STALL_S)  # noqa: S310 - the addresses are ours, the bytes are checked
        except (OSError, HTTPException) as error:
            answers.put((url, error))
            return
        if chosen.acquire(blocking=False):
            answers.put((url, response))
        else:
            response.close()

    def ask_next() -> None:
        # A daemon thread, because nothing can interrupt a name server that does not answer.
        threading.Thread(target=ask, args=(unasked.pop(0),), daemon=True).start()

    deadline = time.monotonic() + _CONNECT_S
    ask_next()
    while urls:
        left = max(0.0, deadline - time.monotonic())
        try:
            url, answer = answers.get(timeout=min(left, _HEAD_START_S) if unasked else left)
        except queue.Empty:
            if unasked and left > _HEAD_START_S:
                ask_next()
                continue
            if chosen.acquire(blocking=False):
                reasons.append(f"{', '.join(map(_host, urls))}: no answer within {_CONNECT_S:.0f} s")
                break
            url, answer = answers.get()  # it came at the very last moment
        if not isinstance(answer, Exception):
            return url, answer
        reasons.append(f"{_host(url)}: {_short(answer)}")
        urls.remove(url)
        if unasked:
            ask_next()
    raise Unavailable("Kubo release", "; ".join(reasons))


def _receive(response: HTTPResponse, archive: Path, digest: str) -> None:
    received, hasher = 0, hashlib.sha512()
    with archive.open("wb") as file:
        while chunk := response.read(_CHUNK):
            received += len(chunk)
            if received > _MAX_ARCHIVE:
                raise VerificationError("Kubo release", f"more than {_MAX_ARCHIVE >> 20} MiB")
            hasher.update(chunk)
            file.write(chunk)
    if hasher.hexdigest() != digest:
        raise VerificationError("Kubo release", f"the {received} bytes received have the wrong sha512")


def _extract(archive: Path, new: Path) -> None:
    """Only the regular file `kubo/ipfs` is read: no name in the archive decides where anything is written."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.name == "kubo/ipfs":
                    break
            else:
                raise VerificationError("Kubo release", "kubo/ipfs is not in the archive")
            source = tar.extractfile(member) if member.isreg() and member.size <= _MAX_BINARY else None
            if source is None:
                raise VerificationError("Kubo release", "kubo/ipfs is not a file of a sane size")
            with source, new.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
    except (tarfile.TarError, EOFError) as error:
        raise VerificationError("Kubo release", f"the archive cannot be read: {error}") from error


# --- built from source


def _build(gomod: Path, new: Path, say: Say) -> None:
    """`go build` of the pinned modules. An older Go fetches the toolchain that go.mod names."""
    go = shutil.which("go")
    if go is None:
        raise Unavailable("building Kubo", "there is no Go on PATH")
    flags = ["-mod=readonly", "-trimpath", "-tags=nofuse", "-ldflags=-s -w", "-v"]
    command = [go, "build", *flags, "-o", str(new), "github.com/ipfs/kubo/cmd/ipfs"]
    environment = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "", "GOTOOLCHAIN": "auto"}
    say("building Kubo from source: about two minutes, and a minute more for its modules the first time")
    tail: list[str] = []
    fetched = compiled = 0
    told = time.monotonic()
    with subprocess.Popen(
        command, cwd=gomod, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as build:
        assert build.stdout is not None
        try:
            for line in build.stdout:
                tail = [*tail[-4:], line.strip()]
                fetched += line.startswith("go: downloading ")
                compiled += not line.startswith("go: ")
                if time.monotonic() - told >= 5:
                    told = time.monotonic()
                    say(f"building Kubo: {fetched} modules fetched, {compiled} packages compiled")
        except BaseException:  # whatever ends us, Ctrl-C included, ends the compiler
            build.kill()
            raise
    if build.returncode != 0:
        raise Unavailable("building Kubo", f"go build failed: {' | '.join(tail)}")


def _host(url: str) -> str:
    return urlsplit(url).hostname or url


def _short(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error or type(error).__name__)


def main(arguments: list[str] | None = None) -> int:
    """`python -m daemon.ipfs.install [--cache DIR]`: find or install, with the time on every line. Exit code 7: could not."""
    parser = argparse.ArgumentParser(prog="python -m daemon.ipfs.install", description="Find Kubo, or fetch or build it.")
    parser.add_argument("--cache", type=Path, help="where to put it (default: the user's cache folder)")
    cache: Path = parser.parse_args(arguments).cache or default_cache()
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)

    try:
        found = find(cache=cache)
        if found is None:
            install(cache, say=say)
        else:
            say(f"Kubo is in {found}")
    except (SwarmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, SwarmError) else Unavailable.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
