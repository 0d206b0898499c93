"""A chat with another node: the asking half (`PeerProvider`) and the serving half (`ChatServer`).

The way there is a libp2p stream where both nodes have IPFS (no open port, NAT traversed), else a direct URL. Either way the
body is sealed to the serving node (seal.py), so what lies between sees sizes and times only. Closing the answer closes the
stream, and that cancels the generation on the far side.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

from daemon.engine.interface import CAPABILITIES, Capability, Delta, EmbeddingRequest, Embeddings, Provider, Request
from daemon.errors import Bug, Busy, InferenceError, NotFound, PeerError, SwarmError, Unavailable, Unserved
from daemon.ipfs.interface import IpfsNode
from daemon.swarm import wire
from daemon.swarm.reach import CONNECT_S, reach
from daemon.swarm.seal import REQUEST_TYPE, RESPONSE_TYPE, ResponseOpener, ResponseSealer, SealKeys, seal_request
from daemon.waiting import close
from registry.records import Offer, Peer

T = TypeVar("T")
_log = logging.getLogger(__name__)

PROTOCOL = "/x/swarmctl/1"  # libp2p protocol of the door
CHAT_PATH = "/swarm/1/chat"

ALIVE_EVERY_S = 5.0  # a serving node says at least this often that it is still at work
STALL_S = 20.0  # silence after which the asker gives a node up
WRITE_S = 10.0  # an asker that does not read for this long is gone
ANSWER_LIMIT = 64 << 20  # bytes of one sealed answer
_DIRECT_TRIED = 3


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model of this node: how it is announced and what answers."""

    offer: Offer
    provider: Provider
    usable: bool = True  # if not, the provider says why; it is never chosen for somebody who did not name it


class PeerProvider:
    """Chats with one model of one peer. A `Provider`; `clock` gives unix seconds."""

    def __init__(
        self,
        peer: Peer,
        cid: str,
        *,
        ipfs: Callable[[], IpfsNode | None],
        http: aiohttp.ClientSession,
        clock: Callable[[], float],
        stall_s: float = STALL_S,
    ) -> None:
        self._peer = peer
        self._cid = cid
        self._ipfs = ipfs
        self._http = http
        self._clock = clock
        self._stall_s = stall_s

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Nodes do not announce theirs; one that cannot says so."""
        return CAPABILITIES

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Raises `Unserved` or `Busy`: another node can be asked."""
        async with AsyncExitStack() as stack:
            response, opener = await self._ask(stack, wire.question(self._cid, request))
            frames = await stack.enter_async_context(aclosing(self._frames(response, opener)))
            joiner = wire.VectorsJoiner()
            async for said in frames:
                if not isinstance(said, wire.Vectors):
                    raise _out_of_place()
                embeddings = joiner.take(said)
                if embeddings is not None and len(embeddings.vectors) == len(request.inputs):
                    return embeddings
                if embeddings is not None:
                    raise _out_of_place()
        raise Unserved("peer", "it ended its answer before it began")

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Raises `Unserved` or `Busy` while another node can still be asked, `InferenceError` once text has come."""
        question = wire.question(self._cid, request)
        begun = False
        async with AsyncExitStack() as stack:
            response, opener = await self._ask(stack, question)
            deltas = await stack.enter_async_context(aclosing(self._frames(response, opener)))
            try:
                async for delta in deltas:
                    if not isinstance(delta, Delta):
                        raise _out_of_place()
                    begun = begun or bool(delta.text or delta.tool_calls)
                    yield delta
                    if delta.finish is not None:
                        return
            except Unserved as error:
                if not begun:
                    raise
                raise InferenceError("answer", f"{error.why} in the middle", "ask again") from error

    async def _ask(self, stack: AsyncExitStack, question: bytes) -> tuple[aiohttp.ClientResponse, ResponseOpener]:
        """The response to the sealed question, over the first way that works; `stack` closes it."""
        failures: list[SwarmError] = []
        direct: list[AbstractAsyncContextManager[str]] = [nullcontext(url) for url in self._peer.address.http[:_DIRECT_TRIED]]
        for way in (self._libp2p(), *direct):
            async with AsyncExitStack() as attempt:
                try:
                    url = await attempt.enter_async_context(way)
                    # Sealed anew for each way: a request opens only once.
                    sealed, opener = self._seal(question)
                    response = await self._post(url, sealed)
                except (Unserved, Unavailable, Busy) as error:
                    failures.append(error)
                    continue
                attempt.callback(response.close)
                await stack.enter_async_context(attempt.pop_all())
                return response, opener
        busy = next((error for error in failures if isinstance(error, Busy)), None)
        raise busy or Unserved("peer", "; ".join(failure.why for failure in failures), "ask another node")

    def _seal(self, question: bytes) -> tuple[bytes, ResponseOpener]:
        keys = [key for key in self._peer.seal_keys if key.expires > self._clock()]
        if not keys:
            raise Unserved("peer", "it announced no key for sealed chat that is still good")
        return seal_request(question, node=self._peer.node, key=max(keys, key=lambda key: key.expires))

    @asynccontextmanager
    async def _libp2p(self) -> AsyncIterator[str]:
        node, peer_id = self._ipfs(), self._peer.peer_id
        if node is None or peer_id is None:
            raise Unserved("peer", "no libp2p stream, because one of the two nodes has no IPFS")
        await reach(node, peer_id, self._peer.address.ipfs)
        async with node.dial(PROTOCOL, peer_id) as (host, port):
            yield f"http://{host}:{port}"

    async def _post(self, url: str, sealed: bytes) -> aiohttp.ClientResponse:
        # Never "Connection: close": the far Kubo resets its libp2p stream once the door has closed, and over QUIC a reset throws
        # away what is still on its way, the end of the answer. We are the ones to close.
        headers = {"Content-Type": REQUEST_TYPE}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=self._stall_s)
        body = io.BytesIO(sealed)
        try:
            response = await self._http.post(url + CHAT_PATH, data=body, headers=headers, timeout=timeout, allow_redirects=False)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise Unserved("peer", "it cannot be reached") from error
        if response.status == 200 and response.content_type == RESPONSE_TYPE:
            return response
        # Anybody on the way could have written this, so it says no more than "try elsewhere".
        response.close()
        if response.status == 429:
            raise Busy("peer", "it has as many chats as it takes", "try again soon")
        raise Unserved("peer", f"its door answered {response.status}")

    async def _frames(self, response: aiohttp.ClientResponse, opener: ResponseOpener) -> AsyncGenerator[Delta | wire.Vectors, None]:
        received = 0
        while data := await self._read(response):
            received += len(data)
            if received > ANSWER_LIMIT:
                raise PeerError("answer", "it is larger than any answer may be", "ask another node")
            for frame in opener.feed(data):
                match wire.parse_frame(frame):
                    case SwarmError() as error:
                        raise error
                    case Delta() | wire.Vectors() as said:
                        yield said
        opener.end()
        raise InferenceError("answer", "it ended without saying how", "ask again")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            # The socket's read timeout is the stall timer: a living node sends a frame every few seconds.
            return await response.content.readany()
        except TimeoutError as error:
            raise Unserved("peer", "it fell silent", "ask another node") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Unserved("peer", "the connection to it broke", "ask another node") from error


class ChatServer:
    """Answers sealed chats with the models that `local` says are served here."""

    def __init__(self, keys: SealKeys, local: Callable[[], Sequence[LocalModel]], *, alive_every_s: float = ALIVE_EVERY_S) -> None:
        self._keys = keys
        self._local = local
        self._alive_every_s = alive_every_s

    async def handle(self, request: web.Request, sealed: bytes) -> web.StreamResponse:
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
        model = next((model for model in self._local() if model.offer.cid == cid), None)
        if model is None:
            raise NotFound("model", "it is not served here any more", "ask another node")
        if isinstance(asked, EmbeddingRequest):
            await self._embed(model.provider, asked, out)
            return
        deltas = model.provider.generate(asked)
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


def _out_of_place() -> PeerError:
    return PeerError("answer", "it is of another kind than the question", "ask another node")


async def _next(deltas: AsyncIterator[Delta]) -> Delta | None:
    return await anext(deltas, None)
