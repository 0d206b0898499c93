"""What the DHT says in Kubo's RPC: who has a block (`routing/findprovs`, go-libp2p routing.QueryEvent)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from daemon.ipfs.interface import Provider
from daemon.ipfs.rpc import Rpc
from registry import endpoints
from registry.errors import Malformed
from registry.multiaddrs import check_peer_id

MAX_PROVIDERS = 256  # that are asked for; each may have sixteen addresses

_PROVIDER = 4  # routing.QueryEventType


async def find_providers(rpc: Rpc, cid: str, *, own: str, limit: int, deadline_s: float) -> AsyncGenerator[Provider, None]:
    """As `IpfsNode.providers`; `own` is our peer id."""
    limit = min(limit, MAX_PROVIDERS)
    deadline = time.monotonic() + deadline_s
    seen = {own}
    # We may be among those that are found.
    call = rpc.lines("routing/findprovs", cid, timeout_s=None, options={"num-providers": limit + 1})
    async with aclosing(call) as events:
        while len(seen) <= limit:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    event = await anext(events)
            except (TimeoutError, StopAsyncIteration):
                return
            for provider in read_providers(event):
                if provider.peer_id not in seen and len(seen) <= limit:
                    seen.add(provider.peer_id)
                    yield provider


def read_providers(event: dict[str, Any]) -> list[Provider]:
    """The providers that one event names: a stranger's word, so what is malformed is left out, and lists are cut."""
    if event.get("Type") != _PROVIDER or not isinstance(event.get("Responses"), list):
        return []
    found: list[Provider] = []
    for response in event["Responses"][:MAX_PROVIDERS]:
        peer = _text(response, "ID")
        addresses = response.get("Addrs") if isinstance(response, dict) else None
        try:
            check_peer_id(peer)
        except Malformed:
            continue
        listed = addresses if isinstance(addresses, list) else []
        found.append(Provider(peer, _full(listed, peer)))
    return found


def _text(value: Any, key: str) -> str:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""


def _full(addresses: list[Any], peer: str) -> tuple[str, ...]:
    """Kubo gives them without the peer id at the end."""
    found: dict[str, None] = {}
    for address in addresses:
        if not isinstance(address, str) or len(found) == endpoints.MAX_ENDPOINTS:
            continue
        full = address if address.endswith(f"/p2p/{peer}") else f"{address}/p2p/{peer}"
        try:
            found[endpoints.multiaddr(full)] = None
        except Malformed:
            continue
    return tuple(found)
