"""A relay that lies: it speaks the protocol, carries questions as they are, and does with answers
what a test wants.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from aiohttp import WSMsgType, web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.membership import OpenSwarm
from daemon.peerapi.ping import Ping
from daemon.peerapi.server import PeerApi, Route
from daemon.peerchat.seal import RESPONSE_TYPE
from daemon.relaying import wire
from registry.envelope import key_name
from registry.records import Address, Peer

# What becomes of the chunks of a chat's answer, each one sealed frame or two, without the last
# empty one.
Lie = Callable[[list[bytes]], Sequence[bytes]]
_SECRET = "0" * 32
_LAST_CHUNK = b"0\r\n\r\n"


class LiarRelay:
    """Holds one node and takes its word for who it is. `lie` None passes everything on; `asked` is
    what came of each asker. With `carries` False it agrees to everything and carries nothing.
    """

    def __init__(self, lie: Lie | None = None, *, carries: bool = True) -> None:
        self.carries = carries
        self.key = key_name(Ed25519PrivateKey.generate())
        self.lie = lie
        self.peer = Peer(self.key, None, Address(self.key), 0, 0)
        self.asked: list[bytearray] = []
        self._holder: web.WebSocketResponse | None = None
        self._taken: asyncio.Queue[tuple[web.WebSocketResponse, asyncio.Event]] = asyncio.Queue()
        self._tickets = 0
        self.calls = 0

    def routes(self) -> Sequence[Route]:
        return [
            *Ping(self.key, OpenSwarm()).routes(),
            Route("GET", wire.HOLD_PATH, self._hold),
            Route("GET", wire.TO_PATH + "{node}", self._to),
            Route("GET", wire.TAKE_PATH + "{ticket}", self._take),
        ]

    async def _hold(self, request: web.Request) -> web.StreamResponse:
        self._holder = ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.send_str(wire.challenge(_SECRET))
        async for _ in ws:
            await ws.send_str(wire.held(60))
        return ws

    async def _take(self, request: web.Request) -> web.StreamResponse:
        ws, over = web.WebSocketResponse(), asyncio.Event()
        await ws.prepare(request)
        await self._taken.put((ws, over))
        await over.wait()
        return ws

    async def _to(self, request: web.Request) -> web.StreamResponse:
        asker = web.WebSocketResponse()
        await asker.prepare(request)
        assert self._holder is not None
        self.calls += 1
        if not self.carries:
            await asker.close()
            return asker
        self._tickets += 1
        await self._holder.send_str(wire.call(f"{self._tickets:032x}"))
        holder, over = await self._taken.get()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(asker, holder))
                group.create_task(self._answer(holder, asker))
        finally:
            over.set()
        return asker

    async def _pass_on(self, near: web.WebSocketResponse, far: web.WebSocketResponse) -> None:
        asked = bytearray()
        self.asked.append(asked)
        async for message in near:
            asked += message.data
            await far.send_bytes(message.data)
        await far.close()

    async def _answer(self, holder: web.WebSocketResponse, asker: web.WebSocketResponse) -> None:
        answer = b""
        while (message := await holder.receive()).type is WSMsgType.BINARY:
            answer += message.data
            if self.lie is None or RESPONSE_TYPE.encode() not in answer:
                await asker.send_bytes(message.data)
                answer = b""
            elif answer.endswith(_LAST_CHUNK):
                break
        if answer and self.lie is not None:
            head, _, body = answer.partition(b"\r\n\r\n")
            lies = self.lie(_chunks(body))
            framed = [b"%x\r\n%b\r\n" % (len(one), one) for one in lies]
            if framed:
                await asker.send_bytes(b"".join([head, b"\r\n\r\n", *framed, _LAST_CHUNK]))
        await asker.close()


def _chunks(body: bytes) -> list[bytes]:
    """The chunks of a chunked body (RFC 9112, section 7.1)."""
    found: list[bytes] = []
    while True:
        size, _, rest = body.partition(b"\r\n")
        if not size or not int(size, 16):
            return found
        length = int(size, 16)
        found.append(rest[:length])
        body = rest[length + 2 :]


@asynccontextmanager
async def liar(lie: Lie | None = None, *, carries: bool = True) -> AsyncIterator[LiarRelay]:
    relay = LiarRelay(lie, carries=carries)
    api = PeerApi(relay.routes(), membership=OpenSwarm())
    async with api.listening(["127.0.0.1"], 0) as ports:
        address = Address(relay.key, http=(f"http://127.0.0.1:{ports.direct}",))
        relay.peer = Peer(relay.key, None, address, 0, 0)
        yield relay
