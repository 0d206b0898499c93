"""Small objects by their CID: manifests and .torrents. Any node may give them, because the CID checks the bytes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import aiohttp
from aiohttp import web

from daemon.buckets import Buckets
from daemon.errors import Busy, NotFound, SwarmError, Unserved, UsageError, VerificationError
from daemon.ipfs.interface import IpfsNode
from daemon.membership import Membership
from daemon.peerapi.limits import Limits, Places
from daemon.peerapi.reading import read_at_most
from daemon.peerapi.sending import send
from daemon.peerapi.server import Route, source_of
from daemon.peerapi.ways import Ways
from registry.cid import UnixfsHasher, parse_cid
from registry.errors import Malformed, NotVerified
from registry.records import Peer

log = logging.getLogger(__name__)

MANIFEST_LIMIT = 64 << 10  # bytes
TORRENT_LIMIT = 32 << 20
_DEADLINE_S = 15.0
_HOLDERS = 64  # nodes asked for one object at most
_AT_ONCE = 8
_SILENCE_S = 4.0  # after which a holder that gives nothing makes room for the next
_PATH = "/swarm/1/object/"
_SEALED = "object"  # what is sealed


def object_cid(data: bytes) -> str:
    hasher = UnixfsHasher()
    hasher.update(data)
    return hasher.finish()


class Objects:
    def __init__(
        self,
        ipfs: Callable[[], IpfsNode | None],
        ways: Ways,
        session: aiohttp.ClientSession,
        membership: Membership,
    ) -> None:
        self._membership = membership
        self._ipfs = ipfs
        self._ways = ways
        self._session = session

    async def get(
        self, cid: str, holders: Sequence[Peer], *, limit: int, deadline_s: float = _DEADLINE_S
    ) -> bytes:
        """The bytes that `cid` names, from IPFS and from the holders at once, those heard of last first.

        So many holders are asked at a time; one that is silent makes room for the next. Raises `Unserved` when nobody gives them.
        """
        recent = sorted(holders, key=lambda holder: -holder.expires)[:_HOLDERS]
        gate = asyncio.Semaphore(_AT_ONCE)
        asks: list[Coroutine[Any, Any, bytes]] = [
            self._from_peer(holder, cid, limit, gate) for holder in recent
        ]
        node = self._ipfs()
        if node is not None:
            asks.append(node.read_bytes(cid, limit=limit, deadline_s=deadline_s))
        tasks = [asyncio.create_task(ask) for ask in asks]
        try:
            async with asyncio.timeout(deadline_s):
                for first in asyncio.as_completed(tasks):
                    try:
                        data = await first
                    except (SwarmError, aiohttp.ClientError, TimeoutError) as error:
                        log.debug("%s was not to be had there: %s", cid, error)
                        continue
                    if object_cid(data) == cid:
                        return data
                    log.warning("somebody gave other bytes for %s", cid)
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise Unserved(cid, "nobody gave it", "join a node that has it and try again")

    async def _from_peer(
        self, holder: Peer, cid: str, limit: int, gate: asyncio.Semaphore
    ) -> bytes:
        async with (
            gate,
            self._ways.to(holder) as way,
            self._session.get(
                way.url + _PATH + cid,
                headers=way.headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_read=_SILENCE_S),
            ) as response,
        ):
            if response.status != 200:
                raise Unserved(cid, f"a node answered {response.status}")
            most = limit + self._membership.overhead
            data = await read_at_most(response, most)
        try:
            return self._membership.open(data, _SEALED, limit=limit)
        except (Malformed, NotVerified) as error:
            raise VerificationError(cid, str(error)) from error


class ObjectServer:
    """Gives small objects of this node to others. `read` gives one by its canonical CID, or None."""

    def __init__(
        self,
        read: Callable[[str], Awaitable[bytes | None]],
        membership: Membership,
        limits: Limits | None = None,
    ) -> None:
        self._membership = membership
        limits = limits or Limits()
        self._read = read
        self._idle_s = limits.idle_s
        self._places = Places("object", limits.objects, limits.objects_per_source)
        self._rate = Buckets(
            rate=limits.object_rate, burst=limits.object_burst, clock=time.monotonic
        )

    def routes(self) -> Sequence[Route]:
        return [Route("GET", _PATH + "{cid}", self._give)]

    async def _give(self, request: web.Request) -> web.StreamResponse:
        source = source_of(request)
        if not self._rate.take(source):
            raise Busy("object", "requests come too fast", "slow down")
        try:
            cid = parse_cid(request.match_info["cid"]).canonical
        except Malformed as error:
            raise UsageError("object", str(error)) from error
        with self._places.take(source):
            data = await self._read(cid)
            if data is None or len(data) > TORRENT_LIMIT:
                raise NotFound("object", "this node does not have it")
            response = web.StreamResponse()
            response.content_type = "application/octet-stream"
            body = self._membership.seal(data, _SEALED)
            return await send(request, response, body, idle_s=self._idle_s)
