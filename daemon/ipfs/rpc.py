"""The HTTP client of a Kubo RPC, for what streams: adds, reads, pubsub, tunnels, and removals by the hundred.

What is peculiar to this RPC (kubo docs/reference/kubo/rpc, go-ipfs-cmds http/): everything is a POST; arguments are repeated
`arg` parameters; an early error is a status >= 400 with `{"Message","Code","Type"}`; a late one comes only in a trailer that HTTP
clients drop, so a caller must check that the last word of a reply is there. Reads wait for ever for blocks that nobody has.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from daemon.errors import BackendError, NoSpace, Unavailable, UsageError

UNARY_S = 10.0  # seconds in which a call that needs no other node answers

_CONNECT_S = 5.0
_MAX_REPLY = 64 << 20  # a pin list of a large node has some MiB
_MAX_REASON = 500  # characters
_LINE_BUFFER = 1 << 21  # a pubsub message of 1 MiB in base64, and its frame


class RpcError(Unavailable):
    """Kubo answered, and said no. `why` is its own message."""

    def __init__(self, call: str, why: str) -> None:
        # Of a failed dial Kubo tells every address in a line of its own.
        one_line = " ".join(why.split())[:_MAX_REASON]
        super().__init__(f"IPFS {call}", one_line, "logs/kubo.log may say more")


class Rpc:
    """One Kubo RPC: a multiaddr (`/unix/..`, `/ip4/../tcp/..`, `/dns4/../tcp/..`) or an http(s) URL. Open it with `async with`.

    Every call raises `Unavailable` when the node is gone, `RpcError` when it refuses, and `TimeoutError` when nothing came for
    `timeout_s` seconds (None: wait for ever).
    """

    def __init__(self, address: str) -> None:
        self.multiaddr, self._url, self._socket = _parse(address)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.UnixConnector(self._socket, limit=0) if self._socket else aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, read_bufsize=_LINE_BUFFER)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def stream(
        self, call: str, *args: str, timeout_s: float | None, options: Mapping[str, object] | None = None,
        body: Any = None, headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:  # fmt: skip
        """A reply whose body is still to be read. Leaving the context early ends the call on Kubo's side too."""
        if self._session is None or self._session.closed:
            raise Unavailable("IPFS", "the connection to it is not open")
        with _translated(call):
            async with self._session.post(
                self._url + call, params=_query(args, options), data=body, headers=headers, allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=timeout_s),
            ) as response:  # fmt: skip
                if response.status != 200:
                    raise _refusal(call, response.status, await response.content.read(4096))
                yield response

    async def read(
        self, call: str, *args: str, timeout_s: float | None = UNARY_S, limit: int = _MAX_REPLY,
        options: Mapping[str, object] | None = None, body: Any = None, headers: Mapping[str, str] | None = None,
    ) -> bytes:  # fmt: skip
        """The whole body. Raises `RpcError` when it is larger than `limit` bytes."""
        chunks: list[bytes] = []
        size = 0
        async with self.stream(call, *args, timeout_s=timeout_s, options=options, body=body, headers=headers) as response:
            async for chunk in response.content.iter_any():
                size += len(chunk)
                if size > limit:
                    raise RpcError(call, f"the answer is larger than {limit} bytes")
                chunks.append(chunk)
        return b"".join(chunks)

    async def call(self, call: str, *args: str, timeout_s: float | None = UNARY_S, options: Mapping[str, object] | None = None) -> Any:
        """The JSON value of a unary call; None where Kubo says nothing."""
        body = await self.read(call, *args, timeout_s=timeout_s, options=options)
        return _json(call, body) if body.strip() else None

    async def lines(
        self, call: str, *args: str, timeout_s: float | None, options: Mapping[str, object] | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a reply in NDJSON, as they come."""
        async with self.stream(call, *args, timeout_s=timeout_s, options=options) as response:
            while line := await _line(call, response):
                if line.strip():
                    yield _json(call, line)


def gone(error: Exception) -> Unavailable:
    """The node does not answer at all."""
    return Unavailable("IPFS", f"the node went away or does not answer ({type(error).__name__})", "swarmctl status tells its state")


async def _line(call: str, response: aiohttp.ClientResponse) -> bytes:
    try:
        return await response.content.readline()
    except ValueError as error:
        raise RpcError(call, "a line of the answer is too long") from error


def _query(args: Sequence[str], options: Mapping[str, object] | None) -> list[tuple[str, str]]:
    given = [(name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in (options or {}).items()]
    return [("arg", arg) for arg in args] + given


@contextmanager
def _translated(call: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise
    except (aiohttp.ClientError, OSError) as error:
        raise gone(error) from error


def _refusal(call: str, status: int, body: bytes) -> BackendError:
    try:
        message = str(json.loads(body)["Message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {status}"
    return refused(call, message)


def refused(call: str, message: str) -> BackendError:
    """What Kubo's own error message means for us."""
    if "no space left on device" in message:
        return NoSpace("IPFS", "the disk is full", "free some space and try again")
    return RpcError(call, message)


def _json(call: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RpcError(call, "the answer is not JSON") from error


def _parse(address: str) -> tuple[str, str, str]:
    """(multiaddr, base URL, path of the unix socket or "") of an RPC address. Raises `UsageError`."""
    wrong = UsageError("ipfs.rpc", f"{address!r} is no address of a Kubo RPC", "use /ip4/127.0.0.1/tcp/5001, /unix/path or http://host:port")
    if address.startswith("/unix/"):
        path = "/" + address.removeprefix("/unix/").lstrip("/")
        return "/unix" + path, "http://kubo/api/v0/", path
    if address.startswith("/"):
        return _parse_tcp(address, wrong)
    try:
        url = urlsplit(address)
        host, port = url.hostname, url.port
    except ValueError:
        raise wrong from None
    if url.scheme not in ("http", "https") or not host or url.path.rstrip("/") not in ("", "/api/v0") or url.query or url.username:
        raise wrong
    port = port or (443 if url.scheme == "https" else 80)
    kind = "ip6" if ":" in host else "ip4" if host.replace(".", "").isdigit() else "dns"
    return _both(kind, host, port, url.scheme)


def _parse_tcp(address: str, wrong: UsageError) -> tuple[str, str, str]:
    match address.split("/")[1:]:
        case [("ip4" | "ip6" | "dns" | "dns4" | "dns6") as kind, host, "tcp", port, *rest] if rest in ([], ["http"], ["https"]):
            if host and port.isdigit() and 0 < int(port) < 65536:
                return _both(kind, host, int(port), rest[0] if rest else "http")
    raise wrong


def _both(kind: str, host: str, port: int, scheme: str) -> tuple[str, str, str]:
    bracketed = f"[{host}]" if kind == "ip6" else host
    return f"/{kind}/{host}/tcp/{port}/{scheme}", f"{scheme}://{bracketed}:{port}/api/v0/", ""
