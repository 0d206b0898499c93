"""Unary calls through `ipfshttpclient`, whose last release is of 2021, on a Kubo of today.

Its calls block and its sessions are not thread-safe: each call has a thread and a client of its own. A call cannot be cancelled,
only its thread be left behind, so calls must be short.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import ipfshttpclient
from ipfshttpclient import requests_wrapper

from daemon.ipfs.rpc import gone, refused

T = TypeVar("T")

_UNARY_S = 4.0  # seconds; a stop of the daemon waits for these threads


async def unary(multiaddr: str, call: Callable[[Any], T]) -> T:
    """`call(client)` for the node at `multiaddr`. Raises `Unavailable` when it does not answer, `RpcError` when it refuses."""
    try:
        return await asyncio.to_thread(_run, multiaddr, call)
    except ipfshttpclient.exceptions.ErrorResponse as error:
        raise refused("call", str(error.args[0] if error.args else error)) from error
    except ipfshttpclient.exceptions.Error as error:
        raise gone(error) from error


def _run(multiaddr: str, call: Callable[[Any], T]) -> T:
    # `session=True` skips the version check, which knows no Kubo of this decade.
    client = ipfshttpclient.Client(multiaddr, session=True, timeout=_UNARY_S)
    try:
        for adapter in client._client._session.adapters.values():
            # It still sets this option, of which urllib3 2 warns at every request and which urllib3 3 refuses.
            adapter.poolmanager.connection_pool_kw.pop("strict", None)
            adapter.poolmanager.pool_classes_by_scheme["http+unix"] = _pool_of(multiaddr.removeprefix("/unix"))
        return call(client)
    finally:
        client.close()


def _pool_of(path: str) -> type:
    """Connections to the unix socket at `path`, which goes through requests as the host of a URL and would end in lower case."""

    def connect(connection: Any) -> socket.socket:
        found: socket.socket = requests_wrapper.create_connection((path, None), connection.timeout, family=socket.AF_UNIX)
        return found

    kind = type("UnixConnection", (requests_wrapper.HTTPConnection,), {"_new_conn": connect})
    return type("UnixConnectionPool", (requests_wrapper.HTTPConnectionPool,), {"ConnectionCls": kind})
