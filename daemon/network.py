"""Where others reach this node, by the network it lives in."""

from __future__ import annotations

import socket

from daemon.config import Network

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def bittorrent_addresses(network: Network, port: int) -> tuple[str, ...]:
    """host:port for peers. In the public network it is empty: there BitTorrent finds peers itself, and we do not know our address."""
    host = {"loopback": "127.0.0.1", "lan": _private_address(), "public": None}[network]
    return (f"{host}:{port}",) if host is not None and port else ()


def peer_api_urls(network: Network, host: str, port: int) -> tuple[str, ...]:
    """Base URLs at which other nodes reach the peer API directly; empty when it listens where they cannot come."""
    if network == "loopback":
        return (f"http://127.0.0.1:{port}",)
    if host in _LOOPBACK:
        return ()
    shown = _private_address() if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not listened on
    return (f"http://{f'[{shown}]' if ':' in shown else shown}:{port}",) if shown is not None else ()


def _private_address() -> str | None:
    """The address that this machine has towards others. Connecting a UDP socket sends nothing; it only asks the routing table."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])
