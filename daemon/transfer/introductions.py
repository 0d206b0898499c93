"""Introductions: two nodes that want to meet over BitTorrent, of which one or both cannot be dialled.

Who wants a torrent asks its holder, over whatever way there is to it, to connect to the address at which the asker is seen; and is
told the holder's. Both dial at the same time: a holder behind a NAT reaches an asker that can be dialled, and two homes get through
routers that keep the port.

- Only who has the torrent answers, so nobody is told where a home is who does not want a model from it. Who asks through a relay
  learns the holder's address all the same: that is what it asks for (`swarmctl privacy`).
- Whose address is seen can name that one alone. Who comes through libp2p or a relay can name another, which costs its owner a
  connection attempt; a source has few of them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import aiohttp
from aiohttp import web

from daemon.buckets import Buckets
from daemon.config import Network, host_port
from daemon.errors import Busy, NotFound, SwarmError, Unserved, UsageError, VerificationError
from daemon.membership import Membership
from daemon.network import host_port as joined
from daemon.peerapi.reading import read_at_most
from daemon.peerapi.server import Route, read_body, source_of
from daemon.peerapi.ways import Ways
from registry import endpoints, ranges, strictjson
from registry.errors import Malformed, NotVerified
from registry.records import Peer

_log = logging.getLogger(__name__)

PATH = "/swarm/1/meet"
MAX_ADDRESSES = 2
_LIMIT = 1024  # bytes
_BROUGHT, _GIVEN = "meet-question", "meet-answer"
_ASK_S = 5.0
_AGAIN_S = 10.0  # between two introductions to the same holder
_SOON_S = 0.1
_HOLDERS = 8
_INFOHASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class Torrents(Protocol):
    """What is needed of daemon/torrent/session.py."""

    def meet(self, infohash: str, peers: Sequence[tuple[str, int]]) -> None: ...
    def known(self, infohash: str) -> object | None: ...


class Introductions:
    """Both halves. `outside` gives the (IP, port) at which our BitTorrent port may be reached from outside, as far as we know."""

    def __init__(
        self,
        membership: Membership,
        ways: Ways,
        http: aiohttp.ClientSession,
        torrents: Torrents,
        *,
        network: Network,
        outside: Callable[[], Sequence[tuple[str, int]]],
    ) -> None:
        self._membership = membership
        self._ways = ways
        self._http = http
        self._torrents = torrents
        self._network: Network = network
        self._outside = outside
        self._rate = Buckets(rate=0.5, burst=10.0, clock=time.monotonic)

    # -- being asked --------------------------------------------------------------------------------------------------

    def routes(self) -> Sequence[Route]:
        return [Route("POST", PATH, self._answer)]

    async def _answer(self, request: web.Request) -> web.Response:
        source = source_of(request)
        if not self._rate.take(source):
            raise Busy("introductions", "they come too fast", "slow down")
        kind = self._membership.media_type("application/json")
        limit = _LIMIT + self._membership.overhead
        infohash, peers = self._parse(await read_body(request, limit, kind), _BROUGHT)
        if self._torrents.known(infohash) is None:
            raise NotFound("torrent", "this node does not have it")
        if ranges.is_address(source):
            peers = [peer for peer in peers if peer[0] == source]
        self._torrents.meet(infohash, peers)
        body = self._body(infohash, _GIVEN)
        return web.Response(body=body, content_type=kind)

    # -- asking -------------------------------------------------------------------------------------------------------

    async def keep(
        self,
        infohash: str,
        holders: Callable[[], Iterable[Peer]],
        on_peers: Callable[[Sequence[tuple[str, int]]], None],
    ) -> None:
        """Until it is cancelled: be introduced to those of `holders()` that announce no address for BitTorrent."""
        while True:
            if not self._outside():
                # Who has just come does not know yet how it is seen. An attempt that only one side makes is in the way of
                # the next, until it runs out.
                await asyncio.sleep(_SOON_S)
                continue
            hidden = [peer for peer in holders() if not peer.address.bittorrent][:_HOLDERS]
            results = await asyncio.gather(
                *(self._meet(infohash, peer) for peer in hidden), return_exceptions=True
            )
            for result in results:
                if isinstance(result, list):
                    on_peers(result)
                elif not isinstance(result, SwarmError):
                    raise result
            await asyncio.sleep(_AGAIN_S)

    async def _meet(self, infohash: str, peer: Peer) -> list[tuple[str, int]]:
        kind = self._membership.media_type("application/json")
        timeout = aiohttp.ClientTimeout(total=_ASK_S)
        limit = _LIMIT + self._membership.overhead
        try:
            async with (
                self._ways.to(peer) as way,
                self._http.post(
                    way.url + PATH,
                    data=self._body(infohash, _BROUGHT),
                    headers={**way.headers, "Content-Type": kind},
                    timeout=timeout,
                    allow_redirects=False,
                ) as response,
            ):
                data = await read_at_most(response, limit)
                if response.status != 200:
                    raise Unserved("peer", f"its peer API answered {response.status}")
        except (aiohttp.ClientError, OSError) as error:
            raise Unserved("peer", "it cannot be asked to meet") from error
        try:
            return self._parse(data, _GIVEN)[1]
        except UsageError as error:
            raise VerificationError("introduction", error.why) from error

    # -- the wire -----------------------------------------------------------------------------------------------------

    def _body(self, infohash: str, what: str) -> bytes:
        addresses = [joined(host, port) for host, port in self._outside()]
        fields = {"infohash": infohash, "addresses": addresses[:MAX_ADDRESSES]}
        return self._membership.seal(strictjson.dumps(fields), what)

    def _parse(self, sealed: bytes, what: str) -> tuple[str, list[tuple[str, int]]]:
        """The infohash and the addresses that this node may speak to. Raises `UsageError`."""
        try:
            data = self._membership.open(sealed, what, limit=_LIMIT)
            match strictjson.loads(data, limit=_LIMIT, what="the introduction"):
                case {"infohash": str(infohash), "addresses": list(addresses)}:
                    if len(addresses) <= MAX_ADDRESSES and _INFOHASH.fullmatch(infohash):
                        return infohash, self._allowed(addresses)
        except (Malformed, NotVerified, ValueError) as error:
            raise UsageError("introduction", str(error)) from error
        raise UsageError("introduction", "it must have an infohash and addresses")

    def _allowed(self, addresses: Sequence[object]) -> list[tuple[str, int]]:
        found = [host_port(endpoints.host_port(str(text))) for text in addresses]
        return [(host, port) for host, port in found if ranges.allows(self._network, host)]
