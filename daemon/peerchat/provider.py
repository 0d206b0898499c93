"""A chat with another node, the asking half: a `Provider` whose answers come from a peer.

The body is sealed to the serving node (seal.py), so whatever lies between sees sizes and times only. Closing the answer closes
the connection, and that cancels the generation on the far side.
"""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import AsyncExitStack, aclosing

import aiohttp

from daemon.engine.interface import CAPABILITIES, Capability, Delta, EmbeddingRequest, Embeddings, Request
from daemon.errors import Busy, InferenceError, PeerError, SwarmError, Unserved, VerificationError
from daemon.peerapi.ways import AUTO, CONNECT_S, Way, Ways
from daemon.peerchat import wire
from daemon.peerchat.seal import REQUEST_TYPE, RESPONSE_TYPE, ResponseOpener, seal_request
from daemon.peerchat.server import PATH
from registry.endpoints import relay_address
from registry.records import Peer

STALL_S = 20.0  # silence after which the asker gives a node up
ANSWER_LIMIT = 64 << 20  # bytes of one sealed answer


class PeerProvider:
    """Chats with one model of one peer. A `Provider`; `clock` gives unix seconds, `via` is as for `Ways.to`.

    `relayed_by` is the node key of the relay that carries the answer, once it has begun; None without one.
    """

    def __init__(
        self,
        peer: Peer,
        cid: str,
        *,
        ways: Ways,
        http: aiohttp.ClientSession,
        clock: Callable[[], float],
        via: str = AUTO,
        connect_s: float = CONNECT_S,
        stall_s: float = STALL_S,
    ) -> None:
        self.relayed_by: str | None = None
        self._peer = peer
        self._cid = cid
        self._ways = ways
        self._via = via
        self._connect_s = connect_s
        self._http = http
        self._clock = clock
        self._stall_s = stall_s

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Nodes do not announce theirs; one that cannot says so."""
        return CAPABILITIES

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Raises `Unserved` or `Busy`: another node can be asked."""
        avoid: set[str] = set()
        while True:
            try:
                return await self._vectors(request, avoid)
            except (Unserved, VerificationError):
                if not self._another_relay(avoid):
                    raise

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Raises `Unserved` or `Busy` while another node can still be asked, `InferenceError` once text has come.

        When a relay fails before that, or lies, the next one is taken, and the question is sealed anew.
        """
        question = wire.question(self._cid, request)
        avoid: set[str] = set()
        while True:
            begun = False
            try:
                async with aclosing(self._deltas(question, avoid)) as deltas:
                    async for delta in deltas:
                        begun = begun or bool(delta.text or delta.tool_calls)
                        yield delta
                return
            except (Unserved, VerificationError) as error:
                if not begun and self._another_relay(avoid):
                    continue
                if begun and isinstance(error, Unserved):
                    why = f"{error.why} in the middle"
                    raise InferenceError("answer", why, "ask again") from error
                raise

    async def _vectors(self, request: EmbeddingRequest, avoid: Collection[str]) -> Embeddings:
        async with AsyncExitStack() as stack:
            response, opener = await self._ask(stack, wire.question(self._cid, request), avoid)
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

    async def _deltas(
        self, question: bytes, avoid: Collection[str]
    ) -> AsyncGenerator[Delta, None]:
        async with AsyncExitStack() as stack:
            response, opener = await self._ask(stack, question, avoid)
            frames = await stack.enter_async_context(aclosing(self._frames(response, opener)))
            async for said in frames:
                if not isinstance(said, Delta):
                    raise _out_of_place()
                yield said
                if said.finish is not None:
                    return

    def _another_relay(self, avoid: set[str]) -> bool:
        """Whether what has just failed was behind a relay, and another one is left; `avoid` names it from now on."""
        failed = self.relayed_by
        if failed is None or self._via != AUTO:
            return False
        avoid.add(failed)
        relays = {relay_address(point).node for point in self._peer.address.relays}
        return not relays <= avoid

    async def _ask(
        self, stack: AsyncExitStack, question: bytes, avoid: Collection[str]
    ) -> tuple[aiohttp.ClientResponse, ResponseOpener]:
        """The response to the sealed question, over the first way that works; `stack` closes it."""
        stack.enter_context(self._ways.an_answer())
        self.relayed_by = None
        sealed, opener = self._seal(question)
        way = await stack.enter_async_context(
            self._ways.to(self._peer, via=self._via, avoid=avoid, deadline_s=self._connect_s)
        )
        self.relayed_by = way.via
        response = await self._post(way, sealed)
        stack.callback(response.close)
        return response, opener

    def _seal(self, question: bytes) -> tuple[bytes, ResponseOpener]:
        keys = [key for key in self._peer.seal_keys if key.expires > self._clock()]
        if not keys:
            raise Unserved("peer", "it announced no key for sealed chat that is still good")
        return seal_request(question, node=self._peer.node, key=max(keys, key=lambda key: key.expires))

    async def _post(self, way: Way, sealed: bytes) -> aiohttp.ClientResponse:
        # Never "Connection: close": the far Kubo resets its libp2p stream once the peer API has closed, and over QUIC a reset
        # throws away what is still on its way, the end of the answer. We are the ones to close.
        headers = {**way.headers, "Content-Type": REQUEST_TYPE}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=self._stall_s)
        body = io.BytesIO(sealed)
        try:
            response = await self._http.post(way.url + PATH, data=body, headers=headers, timeout=timeout, allow_redirects=False)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise Unserved("peer", "it cannot be reached") from error
        if response.status == 200 and response.content_type == RESPONSE_TYPE:
            return response
        # Anybody on the way could have written this, so it says no more than "try elsewhere".
        response.close()
        if response.status == 429:
            raise Busy("peer", "it has as many chats as it takes", "try again soon")
        raise Unserved("peer", f"its peer API answered {response.status}")

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


def _out_of_place() -> PeerError:
    return PeerError("answer", "it is of another kind than the question", "ask another node")
