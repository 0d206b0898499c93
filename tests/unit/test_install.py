"""Finding and fetching Kubo. The official archive cannot be fetched here: a made one, with its digest, stands on a local server."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import tarfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.errors import Unavailable
from daemon.ipfs import install

Serve = Callable[[dict[str, bytes]], str]
ARCHIVE = f"kubo_v9.9.9_{install.target()}.tar.gz"


def script(version: str) -> bytes:
    """A program that answers `version --number` as Kubo does."""
    return f"#!/bin/sh\necho {version}\n".encode()


def packed(*members: tuple[str, bytes | None], link: str = "") -> bytes:
    """A .tar.gz; a member without bytes is a symbolic link to `link`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, link
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    return buffer.getvalue()


def release(archive: bytes, *bases: str) -> install.Release:
    return install.Release("9.9.9", bases, {install.target(): hashlib.sha512(archive).hexdigest()})


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a local server of some files and return its base URL. A file that ends in `!` announces one byte more than it sends."""
    servers: list[ThreadingHTTPServer] = []

    def start(files: dict[str, bytes]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                body = files.get(name, files.get(name + "!"))
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"") + (name not in files and body is not None)))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with a shell, and neither Kubo nor Go."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("sys.prefix", str(tmp_path / "venv"))  # the one that runs this test may have a Kubo
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder


def put(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.43.0\n", (0, 43, 0, True)),
        ("ipfs version 0.43.1", (0, 43, 1, True)),
        ("v1.2.3", (1, 2, 3, True)),
        ("0.44.0-dev", (0, 44, 0, False)),
        ("0.43.0-rc1+abc", (0, 43, 0, False)),
        ("js-ipfs 0.43.0", None),
        ("0.43", None),
        ("0.43.0 0.44.0", None),
        ("", None),
    ],
)
def test_version_text(text: str, version: install.Version | None) -> None:
    assert install.parse_version(text) == version


def test_a_prerelease_of_the_minimum_is_too_old() -> None:
    old, new = install.parse_version("0.43.0-rc1"), install.parse_version("0.44.0-dev")
    assert old is not None and new is not None
    assert old < install.MINIMUM < new


@given(st.text())
def test_any_text_is_a_version_or_none(text: str) -> None:
    version = install.parse_version(text)
    assert version is None or all(part >= 0 for part in version)


def test_path_wins_over_the_environment_and_that_over_the_cache(empty_path: Path, tmp_path: Path) -> None:
    cached = put(tmp_path / "cache", "ipfs", script("0.43.0"))
    assert install.find(cache=cached.parent) == cached
    in_environment = put(tmp_path / "venv" / "bin", "ipfs", script("0.43.0"))
    assert install.find(cache=cached.parent) == in_environment
    on_path = put(empty_path, "ipfs", script("0.44.1"))
    assert install.find(cache=cached.parent) == on_path


@pytest.mark.parametrize("content", [script("0.42.0"), script("0.43.0-rc1"), b"#!/bin/sh\nexit 3\n", b"not a program"])
def test_what_is_too_old_or_does_not_run_is_passed_over(content: bytes, empty_path: Path, tmp_path: Path) -> None:
    put(empty_path, "ipfs", content)
    assert install.find(cache=tmp_path / "cache") is None
    cached = put(tmp_path / "cache", "ipfs", script("0.43.0"))
    assert install.find(cache=cached.parent) == cached


def test_the_configured_one_is_used_or_refused_but_never_replaced(empty_path: Path, tmp_path: Path) -> None:
    put(empty_path, "ipfs", script("0.43.0"))
    mine = put(tmp_path / "mine", "kubo", script("0.45.0"))
    assert install.find(str(mine), tmp_path) == mine
    mine.write_bytes(script("0.20.0"))
    with pytest.raises(Unavailable, match=r"ipfs\.binary"):
        install.find(str(mine), tmp_path)
    with pytest.raises(Unavailable, match=r"ipfs\.binary"):
        install.find(str(tmp_path / "absent"), tmp_path)


def test_the_release_is_installed_and_found(serve: Serve, tmp_path: Path) -> None:
    archive = packed(("kubo/README.md", b"words"), ("kubo/ipfs", script("9.9.9")))
    path = install.install(tmp_path / "cache", release=release(archive, serve({ARCHIVE: archive})), say=lambda _: None)
    assert path == install.find(cache=tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == ["ipfs"]


def test_a_wrong_digest_falls_on_to_the_next_host(serve: Serve, tmp_path: Path) -> None:
    good, evil = packed(("kubo/ipfs", script("9.9.9"))), packed(("kubo/ipfs", b"#!/bin/sh\necho 6.6.6\n"))
    said: list[str] = []
    bases = serve({ARCHIVE: evil}), serve({ARCHIVE: good})
    path = install.install(tmp_path / "cache", release=release(good, *bases), say=said.append)
    assert path.read_bytes() == script("9.9.9")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({ARCHIVE: packed(("kubo/ipfs", script("6.6.6")))}, "wrong sha512"),
        ({ARCHIVE + "!": packed(("kubo/ipfs", script("9.9.9")))[:-9]}, "wrong sha512|IncompleteRead"),
        ({}, "Not Found"),
    ],
    ids=["other bytes", "cut short", "absent"],
)
def test_nothing_is_installed_from_wrong_bytes(files: dict[str, bytes], reason: str, serve: Serve, tmp_path: Path) -> None:
    wanted = release(packed(("kubo/ipfs", script("9.9.9"))), serve(files))
    with pytest.raises(Unavailable, match=f"({reason}).*no Go on PATH"):
        install.install(tmp_path / "cache", release=wanted, say=lambda _: None)
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (packed(("../../evil", script("9.9.9")), ("/tmp/evil", b"x")), "not in the archive"),
        (packed(("kubo/../kubo/ipfs", script("9.9.9"))), "not in the archive"),
        (packed(("kubo/ipfs", None), link="/bin/sh"), "not a file"),
        (b"not an archive", "cannot be read"),
        (packed(("kubo/ipfs", script("9.9.9") * 10_000))[:-40], "cannot be read"),
        (packed(("kubo/ipfs", script("0.1.0"))), "too old"),
    ],
    ids=["traversal", "dotted name", "link", "no archive", "cut archive", "old binary"],
)
def test_a_signed_off_archive_still_cannot_write_where_it_likes(archive: bytes, reason: str, serve: Serve, tmp_path: Path) -> None:
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(Unavailable, match=reason):
        install.install(tmp_path / "cache", release=release(archive, serve({ARCHIVE: archive})), say=lambda _: None)
    assert sorted(path for path in tmp_path.rglob("*")) == sorted([*before, tmp_path / "cache"])


def test_a_host_that_never_answers_does_not_hold_up_one_that_does(tmp_path: Path, serve: Serve) -> None:
    archive = packed(("kubo/ipfs", script("9.9.9")))
    silent = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # listens, and nobody accepts
    try:
        bases = f"http://127.0.0.1:{silent.server_address[1]}", serve({ARCHIVE: archive})
        install.install(tmp_path / "cache", release=release(archive, *bases), say=lambda _: None)
    finally:
        silent.server_close()


def test_hosts_are_asked_in_their_order_and_no_more_than_needed(tmp_path: Path, serve: Serve) -> None:
    archive = packed(("kubo/ipfs", script("9.9.9")))
    with socket.create_server(("127.0.0.1", 0)) as last_resort:
        last_resort.setblocking(False)
        bases = serve({ARCHIVE: archive}), f"http://127.0.0.1:{last_resort.getsockname()[1]}"
        install.install(tmp_path / "cache", release=release(archive, *bases), say=lambda _: None)
        with pytest.raises(BlockingIOError):
            last_resort.accept()
    assert install.KUBO.bases[0].startswith("https://github.com/ipfs/kubo/releases/")


def test_no_host_answers_and_go_builds(empty_path: Path, tmp_path: Path) -> None:
    fake_go = b'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nprintf "#!/bin/sh\\necho 0.43.0\\n" > "$2"\n'
    put(empty_path, "go", fake_go)
    nobody = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    nobody.server_close()
    base = f"http://127.0.0.1:{nobody.server_address[1]}"
    path = install.install(tmp_path / "cache", release=release(b"", base), say=lambda _: None)
    assert path == install.find(cache=tmp_path / "cache")


def test_a_failing_build_says_why(empty_path: Path, tmp_path: Path) -> None:
    put(empty_path, "go", b"#!/bin/sh\necho 'go: errors parsing go.mod' >&2\nexit 1\n")
    with pytest.raises(Unavailable, match=r"none is pinned.*errors parsing go\.mod.*install Go"):
        install.install(tmp_path / "cache", release=install.Release("9.9.9", (), {}), say=lambda _: None)


def test_the_pins_are_whole() -> None:
    assert set(install.KUBO.sha512) == {"linux-amd64", "linux-arm64", "darwin-amd64", "darwin-arm64"}
    assert all(len(bytes.fromhex(digest)) == 64 for digest in install.KUBO.sha512.values())
    assert "github.com/ipfs/kubo v0.43.0" in (install.GOMOD / "go.mod").read_text()
    assert "github.com/ipfs/kubo v0.43.0 h1:" in (install.GOMOD / "go.sum").read_text()
