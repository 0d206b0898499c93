"""Getting a connection to a peer: every known way at once, the first that works wins."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from daemon.errors import SwarmError, Unserved
from daemon.ipfs.interface import IpfsNode

T = TypeVar("T")

CONNECT_S = 5.0  # for one way to a peer
_ADDRESSES_TRIED = 8


async def first(ways: Iterable[Coroutine[Any, Any, T]]) -> T:
    """What the first way to succeed returns; the others are cancelled.

    When all fail with a `SwarmError`: raises the only one, else `Unserved` with every reason. Any other exception at once.
    """
    tasks = [asyncio.create_task(way) for way in ways]
    failures: list[SwarmError] = []
    try:
        for done in asyncio.as_completed(tasks):
            try:
                return await done
            except SwarmError as error:
                failures.append(error)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if len(failures) == 1:
        raise failures[0]
    reasons = dict.fromkeys(failure.why for failure in failures)
    raise Unserved("peer", "; ".join(reasons) or "there is no way to it", "check that it runs, and its address")


async def reach(node: IpfsNode, peer_id: str, addresses: Sequence[str]) -> None:
    """Be connected to `peer_id` over libp2p. Raises `Unserved` when none of its addresses works, `Unavailable` without IPFS."""
    if peer_id in await node.peers():
        return
    own = [address for address in addresses if address.endswith(f"/p2p/{peer_id}")][:_ADDRESSES_TRIED]
    # Without any address the DHT may still know one.
    await first(node.connect(address, deadline_s=CONNECT_S) for address in own or [f"/p2p/{peer_id}"])
