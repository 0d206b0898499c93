"""The life of a real daemon: who starts it, how it ends in the middle of its work, and who may talk to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.functional.asking import ENDLESS, ended, token
from tests.functional.nodes import Node, nodes, until
from tests.unit.gguf_files import tiny_gguf

SIZE = 48 << 20
SLOW = "4MiB"


@pytest.fixture
def node(tmp_path: Path, kubo_binary: Path) -> Iterator[Callable[[str], Node]]:
    yield from nodes(tmp_path, kubo_binary)


def told(node: Node, *words: str) -> tuple[Any, list[Any]]:
    """The document of a command, and its notes on stderr."""
    stdout, stderr = (command := node.start(*words, "--json")).communicate(timeout=60)
    assert command.returncode == 0, stderr
    return json.loads(stdout), [json.loads(line) for line in stderr.splitlines()]


def test_any_command_starts_the_daemon_and_says_so(node: Callable[[str], Node]) -> None:
    a = node("a")
    assert a.fails("status").code == 7  # which only looks
    try:
        assert told(a, "ls") == ([], [{"note": "starting the daemon"}])
        first, notes = told(a, "up")
        assert (first["state"], first["ipfs"]["state"], first["bittorrent"]["state"], notes) == ("ready", "ready", "ready", [])
        assert told(a, "up")[0]["pid"] == first["pid"]
        everything = [psutil.Process(first["pid"]), *psutil.Process(first["pid"]).children(recursive=True)]
        assert first["ipfs"]["pid"] in [process.pid for process in everything]
    finally:
        gone = a.run("down")
    assert gone == {"state": "stopped", "pid": first["pid"]}
    assert all(ended(process) for process in everything)
    assert not (a.home / "daemon.json").exists()
    assert a.run("down") == {"state": "stopped", "pid": None}


@pytest.mark.parametrize("how", ["down", "ctrl-c"])
def test_it_ends_in_the_middle_of_an_answer_and_of_a_transfer(
    node: Callable[[str], Node], tmp_path: Path, model_file: Path, how: str
) -> None:
    a, b = node("a").up(), node("b")
    other = a.run("publish", str(tiny_gguf(tmp_path / "tiny.gguf", SIZE)))["code"]
    # In a session of its own, as a shell would run it in a terminal.
    daemon = b.start(
        "daemon", "--transfer-download-rate", SLOW, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until((b.home / "daemon.json").exists, "the daemon")
        b.status = b.run("status")
        b.join(a)
        own = b.run("publish", str(model_file))["code"]
        b.run("serve", own, "--slots", "1", "--context", "2048")
        asking, pull = b.start("ask", ENDLESS, own, "--temperature", "0"), b.start("pull", other, "--json")
        assert asking.stdout is not None and asking.stdout.read(1)
        assert pull.stderr is not None
        received = (json.loads(line).get("received", 0) for line in pull.stderr)
        assert 0 < next(bytes_ for bytes_ in received if bytes_) < SIZE
        children = psutil.Process(daemon.pid).children(recursive=True)
        assert len(children) == 2  # Kubo and the worker
        if how == "down":
            assert b.run("down") == {"state": "stopped", "pid": daemon.pid}
        else:
            os.killpg(daemon.pid, signal.SIGINT)
        assert daemon.wait(20) == 0
    finally:
        daemon.kill()
        daemon.wait()
    assert all(ended(child) for child in children)
    assert not (b.home / "daemon.json").exists()
    for command in (asking, pull):
        _, stderr = command.communicate(timeout=60)
        assert command.returncode in (5, 7), stderr
        assert stderr.splitlines()[-1].startswith("error: ")
    assert [path.stat().st_size for path in (b.home / "models").glob("*.gguf")] == [model_file.stat().st_size]


def test_who_may_talk_to_the_api(node: Callable[[str], Node]) -> None:
    a = node("a").up("--ipfs-enabled", "false")
    port = urlsplit(a.status["api"]).port
    assert port is not None
    right = {"Host": f"127.0.0.1:{port}", "Authorization": f"Bearer {token(a)}"}

    def status(path: str, **changed: str | None) -> int:
        headers = {**right, **changed}
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items() if value is not None), "Connection: close"]
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        assert (b'"node"' in answer) == answer.startswith(b"HTTP/1.1 200 ") or path == "/healthz"
        return int(answer.split()[1])

    assert status("/api/status") == 200
    assert status("/api/status", Host=f"localhost:{port}", Origin=f"http://localhost:{port}") == 200
    assert status("/healthz", Authorization=None) == 200
    for wrong in (None, "Bearer wrong", "Bearer ", f"Basic {token(a)}", token(a)):
        assert status("/api/status", Authorization=wrong) == 401
    for wrong in (f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"127.0.0.1.evil.example:{port}"):
        assert status("/api/status", Host=wrong) == 421
    assert status("/api/status", Host=None) in (400, 421)
    for wrong in ("http://evil.example", "null", "http://127.0.0.1", f"https://127.0.0.1:{port}"):
        assert status("/api/status", Origin=wrong) == 403
    assert status("/api/v0/id") == 404
    assert (a.home / "token").stat().st_mode & 0o777 == (a.home / "node.key").stat().st_mode & 0o777 == 0o600
    for connection in psutil.Process(a.status["pid"]).net_connections("inet"):
        assert connection.laddr.ip == "127.0.0.1", connection
