"""Is the node there, and which one is it? The shortest question that the peer API answers."""

from __future__ import annotations

from collections.abc import Sequence

import aiohttp
from aiohttp import web

from daemon.errors import Unserved, VerificationError
from daemon.peerapi.server import Route
from registry import strictjson
from registry.errors import Malformed

PATH = "/swarm/1/ping"
_LIMIT = 1024  # bytes of the answer


class Ping:
    """Tells who this node is."""

    def __init__(self, node: str) -> None:
        self._node = node

    def routes(self) -> Sequence[Route]:
        return [Route("GET", PATH, self._answer)]

    async def _answer(self, request: web.Request) -> web.Response:
        return web.json_response({"node": self._node})


async def ping(http: aiohttp.ClientSession, url: str, *, deadline_s: float) -> str:
    """The node key that answers at `url`. Nothing proves it yet: what is asked next does.

    Raises `Unserved` when nothing answers in time and `VerificationError` when it is no node.
    """
    timeout = aiohttp.ClientTimeout(total=deadline_s)
    try:
        async with http.get(url + PATH, timeout=timeout, allow_redirects=False) as response:
            data = await response.content.read(_LIMIT + 1)
            fields = strictjson.loads(data, limit=_LIMIT, what="the answer")
            status = response.status
    except (aiohttp.ClientError, ConnectionError) as error:
        raise Unserved("peer", "nothing answers there") from error
    except TimeoutError as error:
        raise Unserved("peer", f"nothing answered within {deadline_s:g} s") from error
    except Malformed as error:
        raise VerificationError("peer", "what answers there is no node") from error
    match fields:
        case {"node": str(node)} if status == 200:
            return node
    raise Unserved("peer", f"its peer API answered {status}")
