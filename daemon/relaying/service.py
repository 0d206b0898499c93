"""The relay: carries connections to nodes that asked it to, and to nobody else.

It makes no connection of its own. A node that wants to be reached holds one open to here; who asks
for it gets a stream that the node comes to take. What passes is not looked at: chats are sealed
from end to end (daemon/peerchat/seal.py), announcements and objects prove themselves.

    a node is     unknown -> asked to prove itself -> held -> gone
    a call is     rung -> taken -> carried -> over
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from daemon.buckets import Buckets
from daemon.errors import NotFound, Refused, Unserved, UsageError
from daemon.peerapi.kinds import BYTES, MESSAGES
from daemon.peerapi.limits import Places
from daemon.peerapi.server import Route, source_of
from daemon.relaying import wire
from daemon.relaying.held import Call, Ended, Hold, new_socket, next_request
from daemon.relaying.limits import RelayLimits
from daemon.relaying.pipes import finish
from daemon.relaying.streams import Ceilings, Stream
from registry import relaying as rules
from registry.errors import Malformed, NotVerified, Stale
from registry.relaying import HoldRequest

_log = logging.getLogger(__name__)

RELAYED = "relay:"  # how the source of a connection begins that came through a relay


class RelayService:
    """The relaying half of node `node`. `enabled` says whether it carries now, `bulk` whether model
    bytes too.

    `on_change` is called when other nodes are held, or ask for other codes to be announced.
    """

    def __init__(
        self,
        node: str,
        *,
        enabled: Callable[[], bool],
        bulk: Callable[[], bool],
        on_change: Callable[[], None],
        limits: RelayLimits | None = None,
    ) -> None:
        self._node = node
        self._enabled = enabled
        self._bulk = bulk
        self._on_change = on_change
        self._limits = limits = limits or RelayLimits()
        self._holds: dict[str, Hold] = {}
        self._calls: dict[str, Call] = {}  # by ticket, until they are taken
        self._carried = 0
        self._closing = False
        self._letting_go: set[asyncio.Task[None]] = set()
        self._held_places = Places("relay", limits.held, limits.held_per_source)
        self._askers = Places("relayed stream", limits.streams, limits.streams_per_asker)
        self._holders = Places("relayed stream", limits.streams, limits.streams_per_holder)
        self._requests = Buckets(
            rate=limits.requests_rate, burst=limits.requests_burst, clock=time.monotonic
        )
        self._bytes = Buckets(rate=limits.rate, burst=limits.burst, clock=time.monotonic)

    # -- what the rest of this node asks -----------------------------------------------------------

    @property
    def held(self) -> tuple[str, ...]:
        """The nodes that this one carries for."""
        return tuple(self._holds)

    @property
    def streams(self) -> int:
        """Streams that are carried, or being rung for, now."""
        return self._askers.taken

    @property
    def carried(self) -> int:
        """Bytes carried since the start, both directions."""
        return self._carried

    def codes(self) -> Mapping[str, frozenset[str]]:
        """The codes that each held node asks to be announced under this node's address."""
        return {node: hold.request.codes for node, hold in self._holds.items()}

    def refresh(self) -> None:
        """`enabled` may say something else now: whoever is held is let go when this node relays no
        more.
        """
        if self._holds and not self._enabled():
            letting_go = self._let_go(wire.NO_RELAY, "this node relays no more")
            task = asyncio.create_task(letting_go, name="let holders go")
            self._letting_go.add(task)
            task.add_done_callback(self._letting_go.discard)

    async def close(self) -> None:
        """Let everybody go. Idempotent; takes about a second at most."""
        self._closing = True
        await self._let_go(wire.GOING_AWAY, "this node stops")
        await asyncio.gather(*self._letting_go)

    @asynccontextmanager
    async def call(
        self, node: str, source: str
    ) -> AsyncIterator[tuple[web.WebSocketResponse, asyncio.Event]]:
        """A stream that `node` has taken, and what is set when it must end; it is over with the
        context.

        Raises `NotFound` when the node is not held, `Busy` at a ceiling, `Unserved` when it does
        not come.
        """
        hold = self._holds.get(node)
        if hold is None:
            raise NotFound("relay", "this node does not carry for it")
        with self._askers.take(source), self._holders.take(node):
            call = Call(asyncio.get_running_loop().create_future())
            ticket = secrets.token_hex(16)
            self._calls[ticket] = call
            hold.calls.add(call)
            try:
                yield await self._ring(hold, ticket, call), call.over
            finally:
                self._calls.pop(ticket, None)
                hold.calls.discard(call)
                call.end()

    # -- what others ask ---------------------------------------------------------------------------

    def routes(self) -> Sequence[Route]:
        return [
            Route("GET", wire.HOLD_PATH, self._hold),
            Route("GET", wire.TO_PATH + "{node:[0-9a-f]{64}}", self._to),
            Route("GET", wire.TAKE_PATH + "{ticket:[0-9a-f]{32}}", self._take),
        ]

    async def _hold(self, request: web.Request) -> web.StreamResponse:
        """A node asks to be carried for, as long as this connection lasts."""
        source = self._willing(request)
        ws = new_socket(
            request, limit=rules.MAX_ENVELOPE, heartbeat_s=self._limits.heartbeat_s
        )
        with self._held_places.take(source):
            await ws.prepare(request)
            try:
                await self._keep(ws, source)
            except Ended as ended:
                _log.debug("a holder was let go: %s", ended)
                await finish(ws, ended.code, str(ended))
        return ws

    async def _to(self, request: web.Request) -> web.StreamResponse:
        """Somebody asks for a stream to a node that is held."""
        source = self._willing(request)
        ceilings = self._ceilings(request.query.get("kind", MESSAGES))
        ws = new_socket(request, limit=wire.MESSAGE_LIMIT)
        async with self.call("ed25519:" + request.match_info["node"], source) as (holder, over):
            await ws.prepare(request)
            stream = Stream(
                ws,
                holder,
                ceilings,
                pay=lambda size: self._bytes.owe(source, size),
                count=self._count,
            )
            await stream.carry(over)
        return ws

    async def _take(self, request: web.Request) -> web.StreamResponse:
        """A holder comes to take a call: whoever knows the ticket is the one that was rung."""
        ws = new_socket(request, limit=wire.MESSAGE_LIMIT)
        call = self._calls.pop(request.match_info["ticket"], None)
        if call is None or call.taken.done():
            raise NotFound("relay", "nobody waits for this")
        await ws.prepare(request)
        if not call.taken.done():  # whoever asked may have left
            call.taken.set_result(ws)
            await call.over.wait()
        return ws

    # -- inside ------------------------------------------------------------------------------------

    def _willing(self, request: web.Request) -> str:
        """The source of a request. Raises `Refused` when nothing is carried, or not for that
        source.
        """
        source = source_of(request)
        if self._closing or not self._enabled():
            raise Refused("relay", "this node does not relay", "ask another node")
        if source.startswith(RELAYED):
            raise Refused("relay", "it is not used through another relay", "come directly")
        return source

    def _ceilings(self, kind: str) -> Ceilings:
        limits = self._limits
        if kind == MESSAGES:
            return Ceilings(limits.stream_bytes, limits.stream_s, limits.idle_s)
        if kind != BYTES:
            raise UsageError("relay", "there is no such kind of stream")
        if not self._bulk():
            raise Refused("relay", "this node carries no model bytes", "ask another node")
        return Ceilings(limits.bulk_bytes, limits.bulk_s, limits.idle_s)

    def _count(self, size: int) -> None:
        self._carried += size

    async def _keep(self, ws: web.WebSocketResponse, source: str) -> None:
        """Hold a node until it closes the connection. Raises `Ended` when it is ended from here.
        """
        secret = secrets.token_hex(16)
        hold: Hold | None = None
        wait_s = self._limits.request_s
        try:
            await ws.send_str(wire.challenge(secret))
            while (envelope := await next_request(ws, wait_s)) is not None:
                before = None if hold is None else hold.request
                asked = self._accept(envelope, source, secret, before)
                replaced: Hold | None = None
                if hold is None:
                    hold = Hold(ws, asked)
                    replaced = self._enter(hold)
                else:
                    hold.request = asked
                if before is None or before.codes != asked.codes:
                    self._on_change()
                wait_s = asked.lifetime
                await ws.send_str(wire.held(asked.lifetime))
                if replaced is not None:
                    await finish(replaced.ws, wire.REPLACED, "the node came again")
        finally:
            if hold is not None:
                self._leave(hold)

    def _accept(
        self, envelope: bytes, source: str, secret: str, before: HoldRequest | None
    ) -> HoldRequest:
        """The request in `envelope`. Raises `Ended` when it does not hold."""
        if not self._enabled():
            raise Ended(wire.NO_RELAY, "this node relays no more")
        if not self._requests.take(source):
            raise Ended(wire.TOO_MANY, "requests come too fast")
        try:
            return rules.accept(envelope, relay=self._node, challenge=secret, before=before)
        except (Malformed, NotVerified, Stale) as error:
            raise Ended(wire.NOT_ACCEPTED, str(error)) from error

    def _enter(self, hold: Hold) -> Hold | None:
        """Hold a node; gives the older connection of the same node, which is to be closed."""
        node = hold.request.node
        replaced = self._holds.get(node)
        self._holds[node] = hold
        if replaced is not None:
            replaced.end_calls()
        return replaced

    def _leave(self, hold: Hold) -> None:
        hold.end_calls()
        if self._holds.get(hold.request.node) is hold:
            del self._holds[hold.request.node]
            self._on_change()

    async def _let_go(self, code: int, why: str) -> None:
        holds = list(self._holds.values())
        for hold in holds:
            hold.end_calls()
        await asyncio.gather(*(finish(hold.ws, code, why) for hold in holds))

    async def _ring(self, hold: Hold, ticket: str, call: Call) -> web.WebSocketResponse:
        try:
            async with asyncio.timeout(self._limits.take_s):
                await hold.ws.send_str(wire.call(ticket))
                taken = await call.taken
        except (OSError, TimeoutError) as error:
            raise Unserved("relay", "the node does not come", "try another relay") from error
        if taken is None:
            raise Unserved("relay", "the node is gone", "try another relay")
        return taken
