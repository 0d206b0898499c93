"""A real node that serves a real model, and the bytes that no proper client would send it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.functional.asking import free_slots, token
from tests.functional.nodes import Node, nodes, until
from tests.functional.test_bad_inputs import no_tracebacks

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello!"}]
SLOTS = 2


@dataclass(frozen=True)
class Server:
    """A node that serves a model of code `code`."""

    node: Node
    code: str

    def serve(self) -> None:
        """Serving what is served already changes nothing."""
        self.node.run("serve", self.code, "--slots", str(SLOTS), "--context", "8192")
        until(lambda: free_slots(self.node) == SLOTS, "free slots")

    def answers(self) -> None:
        """The node lives and its model answers."""
        status, answer = self.post(CHAT, json.dumps({"model": self.code, "messages": HELLO, "max_tokens": 2}).encode())
        assert status == 200, answer

    def head(self, path: str, *lines: str, method: str = "POST") -> bytes:
        """A request's header, with its last line. It has a token and says that it is JSON."""
        host = urlsplit(self.node.status["api"]).netloc
        own = (f"Host: {host}", f"Authorization: Bearer {token(self.node)}", "Content-Type: application/json")
        return "\r\n".join([f"{method} {path} HTTP/1.1", *own, *lines, "", ""]).encode()

    def connect(self, receive: int | None = None) -> socket.socket:
        """A connection; `receive` are the bytes that its own side buffers, if not as many as usual."""
        url = urlsplit(self.node.status["api"])
        connection = socket.socket()
        if receive is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        connection.settimeout(60)
        connection.connect((url.hostname, url.port))
        return connection

    def raw(self, data: bytes) -> tuple[int, Any]:
        """The status and the JSON that come back for `data`, of which the node may not have read all by then."""
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):  # it has answered and closed
                connection.sendall(data)
            return answer(connection)

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        return self.raw(self.head(path, f"Content-Length: {len(body)}") + body)


def answer(connection: socket.socket) -> tuple[int, Any]:
    with closing(http.client.HTTPResponse(connection)) as response:
        response.begin()
        return response.status, json.loads(response.read())


@contextmanager
def serving(folder: Path, kubo: Path, model: Path) -> Iterator[Server]:
    """The node of a module's tests; `serve()` it before each. Nothing that is sent to it may be a bug of ours."""
    with contextmanager(nodes)(folder, kubo) as node:
        a = node("a").up("--ipfs-enabled", "false")
        yield Server(a, a.run("publish", str(model))["code"])
    no_tracebacks(folder)
