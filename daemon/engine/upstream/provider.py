"""An OpenAI-compatible server as a `Provider`: Ollama, llama-server, vLLM, another node, a cloud.

- Only addresses that the node's `network` allows are connected to (reach.py).
- Redirects, proxies, cookies and compressed answers are not followed, used, kept or read. https verifies certificates.
- The key goes into one header. No error, log line or answer has it.
- Closing an answer closes its connection, and that is how a server learns that nobody reads on.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from daemon.engine.interface import CAPABILITIES, Capability, Delta, EmbeddingRequest, Embeddings, Request
from daemon.engine.upstream import form, reading
from daemon.engine.upstream.reach import Outside
from daemon.errors import Busy, InferenceError, ModelLoadError, SwarmError, Unserved, UsageError
from registry import strictjson
from registry.errors import Malformed


@dataclass(frozen=True, slots=True)
class Limits:
    slots: int = 4  # requests under way at once
    connect_s: float = 10.0
    first_s: float = 600.0  # until the first word: a model may have to be loaded, a long prompt read
    silence_s: float = 120.0  # between two words
    whole_s: float = 600.0  # for an answer that comes as a whole
    answer: int = 64 << 20  # bytes


class UpstreamProvider:
    """One model of an upstream. `url` is from `form.base_url`, `http` from `open_session`; closing this closes it."""

    def __init__(self, url: str, model: str, key: str | None, http: aiohttp.ClientSession, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._url = url
        self._model = model
        self._key = key
        self._http = http
        self._busy = 0
        self._closed = False
        self._waits: set[asyncio.Timeout] = set()
        self._limit_name = "max_tokens"
        self._lacks: set[str] = set()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """All, less what the upstream turned out to have no route for. What else it cannot, it refuses when it is asked."""
        return CAPABILITIES - self._lacks

    @property
    def free_slots(self) -> int:
        return self.limits.slots - self._busy

    async def models(self) -> list[str] | None:
        """The models that it lists; None when it has no such list. Asking costs nothing. Raises as `embed` does."""
        try:
            return reading.models(await self._whole("GET", "/models", None, "a list of models"))
        except (form.Lacking, ModelLoadError):
            return None
        except Malformed as error:
            raise _not_openai(error) from error

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Raises as `Provider` says."""
        with self._slot("embeddings"):
            document = await self._whole("POST", "/embeddings", form.embedding_body(self._model, request), "embeddings")
            try:
                return await asyncio.to_thread(reading.embeddings, document, len(request.inputs))
            except Malformed as error:
                raise _not_openai(error) from error

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Raises as `Provider` says; what is cut off never looks like an end."""
        what = form.capability(request)
        reader = reading.AnswerReader(request)
        with self._slot(what):
            async with AsyncExitStack() as stack:
                response = await self._streamed(stack, request, what)
                events = await stack.enter_async_context(aclosing(self._events(response)))
                try:
                    async for event in events:
                        if event == reading.DONE:
                            break
                        delta = reader.take(event, self._key)
                        if delta is not None:
                            yield delta
                except Malformed as error:
                    raise _not_openai(error) from error
                except InferenceError:
                    # All of it came; only the figures behind it are missing.
                    if reader.finish is None:
                        raise
                yield reader.end()

    async def close(self) -> None:
        """Break off what is under way. Idempotent."""
        self._closed = True
        # aiohttp closes the connections of a session and lets those that read from them wait.
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(0)
        await self._http.close()

    @asynccontextmanager
    async def _within(self, seconds: float) -> AsyncIterator[None]:
        """Raises `TimeoutError` after `seconds`, or when this is closed."""
        if self._closed:
            raise TimeoutError
        async with asyncio.timeout(seconds) as wait:
            self._waits.add(wait)
            try:
                yield
            finally:
                self._waits.discard(wait)

    @contextmanager
    def _slot(self, what: str) -> Iterator[None]:
        if what in self._lacks:
            raise form.Lacking(what)
        if self._busy >= self.limits.slots:
            raise Busy("upstream", f"{self.limits.slots} requests to it are under way", "try again soon")
        self._busy += 1
        try:
            yield
        except form.Lacking as error:
            self._lacks.add(error.capability)
            raise
        finally:
            self._busy -= 1

    async def _streamed(self, stack: AsyncExitStack, request: Request, what: str) -> aiohttp.ClientResponse:
        try:
            return await self._asked(stack, request, what)
        except UsageError as error:
            # OpenAI's newer models know the ceiling under its new name alone, most other servers under the old one.
            if "max_completion_tokens" not in error.why or self._limit_name != "max_tokens":
                raise
        self._limit_name = "max_completion_tokens"
        return await self._asked(stack, request, what)

    async def _asked(self, stack: AsyncExitStack, request: Request, what: str) -> aiohttp.ClientResponse:
        body = form.body(self._model, request, self._limit_name)
        response = await self._open(stack, "POST", form.route(request), body, what, self.limits.first_s)
        if response.content_type != "text/event-stream":
            raise InferenceError("upstream", "its answer is no event stream", "is it an OpenAI-compatible server?")
        return response

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        events = reading.EventReader()
        seconds, received = self.limits.first_s, 0
        while data := await self._read(response, seconds):
            received += len(data)
            if received > self.limits.answer:
                raise InferenceError("upstream", "its answer is larger than any may be", "ask for less")
            for event in events.feed(data):
                seconds = self.limits.silence_s
                yield event
        for event in events.end():
            yield event

    async def _whole(self, method: str, path: str, body: dict[str, Any] | None, what: str) -> Any:
        """The JSON of an answer that is no stream."""
        data = bytearray()
        async with AsyncExitStack() as stack:
            response = await self._open(stack, method, path, body, what, self.limits.whole_s)
            while piece := await self._read(response, self.limits.silence_s):
                data += piece
                if len(data) > self.limits.answer:
                    raise InferenceError("upstream", "its answer is larger than any may be", "ask for less")
        try:
            return await asyncio.to_thread(strictjson.loads, bytes(data), limit=self.limits.answer, what="the answer")
        except Malformed as error:
            raise _not_openai(error) from error

    async def _open(
        self, stack: AsyncExitStack, method: str, path: str, body: dict[str, Any] | None, what: str, seconds: float
    ) -> aiohttp.ClientResponse:
        """A response of success; `stack` closes it."""
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = io.BytesIO(strictjson.dumps(body, sort_keys=False))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_s)
        try:
            async with self._within(seconds):
                response = await self._http.request(
                    method, self._url + path, data=data, headers=headers, timeout=timeout, allow_redirects=False
                )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _ended() if self._closed else _unreached(error) from error
        stack.callback(response.close)
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise InferenceError("upstream", "it compresses its answer unasked", "use another server")
        if response.status != 200:
            raise await self._failure(response, what)
        return response

    async def _failure(self, response: aiohttp.ClientResponse, what: str) -> SwarmError:
        said = bytearray()
        try:
            while len(said) <= form.MAX_FAILURE and (piece := await self._read(response, self.limits.connect_s)):
                said += piece
        except InferenceError:
            pass  # the status says enough
        return form.failure(response.status, bytes(said), self._key, what)

    async def _read(self, response: aiohttp.ClientResponse, seconds: float) -> bytes:
        try:
            async with self._within(seconds):
                return await response.content.readany()
        except TimeoutError as error:
            raise _ended() if self._closed else InferenceError("upstream", "it fell silent", "ask again") from error
        except (aiohttp.ClientError, OSError) as error:
            raise InferenceError("upstream", "the connection to it broke", "ask again") from error


def _ended() -> InferenceError:
    return InferenceError("upstream", "it is not served here any more", "ask another node")


def _unreached(error: Exception) -> SwarmError:
    why = "it cannot be reached"
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, Outside):
        why = str(error.os_error)
    elif isinstance(error, aiohttp.ClientSSLError | aiohttp.ClientConnectorCertificateError):
        why = "its certificate does not verify"
    elif type(error) is TimeoutError:
        why = "it says nothing"
    return Unserved("upstream", why, "is it running, and is the URL right?")


def _not_openai(error: Malformed) -> InferenceError:
    return InferenceError("upstream", f"its answer cannot be read: {error}", "is it an OpenAI-compatible server?")
