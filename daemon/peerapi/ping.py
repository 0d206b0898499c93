"""Is the node there, and which one is it? The shortest question that the peer API answers."""

from __future__ import annotations

from collections.abc import Sequence

import aiohttp
from aiohttp import web

from daemon.errors import VerificationError
from daemon.membership import ASKED, Membership
from daemon.peerapi.reading import answer_to
from daemon.peerapi.server import Route
from registry import strictjson
from registry.errors import Malformed, NotVerified

PATH = "/swarm/1/ping"
_LIMIT = 1024  # bytes of the answer
_ANSWER = "ping answer"  # what is sealed


class Ping:
    """Tells who this node is."""

    def __init__(self, node: str, membership: Membership) -> None:
        self._node = node
        self._membership = membership

    def routes(self) -> Sequence[Route]:
        return [Route("GET", PATH, self._answer)]

    async def _answer(self, request: web.Request) -> web.Response:
        answer = self._membership.seal(strictjson.dumps({"node": self._node}), _ANSWER)
        kind = self._membership.media_type("application/json")
        return web.Response(body=answer, content_type=kind)


async def ping(
    http: aiohttp.ClientSession,
    url: str,
    *,
    membership: Membership,
    node: str = "",
    deadline_s: float,
) -> str:
    """The node key that answers at `url`. Nothing proves it yet: what is asked next does.

    `node` is the key that is expected there, empty when it is not known; another may answer.

    Raises `Unserved` when nothing answers in time and `VerificationError` when it is no node.
    """
    timeout = aiohttp.ClientTimeout(total=deadline_s)
    asking = http.get(url + PATH, headers={ASKED: node}, timeout=timeout, allow_redirects=False)
    data = await answer_to(asking, _LIMIT + membership.overhead, within_s=deadline_s)
    try:
        answer = membership.open(data, _ANSWER, limit=_LIMIT)
        fields = strictjson.loads(answer, limit=_LIMIT, what="the answer")
    except (Malformed, NotVerified) as error:
        raise VerificationError("peer", "what answers there is no node of this swarm") from error
    match fields:
        case {"node": str(found)}:
            return found
    raise VerificationError("peer", "what answers there is no node of this swarm")
