"""Dialling back: whether a node can be reached from outside, found out by somebody outside.

A node asks another one to connect to it, at the address from which the question came and nowhere else, so that nobody can be
made to knock at a third party's door. What is dialled:

    http        our peer API: it must say that it is the node that asked
    ipfs        libp2p over TCP: it must begin with multistream-select
    bittorrent  a TCP port that takes the connection
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp
from aiohttp import AddrInfoType, web

from daemon.buckets import Buckets
from daemon.config import Network
from daemon.errors import Busy, SwarmError, Unserved, UsageError, VerificationError
from daemon.ipfs.interface import IpfsNode
from daemon.membership import Membership
from daemon.peerapi.ping import ping
from daemon.peerapi.reading import read_at_most
from daemon.peerapi.server import Route, read_body, source_of
from daemon.peerapi.ways import Way
from registry import ranges, strictjson
from registry.errors import Malformed, NotVerified

PATH = "/swarm/1/dialback"
PARTS = ("http", "ipfs", "bittorrent")
_LIMIT = 1024  # bytes of a question or an answer
_DIAL_S = 1.5  # a NAT drops what nobody asked for: most of those who ask wait so long
_ASK_S = 4.0
_QUESTION, _ANSWER = "dial-back question", "dial-back answer"  # what is sealed
_MULTISTREAM = b"/multistream/1.0.0"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What another node saw: the address (and, over plain HTTP, the port) we come from, and which parts it reached there."""

    address: str | None
    port: int | None
    reached: frozenset[str]


class DialBack:
    """Answers nodes that want to be dialled back. `network` is the kind of network this node lives in."""

    def __init__(
        self,
        network: Network,
        ipfs: Callable[[], IpfsNode | None],
        http: aiohttp.ClientSession,
        membership: Membership,
    ) -> None:
        self._membership = membership
        self._network = network
        self._ipfs = ipfs
        self._http = http
        self._rate = Buckets(rate=0.2, burst=5.0, clock=time.monotonic)

    def routes(self) -> Sequence[Route]:
        return [Route("POST", PATH, self._answer)]

    async def _answer(self, request: web.Request) -> web.Response:
        source = source_of(request)
        if not self._rate.take(source):
            raise Busy("dial-back", "it was asked for too often", "try again in a minute")
        kind = self._membership.media_type("application/json")
        data = await read_body(request, _LIMIT + self._membership.overhead, kind)
        node, ports = _parse(data, self._membership)
        address = await self._address_of(source)
        reached: list[str] = []
        if address is not None:
            tries = (self._dial(part, address, port, node) for part, port in ports.items())
            worked = await asyncio.gather(*tries)
            reached = [part for part, there in zip(ports, worked, strict=True) if there]
        name = request.transport.get_extra_info("peername") if request.transport else None
        port = name[1] if name and name[0] == address else None
        verdict = strictjson.dumps({"address": address, "port": port, "reached": reached})
        return web.Response(body=self._membership.seal(verdict, _ANSWER), content_type=kind)

    async def _address_of(self, source: str) -> str | None:
        """The IP address behind a source; None when it comes through a relay, or from where this node may not go."""
        if ranges.is_address(source):
            address: str | None = source
        else:
            address = await self._libp2p_address(source)
        return address if address and ranges.allows(self._network, address) else None

    async def _libp2p_address(self, peer_id: str) -> str | None:
        node = self._ipfs()
        if node is None:
            return None
        for one in await node.connections():
            if one.peer_id == peer_id and not one.relayed:
                return one.address.split("/")[2]
        return None

    async def _dial(self, part: str, address: str, port: int, node: str) -> bool:
        if part == "http":
            return await self._is_peer_api(address, port, node)
        try:
            async with asyncio.timeout(_DIAL_S):
                reader, writer = await asyncio.open_connection(address, port)
                try:
                    return part == "bittorrent" or _MULTISTREAM in await reader.read(64)
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False

    async def _is_peer_api(self, address: str, port: int, node: str) -> bool:
        host = f"[{address}]" if ":" in address else address
        try:
            found = await ping(
                self._http,
                f"http://{host}:{port}",
                membership=self._membership,
                node=node,
                deadline_s=_DIAL_S,
            )
            return found == node
        except SwarmError:
            return False


async def ask(
    way: Way,
    node: str,
    ports: Mapping[str, int],
    *,
    membership: Membership,
) -> tuple[Verdict, int | None]:
    """What the node at the end of `way` sees of us, and the local port that the question left from.

    Raises `Unserved` or `VerificationError`.
    """
    question = strictjson.dumps({"node": node, "ports": dict(ports)})
    body = membership.seal(question, _QUESTION)
    kind = membership.media_type("application/json")
    headers = {**way.headers, "Content-Type": kind}
    timeout = aiohttp.ClientTimeout(total=_ASK_S)
    left_from = _LocalPort()
    # A connection of its own: only so is it known which port it leaves from.
    connector = aiohttp.TCPConnector(socket_factory=left_from.socket)
    try:
        async with (
            aiohttp.ClientSession(
                connector=connector, middlewares=(membership.middleware,)
            ) as http,
            http.post(
                way.url + PATH, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response,
        ):
            data = await read_at_most(response, _LIMIT + membership.overhead)
            if response.status != 200:
                raise Unserved("dial-back", f"a node answered {response.status}")
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise Unserved("dial-back", "the node that was asked does not answer") from error
    return _parse_verdict(data, membership), left_from.port


class _LocalPort:
    """Makes sockets, and knows the local port of the last one."""

    def __init__(self) -> None:
        self.port: int | None = None

    def socket(self, info: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, _ = info
        made = socket.socket(family, kind, protocol)
        made.bind(("", 0))
        self.port = int(made.getsockname()[1])
        return made


def _parse(sealed: bytes, membership: Membership) -> tuple[str, dict[str, int]]:
    """The node key and the ports of a question. Raises `UsageError`."""
    try:
        data = membership.open(sealed, _QUESTION, limit=_LIMIT)
        fields = strictjson.loads(data, limit=_LIMIT, what="the question")
    except (Malformed, NotVerified) as error:
        raise UsageError("dial-back", str(error)) from error
    match fields:
        case {"node": str(node), "ports": dict(ports)} if len(node) <= 128:
            if all(part in PARTS and _is_port(port) for part, port in ports.items()):
                return node, ports
    raise UsageError("dial-back", "it must have a node and its ports")


def _parse_verdict(sealed: bytes, membership: Membership) -> Verdict:
    try:
        data = membership.open(sealed, _ANSWER, limit=_LIMIT)
        fields = strictjson.loads(data, limit=_LIMIT, what="the verdict")
    except (Malformed, NotVerified) as error:
        raise VerificationError("dial-back", str(error)) from error
    match fields:
        case {"address": None, "reached": []}:
            return Verdict(None, None, frozenset())
        case {"address": str(address), "port": port, "reached": list(reached)}:
            known = all(part in PARTS for part in reached)
            if known and ranges.is_address(address) and (port is None or _is_port(port)):
                return Verdict(address, port, frozenset(reached))
    raise VerificationError("dial-back", "the verdict does not have its form")


def _is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536
