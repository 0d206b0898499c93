"""A chat with another node, the serving half: opens sealed questions, answers them with what is served here, seals the answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from aiohttp import web

from daemon.engine.interface import Delta, EmbeddingRequest, Provider
from daemon.errors import Bug, InferenceError, NotFound, SwarmError
from daemon.peerapi.limits import Limits, Places
from daemon.peerapi.server import Route, read_body, source_of
from daemon.peerchat import wire
from daemon.peerchat.seal import REQUEST_LIMIT, REQUEST_TYPE, RESPONSE_TYPE, ResponseSealer, SealKeys
from daemon.waiting import close

T = TypeVar("T")
_log = logging.getLogger(__name__)

PATH = "/swarm/1/chat"

ALIVE_EVERY_S = 5.0  # a serving node says at least this often that it is still at work
WRITE_S = 10.0  # an asker that does not read for this long is gone


class ChatServer:
    """Answers sealed chats. `provider` gives what answers for the model of a CID, None when it is not served here."""

    def __init__(
        self,
        keys: SealKeys,
        provider: Callable[[str], Provider | None],
        *,
        limits: Limits | None = None,
        alive_every_s: float = ALIVE_EVERY_S,
    ) -> None:
        limits = limits or Limits()
        self._keys = keys
        self._provider = provider
        self._places = Places("chat", limits.chats, limits.chats_per_source)
        self._alive_every_s = alive_every_s

    @property
    def answering(self) -> int:
        """Chats that are being answered now."""
        return self._places.taken

    def routes(self) -> Sequence[Route]:
        return [Route("POST", PATH, self._chat)]

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        with self._places.take(source_of(request)):
            sealed = await read_body(request, REQUEST_LIMIT, REQUEST_TYPE)
            return await self._stream(request, sealed)

    async def _stream(self, request: web.Request, sealed: bytes) -> web.StreamResponse:
        """Stream the sealed answer to `sealed`. Raises `VerificationError` or `Busy` before anything is sent."""
        question, sealer = self._keys.open_request(sealed)
        response = web.StreamResponse(headers={"Content-Type": RESPONSE_TYPE, "Cache-Control": "no-store"})
        await response.prepare(request)
        out = _Frames(response, sealer)
        try:
            await out.send(wire.ALIVE)
            await self._answer(question, out)
        except SwarmError as error:
            if isinstance(error, Bug):
                _log.error("answering a peer failed", exc_info=error)
            await out.send(wire.error_frame(error), last=True)
        except OSError:
            # The asker is gone, and with it everybody who could be told.
            _log.debug("the asker went away")
            return response
        except Exception:  # whatever a provider does, the asker gets an authenticated end instead of a cut
            _log.exception("answering a peer failed")
            await out.send(wire.error_frame(InferenceError("answer", "the serving node failed")), last=True)
        await response.write_eof()
        return response

    async def _answer(self, question: bytes, out: _Frames) -> None:
        # Millions of small values take a second; everybody else's answers go on meanwhile.
        cid, asked = await asyncio.to_thread(wire.parse_question, question)
        provider = self._provider(cid)
        if provider is None:
            raise NotFound("model", "it is not served here any more", "ask another node")
        if isinstance(asked, EmbeddingRequest):
            await self._embed(provider, asked, out)
            return
        deltas = provider.generate(asked)
        try:
            async with aclosing(self._with_signs_of_life(deltas, out)) as alive:
                async for delta in alive:
                    frames = wire.frames(delta)
                    for frame in frames[:-1]:
                        await out.send(frame)
                    await out.send(frames[-1], last=delta.finish is not None)
                    if delta.finish is not None:
                        return
        finally:
            await close(deltas)
        raise InferenceError("answer", "it ended without saying how", "ask again")

    async def _embed(self, provider: Provider, request: EmbeddingRequest, out: _Frames) -> None:
        # One at a time: all at once they are more than the vectors, for each of those who ask.
        frames = wire.vector_frames(await self._alive_until(provider.embed(request), out))
        frame = next(frames)
        for following in frames:
            await out.send(frame)
            await asyncio.sleep(0)  # a write to an asker that reads on does not give way
            frame = following
        await out.send(frame, last=True)

    async def _with_signs_of_life(self, deltas: AsyncIterator[Delta], out: _Frames) -> AsyncGenerator[Delta, None]:
        while (delta := await self._alive_until(_next(deltas), out)) is not None:
            yield delta

    async def _alive_until(self, work: Coroutine[Any, Any, T], out: _Frames) -> T:
        """What `work` gives, with a frame that says "alive" whenever it takes a while (a long prompt, a queue)."""
        step = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({step}, timeout=self._alive_every_s))[0]:
                await out.send(wire.ALIVE)
        except BaseException:
            step.cancel()
            await asyncio.wait({step})
            raise
        return step.result()


class _Frames:
    """Writes sealed frames; each is on its way when `send` returns. Raises `ConnectionError` when nobody reads."""

    def __init__(self, response: web.StreamResponse, sealer: ResponseSealer) -> None:
        self._response = response
        self._sealer = sealer
        self._begin = sealer.nonce

    async def send(self, frame: bytes, *, last: bool = False) -> None:
        data, self._begin = self._begin + self._sealer.frame(frame, last=last), b""
        try:
            async with asyncio.timeout(WRITE_S):
                await self._response.write(data)
        except TimeoutError as error:
            raise ConnectionError("the asker does not read") from error


async def _next(deltas: AsyncIterator[Delta]) -> Delta | None:
    return await anext(deltas, None)
