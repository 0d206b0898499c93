"""Bytes of models from the peer API of their holders (ranges.py is the other half): which holder, over which way, and what it gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp

from daemon.errors import Declined, SwarmError, Unserved, VerificationError
from daemon.membership import Membership
from daemon.peerapi.racing import first
from daemon.peerapi.ways import Way, Ways
from daemon.transfer.ranges import PATH, RANGE_LIMIT, SEALED
from registry.errors import Malformed, NotVerified
from registry.records import Peer

_HOLDERS = 8  # that are tried at the same time


class HolderReader:
    """Reads from the peer API of one holder over a way that is open. A `RangeReader`, which keeps no copies."""

    def __init__(
        self, node: str, way: Way, session: aiohttp.ClientSession, membership: Membership
    ) -> None:
        self.node = node
        self._way = way
        self._session = session
        self._membership = membership

    async def leaves(self, cid: str, *, deadline_s: float) -> list[str]:
        return []

    async def drop_blocks(self, cids: Sequence[str]) -> None:
        """There are none."""

    async def read_range(
        self, cid: str, offset: int, length: int, *, stall_s: float
    ) -> AsyncIterator[bytes]:
        end = offset + length
        for start in range(offset, end, RANGE_LIMIT):
            yield await self._ask(cid, start, min(RANGE_LIMIT, end - start), stall_s)

    async def _ask(self, cid: str, start: int, length: int, stall_s: float) -> bytes:
        sealed_length = length + self._membership.overhead
        headers = {**self._way.headers, "Range": f"bytes={start}-{start + length - 1}"}
        try:
            async with self._session.get(
                self._way.url + PATH + cid,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s),
            ) as response:
                if response.status != 206 or response.content_length != sealed_length:
                    raise Unserved(cid, f"a holder answered {response.status}")
                data = await response.content.readexactly(sealed_length)
        except (aiohttp.ClientError, asyncio.IncompleteReadError, TimeoutError) as error:
            raise Unserved(cid, "a holder did not give all of it") from error
        try:
            opened = self._membership.open(data, SEALED, limit=length)
        except (Malformed, NotVerified) as error:
            raise VerificationError(cid, str(error)) from error
        if len(opened) != length:
            raise VerificationError(cid, "a holder gave another number of bytes")
        return opened


class Holders:
    """Ways to the bytes of models at the nodes that announce them."""

    def __init__(
        self, ways: Ways, session: aiohttp.ClientSession, membership: Membership
    ) -> None:
        self._ways = ways
        self._session = session
        self._membership = membership

    @asynccontextmanager
    async def reader(self, holders: Sequence[Peer]) -> AsyncIterator[HolderReader]:
        """Reads from the holder that is reached first; those heard of last are tried first.

        Raises `Declined` when every one of them is reached through relays only, and none of these carries bytes of models,
        `Unserved` when none is reached now.
        """
        failures: list[SwarmError] = []

        async def attempt(holder: Peer) -> tuple[AsyncExitStack, Way]:
            try:
                async with AsyncExitStack() as stack:
                    way = await stack.enter_async_context(self._ways.to(holder, bulk=True))
                    return stack.pop_all(), way
            except SwarmError as error:
                failures.append(error)
                raise

        tried = sorted(holders, key=lambda holder: -holder.expires)[:_HOLDERS]
        if not tried:
            raise Unserved("bytes", "nobody is known to have it")
        try:
            stack, way = await first((attempt(holder) for holder in tried), self._ways.losers)
        except SwarmError as error:
            everywhere = all(isinstance(one, Declined) for one in failures)
            raise (Declined if everywhere else Unserved)("bytes", error.why) from error
        async with stack:
            yield HolderReader(way.node, way, self._session, self._membership)


class Turns:
    """Which holders are asked next: one that failed lets the others go first once, a liar is asked no more."""

    def __init__(self, holders: Callable[[], Sequence[Peer]]) -> None:
        self._holders = holders
        self._passed_over: set[str] = set()
        self._struck: set[str] = set()
        self.everybody = True  # whether all honest ones were in the last turn

    def next(self) -> list[Peer]:
        honest = [one for one in self._holders() if one.node not in self._struck]
        others = [one for one in honest if one.node not in self._passed_over]
        self._passed_over.clear()
        turn = others or honest
        self.everybody = len(turn) == len(honest)
        return turn

    def pass_over(self, node: str) -> None:
        self._passed_over.add(node)

    def strike(self, node: str) -> None:
        self._struck.add(node)
