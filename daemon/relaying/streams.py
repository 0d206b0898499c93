"""One carried stream: the messages of two WebSockets, passed on as they come, within its ceilings.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import WSMsgType

from daemon.relaying import wire
from daemon.relaying.pipes import CLOSE_S, WebSocket, ended, finish

_MESSAGE_COST = 32  # bytes that a message counts beside its own, so that empty ones are not free
_FLUSH_S = 10.0  # for the asker to read what is on its way when the holder is done


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of one stream: bytes in both directions, seconds in all and without a byte."""

    bytes: int
    total_s: float
    idle_s: float


class _Over(Exception):
    """The stream ends with a close code."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Stream:
    """Carries between `asker` and `holder`. `pay` gives the seconds to pause after so many bytes,
    `count` is told of each.
    """

    def __init__(
        self,
        asker: WebSocket,
        holder: WebSocket,
        ceilings: Ceilings,
        *,
        pay: Callable[[int], float],
        count: Callable[[int], None],
    ) -> None:
        self._asker = asker
        self._holder = holder
        self._ceilings = ceilings
        self._pay = pay
        self._count = count
        self._carried = 0
        self._moved = time.monotonic()

    async def carry(self, over: asyncio.Event) -> None:
        """Until one end closes, a ceiling is reached or `over` is set; both are closed then."""
        tasks = [
            asyncio.create_task(self._pass_on(self._asker, self._holder)),
            asyncio.create_task(self._pass_on(self._holder, self._asker)),
            asyncio.create_task(over.wait()),
        ]
        code, why = wire.BROKEN, "the other end is gone"
        try:
            done = await self._first_done(tasks)
            if over.is_set():
                code, why = wire.GOING_AWAY, "the relay carries no more for the node"
            elif all([task.result() for task in done]):
                code, why = wire.DONE, ""
        except _Over as error:
            code, why = error.code, str(error)
        except OSError:
            pass  # the end that is gone is told apart by nothing that the other could use
        finally:
            await ended(tasks)
            await self._close(code, why)

    async def _first_done(self, tasks: list[asyncio.Task[bool]]) -> set[asyncio.Task[bool]]:
        """The first task to end. Raises `_Over` when the time is over before."""
        ends = time.monotonic() + self._ceilings.total_s
        while True:
            now = time.monotonic()
            silent = self._moved + self._ceilings.idle_s
            left = min(ends, silent) - now
            if left <= 0:
                why = "it takes too long" if ends < silent else "nothing moved"
                raise _Over(wire.OVER_LIMIT, why)
            done, _ = await asyncio.wait(
                tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                return done

    async def _pass_on(self, near: WebSocket, far: WebSocket) -> bool:
        """Whether `near` closed in good order."""
        while True:
            message = await near.receive()
            if message.type in (WSMsgType.TEXT, WSMsgType.PING, WSMsgType.PONG):
                raise _Over(wire.WRONG_KIND, "a stream has binary messages alone")
            if message.type is not WSMsgType.BINARY:
                return message.type is WSMsgType.CLOSE and near.close_code == wire.DONE
            size = len(message.data) + _MESSAGE_COST
            self._carried += size
            if self._carried > self._ceilings.bytes:
                raise _Over(wire.OVER_LIMIT, "it has more bytes than are carried")
            await asyncio.sleep(self._pay(size))
            await far.send_bytes(message.data)
            self._count(len(message.data))
            self._moved = time.monotonic()

    async def _close(self, code: int, why: str) -> None:
        """Whoever does not read is cut off: it would hold its connection for as long as it likes.
        """
        flush_s = _FLUSH_S if code == wire.DONE else CLOSE_S
        await asyncio.gather(
            finish(self._asker, code, why, within_s=flush_s),
            finish(self._holder, code, why),
        )
