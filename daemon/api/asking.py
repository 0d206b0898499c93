"""Questions and their answers, whichever route asks: begun, timed, counted and given up together; what was cut off is an error.

Of several questions with one prompt the first begins alone. The others begin when it has, and so find its prompt in the KV cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from daemon.api.services import Answer, Answers
from daemon.api.tally import Tally
from daemon.engine.interface import Delta, FinishReason, Request, Usage
from daemon.errors import Busy, Unserved
from daemon.peerapi.ways import AUTO
from daemon.waiting import close

TOGETHER: Final = 8  # answers to one caller that come at the same time; the rest of them waits here, not in a model's queue
MAX_ANSWER: Final = 16 << 20  # characters; what a peer may send before it is taken for one that never ends
_CANDIDATE: Final = 64  # characters that each candidate of the logprobs counts for
_AHEAD: Final = 64  # pieces that wait for a slow caller

Part = tuple[int, Delta]  # which question, and a piece of its answer


@dataclass
class Reply:
    """One answer as it comes, timed and counted."""

    answer: Answer
    started: float
    first: float | None = None
    last: float | None = None
    finish: FinishReason | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    size: int = 0

    def note(self, delta: Delta) -> None:
        """Raises `Unserved` when the answer is larger than any model's."""
        self.size += len(delta.text) + sum(len(call.arguments) for call in delta.tool_calls)
        self.size += sum(1 + len(token.likeliest) for token in delta.logprobs) * _CANDIDATE
        if self.size > MAX_ANSWER:
            raise Unserved("answer", f"it has more than {MAX_ANSWER} characters and no end", "ask for fewer tokens")
        if delta.text or delta.tool_calls:
            self.last = time.monotonic()
            self.first = self.first or self.last
        self.finish = delta.finish or self.finish
        self.usage = delta.usage or self.usage

    def figures(self) -> dict[str, float | None]:
        """`ttft_ms` and `tokens_per_second` (decoding alone, so the first token does not count)."""
        if self.first is None or self.last is None:
            return {"ttft_ms": None, "tokens_per_second": None}
        tokens, seconds = self.usage.completion_tokens - 1, self.last - self.first
        return {
            "ttft_ms": round((self.first - self.started) * 1000, 1),
            "tokens_per_second": round(tokens / seconds, 1) if tokens > 0 and seconds > 0 else None,
        }


class Asking:
    """The answers to `requests`, of which each `each` that follow one another have the same prompt.

    `via` is as `Answers.open` has it.
    """

    def __init__(
        self,
        answers: Answers,
        tally: Tally,
        model: str | None,
        requests: Sequence[Request],
        each: int,
        via: str,
    ) -> None:
        self._answers = answers
        self._tally = tally
        self._model = model
        self._requests = requests
        self._each = each
        self._via = via
        self.replies: dict[int, Reply] = {}  # those that have begun
        self._coming: set[asyncio.Future[None]] = set()  # one for each that has begun and not ended

    @property
    def first(self) -> Reply:
        """Once a part has come."""
        return next(iter(self.replies.values()))

    def usage(self) -> Usage:
        """Of all answers, each prompt counted once."""
        used = [self.replies[index].usage for index in range(len(self._requests))]
        prompts = used[:: self._each]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
            completion_tokens=sum(usage.completion_tokens for usage in used),
            cached_tokens=sum(usage.cached_tokens for usage in prompts),
        )

    def parts(self) -> AsyncGenerator[Part, None]:
        """The pieces of all answers as they come. Raises what any of them raises, `Unserved` when one ends without saying how."""
        return self._one(0) if len(self._requests) == 1 else self._merged()

    async def _one(self, index: int) -> AsyncGenerator[Part, None]:
        started = time.monotonic()
        with self._tally.answer() as counted:
            answer = await self._open(index)
            reply = self.replies[index] = Reply(answer, started)
            counted.begin()
            over = asyncio.get_running_loop().create_future()
            self._coming.add(over)
            try:
                async for delta in answer.deltas:
                    reply.note(delta)
                    if delta.usage is not None:
                        counted.used(delta.usage)
                    yield index, delta
            finally:
                self._coming.discard(over)
                try:
                    await close(answer.deltas)
                finally:
                    over.set_result(None)
            if reply.finish is None:
                raise Unserved("answer", "it was cut off before its end", "ask again")

    async def _open(self, index: int) -> Answer:
        """Where there is room for some of the answers and not for all, the others take turns. Raises what `Answers.open` does."""
        while True:
            try:
                return await self._answers.open(self._model, self._requests[index], via=self._via)
            except Busy:
                if not self._coming:
                    raise
                await asyncio.wait(self._coming, return_when=asyncio.FIRST_COMPLETED)

    async def _merged(self) -> AsyncGenerator[Part, None]:
        came: asyncio.Queue[Part | BaseException | None] = asyncio.Queue(_AHEAD)  # None: one answer has ended
        begun = [asyncio.Event() for _ in self._requests[:: self._each]]
        room = asyncio.Semaphore(TOGETHER)

        async def pump(index: int) -> None:
            leader, follows = begun[index // self._each], index % self._each > 0
            if follows:
                await leader.wait()
            async with room:
                parts = self._one(index)
                try:
                    async for part in parts:
                        leader.set()
                        await came.put(part)
                    await came.put(None)
                except Exception as error:  # raised again by whoever reads
                    await came.put(error)
                finally:
                    leader.set()
                    await parts.aclose()

        pumps = [asyncio.create_task(pump(index)) for index in range(len(self._requests))]
        try:
            left = len(pumps)
            while left:
                part = await came.get()
                if isinstance(part, BaseException):
                    raise part
                if part is None:
                    left -= 1
                else:
                    yield part
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.wait(pumps)


@asynccontextmanager
async def asking(
    answers: Answers,
    tally: Tally,
    model: str | None,
    requests: Sequence[Request],
    each: int = 1,
    via: str = AUTO,
) -> AsyncIterator[tuple[Asking, AsyncIterator[Part]]]:
    """Ask, and give the answers up (which cancels them where they are made) when the context ends, however it ends."""
    asked = Asking(answers, tally, model, requests, each, via)
    parts = asked.parts()
    try:
        yield asked, parts
    finally:
        await parts.aclose()
