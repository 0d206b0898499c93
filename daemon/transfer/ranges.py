"""Bytes of models over the peer API: for those whom neither IPFS nor BitTorrent brings together with a holder.

    GET /swarm/1/bytes/{cid}   Range: bytes=0-2097151   ->   206   Content-Range: bytes 0-2097151/98362432

One closed range inside the file, of at most `RANGE_LIMIT` bytes (RFC 9110, section 14); anything else is 400 or 416. In a closed
swarm the body is sealed. What comes is hashed by whoever asked, like what comes from anywhere else.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from daemon.buckets import Buckets
from daemon.errors import NotFound, UsageError
from daemon.membership import Membership
from daemon.peerapi.limits import Places
from daemon.peerapi.sending import send
from daemon.peerapi.server import Route, source_of
from daemon.transfer.sources import RateLimit
from daemon.transfer.store import disk_errors
from registry.cid import parse_cid
from registry.errors import Malformed

RANGE_LIMIT = 2 << 20  # bytes of one request; they are in memory while they are sent
PATH = "/swarm/1/bytes/"
SEALED = "bytes"  # what is sealed
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})")


@dataclass(frozen=True, slots=True)
class RangeLimits:
    """Ceilings of giving. A source is an IP address, a libp2p peer, or a relay with all that ask through it."""

    requests: int = 32  # at the same time, over all sources
    requests_per_source: int = 8
    rate: float = 16 << 20  # bytes per second and source
    burst: float = 64 << 20
    idle_s: float = 30.0  # without taking a byte


class RangeServer:
    """Gives ranges of this node's models to others. `find` gives the file of one by its canonical CID, None for what is not
    here, not sound or not shared; `limit` is over all that is given.
    """

    def __init__(
        self,
        find: Callable[[str], Path | None],
        membership: Membership,
        limit: RateLimit,
        limits: RangeLimits | None = None,
    ) -> None:
        limits = limits or RangeLimits()
        self._find = find
        self._membership = membership
        self._limit = limit
        self._idle_s = limits.idle_s
        self._places = Places("bytes", limits.requests, limits.requests_per_source)
        self._bytes = Buckets(rate=limits.rate, burst=limits.burst, clock=time.monotonic)

    def routes(self) -> Sequence[Route]:
        return [Route("GET", PATH + "{cid}", self._give)]

    async def _give(self, request: web.Request) -> web.StreamResponse:
        source = source_of(request)
        try:
            cid = parse_cid(request.match_info["cid"]).canonical
        except Malformed as error:
            raise UsageError("bytes", str(error)) from error
        with self._places.take(source):
            path = self._find(cid)
            if path is None:
                raise NotFound("bytes", "this node does not have it")
            start, data, size = await asyncio.to_thread(_read, path, _wanted(request))
            return await self._send(request, source, start, data, size)

    async def _send(
        self, request: web.Request, source: str, start: int, data: bytes, size: int
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=206)
        response.content_type = "application/octet-stream"
        response.headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{size}"

        async def pace(amount: int) -> None:
            await self._limit.take(amount)
            await asyncio.sleep(self._bytes.owe(source, amount))

        body = self._membership.seal(data, SEALED)
        return await send(request, response, body, idle_s=self._idle_s, pace=pace)


def _wanted(request: web.Request) -> tuple[int, int]:
    """First and last byte of the one range that is asked for. Raises `UsageError`."""
    given = request.headers.getall("Range", [])
    found = _RANGE.fullmatch(given[0]) if len(given) == 1 else None
    if found is None:
        raise UsageError("bytes", "exactly one range is given, bytes=FIRST-LAST")
    start, last = int(found[1]), int(found[2])
    if not 0 <= last - start < RANGE_LIMIT:
        raise UsageError("bytes", f"a range has 1 to {RANGE_LIMIT} bytes")
    return start, last


def _read(path: Path, wanted: tuple[int, int]) -> tuple[int, bytes, int]:
    """Where the range begins, its bytes, and the size of the file."""
    start, last = wanted
    with disk_errors("model"), path.open("rb") as file:
        size = path.stat().st_size
        if last >= size:
            raise web.HTTPRequestRangeNotSatisfiable
        file.seek(start)
        data = file.read(last - start + 1)
    if len(data) != last - start + 1:
        raise NotFound("bytes", "the file has become shorter")
    return start, data, size
