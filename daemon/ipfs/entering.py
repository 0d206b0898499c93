"""Entering the network with a Kubo that has just come up: the peers that it held on to, and those that it starts from.

Kubo could do it by itself, but it would answer nobody for up to 10 s where bootstrap hosts are dead (settings.py), and it
waits 5 to 10 s before it connects to a peer that it was told to hold on to (boxo peering/peering.go). Here nobody waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from daemon.ipfs.rpc import Rpc, RpcError, gone
from registry import endpoints
from registry.errors import Malformed
from registry.multiaddrs import both_transports, parse_multiaddr

_log = logging.getLogger(__name__)

_ENOUGH = 4  # connected peers; with these Kubo's DHT finds the rest, and Kubo itself asks for no more
_AT_ONCE = 16
_DIAL_S = 10.0
_COMPANY = 128  # connections


Company = tuple[tuple[str, ...], ...]  # of each peer its addresses


async def enter(rpc: Rpc, *, held: Sequence[str], company: Company, bootstrap: Sequence[str]) -> None:
    """Connect to every peer of `held` and `company`, and to those of `bootstrap` in their order until there are enough.

    What cannot be reached is no error: Kubo goes on trying the former (10 minutes apart at most, in the end) and, while it has
    fewer than four peers, the latter (every 30 s, with libp2p's own backoff for dead addresses).
    Raises `Unavailable` when the node is gone.
    """
    await asyncio.gather(
        *(_dial(rpc, [address]) for address in held),
        *(_dial(rpc, addresses) for addresses in company),
        _until_enough(rpc, _by_peer(bootstrap)),
        _list(rpc, bootstrap),
    )


async def meet_relays(rpc: Rpc, relays: Sequence[str], let_through: Callable[[str], None]) -> None:
    """Connect to each relay, say so (gate.py), and hold on to it at its true address. What cannot be reached is no error."""

    async def meet(address: str) -> None:
        await _dial(rpc, [address])
        let_through(address.rpartition("/p2p/")[2])

    await asyncio.gather(*(meet(address) for address in relays))
    await hold(rpc, relays)


async def company(rpc: Rpc) -> Company:
    """Who is connected now, at the far end of the connection (a punched hole stays open for a while) and at what it told us.

    Whoever draws from us is to be met again at once.
    """
    found = await _call(rpc, "swarm/peers", options={"identify": True})
    met: dict[str, tuple[str, ...]] = {}
    for entry in (found["Peers"] or ())[:_COMPANY]:
        told = (entry.get("Identify") or {}).get("Addresses") or ()
        known = (f"{entry['Addr']}/p2p/{entry['Peer']}", *told)
        usable = tuple(address for address in known if _is_understood(address))
        if usable and "/p2p-circuit" not in entry["Addr"]:
            met[entry["Peer"]] = usable[: endpoints.MAX_ENDPOINTS]
    return tuple(met.values())


def _is_understood(address: str) -> bool:
    try:
        parse_multiaddr(address)
    except Malformed:
        return False
    return True


async def hold(rpc: Rpc, held: Sequence[str]) -> None:
    """Tell a new node whom it held on to. It connects to them by itself after 5 s, which `enter` does not wait for."""
    for address in held:
        try:
            await _call(rpc, "swarm/peering/add", address)
        except RpcError as error:
            _log.info("IPFS cannot hold on to %s: %s", address, error.why)


async def _list(rpc: Rpc, bootstrap: Sequence[str]) -> None:
    """One by one, so that an entry that Kubo does not understand costs no other."""
    for address in bootstrap:
        try:
            await _call(rpc, "bootstrap/add", address)
        except RpcError as error:
            _log.warning("ipfs.bootstrap: %s is not taken: %s", address, error.why)


async def _until_enough(rpc: Rpc, peers: Iterator[list[str]]) -> None:
    async def work() -> None:
        for addresses in peers:  # shared: each peer is dialled once
            if await _connected(rpc) >= _ENOUGH:
                return
            await _dial(rpc, addresses)

    await asyncio.gather(*(work() for _ in range(_AT_ONCE)))


async def _connected(rpc: Rpc) -> int:
    found = await _call(rpc, "swarm/peers")
    return len({peer["Peer"] for peer in found["Peers"] or ()})


async def _dial(rpc: Rpc, addresses: Sequence[str], deadline_s: float = _DIAL_S) -> bool:
    """Whether there is a connection now. `addresses` are one peer's."""
    ways = dict.fromkeys(way for address in addresses for way in both_transports(address))
    try:
        async with asyncio.timeout(deadline_s):
            await rpc.call("swarm/connect", *ways, timeout_s=None)
    except TimeoutError:
        _log.info("%s does not answer", addresses[0])
        return False
    except RpcError as error:
        _log.info("%s cannot be reached: %s", addresses[0], error.why)
        return False
    return True


async def answering(rpc: Rpc, addresses: Sequence[str], *, deadline_s: float) -> tuple[str, ...]:
    """Those of `addresses` (one for each peer) to which there is a connection, made if need be, within `deadline_s`.

    Each in the form in which it answered, because of hole punching (`both_transports`).
    """
    dialled = await asyncio.gather(*(_dial(rpc, [address], deadline_s) for address in addresses))
    found = await _call(rpc, "swarm/peers")
    reached = {f"{entry['Addr']}/p2p/{entry['Peer']}" for entry in found["Peers"] or ()}
    return tuple(
        next((way for way in both_transports(address) if way in reached), address)
        for address, good in zip(addresses, dialled, strict=True)
        if good
    )


async def _call(rpc: Rpc, call: str, *args: str, options: Mapping[str, object] | None = None) -> Any:
    try:
        return await rpc.call(call, *args, options=options)
    except TimeoutError as error:
        raise gone(error) from error


def _by_peer(addresses: Sequence[str]) -> Iterator[list[str]]:
    groups: dict[str, list[str]] = {}
    for address in addresses:
        groups.setdefault(address.rpartition("/p2p/")[2], []).append(address)
    return iter(groups.values())
