"""Where an upstream may be: what a URL names, and what its name leads to when it is connected to.

- Only addresses that the node's `network` allows; 0.0.0.0, link-local and multicast ones never.
- A key that would cross the net in plain http leaves for private addresses only.
- https verifies certificates. Proxies are not used, cookies not kept, compressed answers not unpacked, DNS answers not remembered.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from daemon.config import Network
from daemon.errors import UsageError

_LOOPBACK = ("127.0.0.0/8", "::1/128")
_PRIVATE = (*_LOOPBACK, "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
_NETWORKS = {name: tuple(ipaddress.ip_network(one) for one in ranges) for name, ranges in (("loopback", _LOOPBACK), ("lan", _PRIVATE))}


def allowed(address: str, network: Network) -> bool:
    """Whether a node in `network` may connect to the IP `address`."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback or network != "public":
        return any(ip in one for one in _NETWORKS["lan" if network == "public" else network])
    return not (ip.is_unspecified or ip.is_link_local or ip.is_multicast or ip.is_reserved)


def open_session(url: str, network: Network, *, with_key: bool) -> aiohttp.ClientSession:
    """A session for the base `url` alone. Raises `UsageError` when it names an address that may not be connected to."""
    parts = urlsplit(url)
    if with_key and parts.scheme == "http" and network == "public":
        network = "lan"
    host = parts.hostname or ""
    try:
        # aiohttp asks no resolver about these.
        fits = allowed(host, network)
    except ValueError:
        fits = True
    if not fits:
        raise UsageError("upstream", _outside(network), "give another URL")
    connector = aiohttp.TCPConnector(resolver=_Resolver(network), force_close=True, use_dns_cache=False)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False)


def _outside(network: Network) -> str:
    why = {
        "loopback": "this node's network is loopback",
        "lan": "only private ones may, on the network lan and with a key over plain http",
        "public": "it is none of a server",
    }
    return f"its address may not be connected to: {why[network]}"


class Outside(OSError):
    """A name that leads nowhere allowed."""


class _Resolver(AbstractResolver):
    def __init__(self, network: Network) -> None:
        self._network = network

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        results: list[ResolveResult] = []
        for kind, _, _, _, address in found:
            text = str(address[0])
            if "%" not in text and allowed(text, self._network):
                flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
                results.append({"hostname": host, "host": text, "port": port, "family": kind, "proto": 0, "flags": flags})
        if not results:
            raise Outside(_outside(self._network))
        return results

    async def close(self) -> None:
        return
