"""One relay that carries for this node: the connection over which it rings, and the calls that are
taken.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import WSMsgType
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.buckets import Buckets
from daemon.errors import SwarmError, Unserved, VerificationError
from daemon.peerapi.ways import Way
from daemon.relaying import wire
from daemon.relaying.pipes import FLUSH_S, connected, ended, finish, pipe
from daemon.relaying.service import RELAYED
from registry.envelope import key_name
from registry.errors import Malformed
from registry.relaying import HoldRequest, signed

_log = logging.getLogger(__name__)

LIFETIME_S = 300  # of a request; it is renewed after half of that
HEARTBEAT_S = 2.5  # a relay that is silent for one and a half of them is gone
STREAMS = 32  # that one relay may have open to us
_ANSWER_S = 5.0  # for the relay to say something
_PACE_S = 2.0  # between two requests: codes change in bursts
_CALLS_RATE = 20.0  # per second; a relay that rings for nothing costs a connection each time
_CALLS_BURST = 64.0


class Holding:
    """`relay` is the key of the node at the end of `way`. `news` gives what is set at the next
    change of `codes` or `wanted`.
    """

    def __init__(
        self,
        key: Ed25519PrivateKey,
        relay: str,
        way: Way,
        http: aiohttp.ClientSession,
        *,
        codes: Callable[[], frozenset[str]],
        wanted: Callable[[], bool],
        news: Callable[[], asyncio.Event],
        streams_port: Callable[[], int],
    ) -> None:
        self._key = key
        self._node = key_name(key)
        self._relay = relay
        self._way = way
        self._http = http
        self._codes = codes
        self._wanted = wanted
        self._news = news
        self._streams_port = streams_port
        self._challenge = ""
        self._sequence = 0
        self._said: frozenset[str] = frozenset()
        self._streams: set[asyncio.Task[None]] = set()
        self._calls = Buckets(rate=_CALLS_RATE, burst=_CALLS_BURST, clock=time.monotonic)

    async def run(self, on_agreed: Callable[[], Awaitable[None]]) -> None:
        """Be carried for until this node wants it no more. `on_agreed` is run when the relay has
        agreed, while calls are taken already.

        Raises `Busy` or `Unserved` when the relay refuses or goes, `VerificationError` when it does
        not keep the protocol, and what `on_agreed` raises.
        """
        async with connected(
            self._http,
            self._way,
            wire.HOLD_PATH,
            deadline_s=_ANSWER_S,
            limit=wire.NOTE_LIMIT,
            heartbeat_s=HEARTBEAT_S,
        ) as ws:
            try:
                await self._begin(ws)
                await self._stay(ws, on_agreed)
            except Malformed as error:
                raise VerificationError("relay", str(error)) from error
            except OSError as error:
                raise Unserved("relay", "the connection to it broke") from error

    async def _begin(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        try:
            async with asyncio.timeout(_ANSWER_S):
                self._challenge = wire.parse_challenge(await _note(ws))
                await self._request(ws)
                wire.parse_held(await _note(ws))
        except TimeoutError as error:
            raise Unserved("relay", f"it said nothing within {_ANSWER_S:g} s") from error

    async def _stay(
        self, ws: aiohttp.ClientWebSocketResponse, on_agreed: Callable[[], Awaitable[None]]
    ) -> None:
        """Until the relay closes, which raises `Unserved`, or this node withdraws."""
        first_call = asyncio.ensure_future(on_agreed())
        tasks = [
            asyncio.create_task(self._take_calls(ws)),
            asyncio.create_task(self._renew(ws)),
        ]
        try:
            done, _ = await asyncio.wait([first_call, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if done == {first_call}:
                first_call.result()
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await ended([first_call, *tasks, *self._streams])

    async def _take_calls(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            ticket = wire.parse_call(await _note(ws))
            if ticket is not None:
                self._answer(ticket)

    async def _renew(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        """Ask again before the request runs out, and when codes change; withdraw when nothing is
        wanted any more.
        """
        due = time.monotonic() + LIFETIME_S / 2
        while True:
            news = self._news()
            if not self._wanted():
                break
            now = time.monotonic()
            if now >= due or self._codes() != self._said:
                await self._request(ws)
                due = now + LIFETIME_S / 2
                await asyncio.sleep(_PACE_S)
                continue
            try:
                async with asyncio.timeout(due - now):
                    await news.wait()
            except TimeoutError:
                pass  # it is due
        await finish(ws)

    async def _request(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self._sequence += 1
        self._said = self._codes()
        request = HoldRequest(
            self._node, self._relay, self._challenge, self._sequence, LIFETIME_S, self._said
        )
        await ws.send_str(signed(request, self._key).decode())

    # -- calls -------------------------------------------------------------------------------------

    def _answer(self, ticket: str) -> None:
        """Take a call in the background; one too many is left to run out."""
        if len(self._streams) >= STREAMS or not self._calls.take(self._relay):
            return
        task = asyncio.create_task(self._take(ticket))
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)

    async def _take(self, ticket: str) -> None:
        try:
            async with connected(
                self._http,
                self._way,
                wire.TAKE_PATH + ticket,
                deadline_s=_ANSWER_S,
                limit=wire.MESSAGE_LIMIT,
                close_s=FLUSH_S,
            ) as ws:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._streams_port())
                # The first line says whose connection it is (daemon/peerapi/connections.py).
                writer.write(f"{RELAYED}{self._relay}\n".encode())
                await pipe(ws, reader, writer)
        except (SwarmError, OSError) as error:
            _log.debug("a call was not taken: %s", error)


async def _note(ws: aiohttp.ClientWebSocketResponse) -> str:
    """The next message of the relay. Raises `Unserved` when it has closed, `Malformed` for anything
    but text.
    """
    message = await ws.receive()
    if message.type is WSMsgType.TEXT:
        return str(message.data)
    if message.type is WSMsgType.BINARY:
        raise Malformed("a relay speaks in text")
    why = message.extra if message.type is WSMsgType.CLOSE and message.extra else "it is gone"
    raise Unserved("relay", ascii(why)[1:-1], "another relay is asked")
