"""What tests of answers share: quick calls of a node's API, event streams, and a look at its processes."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.functional.nodes import Node

ENDLESS = "Write a very long story about a dragon."  # with temperature 0 some 1500 tokens, which take most of a minute


def token(node: Node) -> str:
    return (node.home / "token").read_text().strip()


@contextmanager
def request(node: Node, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
    """A response whose body is still to be read; leaving the context drops the connection."""
    url = urlsplit(node.status["api"])
    connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=60)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Authorization": f"Bearer {token(node)}", "Content-Type": "application/json"})
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def call(node: Node, method: str, path: str, body: Any = None) -> Any:
    """The JSON of a response; a status that is no success fails the test."""
    with request(node, method, path, body) as response:
        text = response.read()
        assert response.status < 300, text
        return json.loads(text)


def completion(code: str, *, stream: bool = True, **more: Any) -> dict[str, Any]:
    """The body of an answer that goes on for a minute unless `more` limits it."""
    return {"model": code, "messages": [{"role": "user", "content": ENDLESS}], "temperature": 0, "stream": stream, **more}


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The events of a stream as they come: objects, and "[DONE]" as text."""
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: "):
            text = line.removeprefix(b"data: ").decode().strip()
            yield text if text == "[DONE]" else json.loads(text)


def listed(node: Node, code: str) -> dict[str, Any] | None:
    """What the node says of a model of the swarm."""
    found: list[dict[str, Any]] = call(node, "GET", "/api/swarm/models")
    return next((model for model in found if model["code"] == code), None)


def is_served(node: Node, code: str) -> bool:
    found = listed(node, code)
    return found is not None and found["serving"]


def free_slots(node: Node) -> int:
    with request(node, "GET", "/metrics") as response:
        lines = response.read().decode().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("swarmctl_free_slots "))


def workers(node: Node) -> list[psutil.Process]:
    """The worker processes of a node, one for each model that it serves."""
    return [child for child in psutil.Process(node.status["pid"]).children(recursive=True) if "daemon.engine.worker" in command(child)]


def command(process: psutil.Process) -> list[str]:
    """The words a process was started with; none when it has just ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie, too
        return []


def ended(process: psutil.Process) -> bool:
    """Whether a process runs no more; whoever adopted it may not have collected it yet."""
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
