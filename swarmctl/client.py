"""The only HTTP client of the daemon. Plain `http.client`: Ctrl-C closes the connection, and the daemon notices."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Generator, Mapping
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from swarmctl.failure import IN_THE_WAY, USAGE, Failure

CONNECT_S = 5.0
SILENCE_S = 60.0  # the daemon says something at least every 10 s while it streams
LONG_S = 24 * 3600.0  # hashing every model, or loading a large one
MAX_BODY = 64 * 1024 * 1024  # bytes
MAX_LINE = 8 * 1024 * 1024  # bytes of one event


class Client:
    """Calls the daemon at `url` with its bearer token. Everything raises `Failure`, with the daemon's own code and words if it has any."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self.token = token
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Failure(USAGE, f"SWARMCTL_API: not a URL of a daemon: {url!a}", "use http://127.0.0.1:8787")
        self._parts = parts

    def get(self, path: str, query: Mapping[str, str] | None = None, *, timeout: float = SILENCE_S) -> Any:
        return self._whole("GET", path, query, None, timeout)

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = SILENCE_S) -> Any:
        return self._whole("POST", path, None, body, timeout)

    def delete(self, path: str, query: Mapping[str, str] | None = None, *, timeout: float = SILENCE_S) -> Any:
        return self._whole("DELETE", path, query, None, timeout)

    def events(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Generator[dict[str, Any], None, None]:
        """The events of a stream as they come. Closing it closes the connection."""
        connection, response = self._open(method, path, None, body, SILENCE_S, "text/event-stream")
        try:
            while line := _reading(response.readline, MAX_LINE):
                if line.startswith(b"data: "):
                    event = _parsed(line[6:])
                    if not isinstance(event, dict):
                        raise Failure(IN_THE_WAY, "daemon: sent an event that is no object", "is something else listening there?")
                    yield event
        finally:
            connection.close()

    def _whole(self, method: str, path: str, query: Mapping[str, str] | None, body: Mapping[str, Any] | None, timeout: float) -> Any:
        connection, response = self._open(method, path, query, body, timeout, "application/json")
        try:
            return _parsed(_reading(response.read, MAX_BODY))
        finally:
            connection.close()

    def _open(
        self, method: str, path: str, query: Mapping[str, str] | None, body: Mapping[str, Any] | None, timeout: float, accept: str
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=CONNECT_S)
        headers = {"Accept": accept, "Authorization": f"Bearer {self.token}"}
        data = None if body is None else json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        target = self._parts.path + quote(path) + ("?" + urlencode(query) if query else "")
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            connection.request(method, target, data, headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise _refused(response.status, _reading(response.read, MAX_BODY))
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Failure(IN_THE_WAY, f"daemon: cannot be reached at {self.url}: {why}", "swarmctl status, or swarmctl up") from error
        except BaseException:
            connection.close()
            raise
        return connection, response


def healthy(url: str, *, timeout: float = 2.0) -> bool:
    """Whether a daemon answers there."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _reading(read: Any, limit: int) -> bytes:
    try:
        data: bytes = read(limit + 1)
    except TimeoutError as error:
        raise Failure(IN_THE_WAY, "daemon: it says nothing any more", "see logs/daemon.log in the data folder") from error
    except (OSError, http.client.HTTPException) as error:
        raise Failure(IN_THE_WAY, "daemon: it went away in the middle of its answer", "swarmctl status, or swarmctl up") from error
    if len(data) > limit:
        raise Failure(IN_THE_WAY, f"daemon: its answer has more than {limit} bytes", "is something else listening there?")
    return data


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise Failure(IN_THE_WAY, "daemon: its answer is not JSON", "is something else listening there?") from error


def _refused(status: int, data: bytes) -> Failure:
    document = _parsed(data)
    if status == 401:
        return Failure(USAGE, "token: the daemon does not accept it", "check SWARMCTL_TOKEN, or --home")
    return Failure.from_json(document.get("error") if isinstance(document, dict) else None)


def reachable(host: str, port: int, *, timeout: float = 1.0) -> bool:
    """Whether something takes TCP connections there."""
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True
    except OSError:
        return False
