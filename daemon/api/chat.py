"""A question and its answer, whichever route asks: messages are checked, deltas are counted, what was cut off is an error."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from daemon.api import sse, views
from daemon.api.body import Fields
from daemon.api.services import Answer, Answers
from daemon.engine.interface import ChatRequest, Delta, FinishReason, Request, Sampling, Usage
from daemon.errors import Unserved, UsageError

MAX_MESSAGES = 4096
MAX_TOKENS = 2**31 - 1
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def messages(fields: Fields) -> tuple[dict[str, Any], ...]:
    """The `messages` of a chat as role and text. Raises `UsageError` for what is no chat, or has nothing to answer."""
    given = fields.take("messages")
    if not isinstance(given, list) or not given:
        raise fields.wrong("messages", "must be a list of at least one message")
    if len(given) > MAX_MESSAGES:
        raise fields.wrong("messages", f"has more than {MAX_MESSAGES} messages")
    found = tuple(_message(value, f"messages[{place}].") for place, value in enumerate(given))
    if not found[-1]["content"].strip():
        raise fields.wrong("messages", "end with an empty message: there is nothing to answer")
    return found


def _message(value: Any, within: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UsageError(within[:-1], "is not an object", "send role and content")
    fields = Fields(value, within)
    role = fields.take("role")
    if not isinstance(role, str) or role not in ROLES:
        raise fields.wrong("role", "must be system, developer, user or assistant")
    text = _content(fields, fields.take("content"), role)
    fields.text("name")  # templates have no place for it
    for name in ("tool_calls", "annotations"):
        # A client that sends our own answer back includes these, empty.
        if fields.take(name) not in (None, []):
            raise fields.wrong(name, "is not supported yet")
    fields.done()
    return {"role": ROLES[role], "content": text}


def _content(fields: Fields, content: Any, role: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise fields.wrong("content", "must be text or a list of text parts")
    texts = []
    for part in content:
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text" or not isinstance(part["text"], str):
            raise fields.wrong("content", "has a part that is not text; only text is supported")
        texts.append(part["text"])
    return "".join(texts)


@dataclass
class Asking:
    """One answer as it comes, timed and counted."""

    answer: Answer
    started: float
    first: float | None = None
    last: float | None = None
    finish: FinishReason | None = None
    usage: Usage | None = None

    async def texts(self) -> AsyncGenerator[str, None]:
        """The texts of the answer. Raises `Unserved` when it ends without saying how."""
        async for delta in self.answer.deltas:
            self._note(delta)
            if delta.text:
                yield delta.text
        if self.finish is None:
            raise Unserved("answer", "it was cut off before its end", "ask again")

    def _note(self, delta: Delta) -> None:
        if delta.text:
            self.last = time.monotonic()
            self.first = self.first or self.last
        self.finish = delta.finish or self.finish
        self.usage = delta.usage or self.usage

    def counted(self) -> dict[str, int] | None:
        return None if self.usage is None else views.usage(self.usage)

    def figures(self) -> dict[str, float | None]:
        """`ttft_ms` and `tokens_per_second` (decoding alone, so the first token does not count)."""
        if self.first is None or self.last is None:
            return {"ttft_ms": None, "tokens_per_second": None}
        tokens = self.usage.completion_tokens - 1 if self.usage else 0
        seconds = self.last - self.first
        return {
            "ttft_ms": round((self.first - self.started) * 1000, 1),
            "tokens_per_second": round(tokens / seconds, 1) if tokens > 0 and seconds > 0 else None,
        }


@asynccontextmanager
async def asking(answers: Answers, model: str | None, request: Request) -> AsyncIterator[tuple[Asking, AsyncIterator[str]]]:
    """Ask, and give the answer up (which cancels it where it is made) when the context ends, however it ends."""
    started = time.monotonic()
    answer = await answers.open(model, request)
    asked = Asking(answer, started)
    texts = asked.texts()
    try:
        yield asked, texts
    finally:
        await texts.aclose()
        await sse.close(answer.deltas)


def own_request(fields: Fields) -> ChatRequest:
    """A chat in our own field names: `messages`, `maxTokens`, `temperature`."""
    given = {
        "max_tokens": fields.integer("maxTokens", 1, MAX_TOKENS),
        "temperature": fields.number("temperature", 0, 2),
    }
    return request(messages(fields), given)


def request(messages: tuple[dict[str, Any], ...], given: Mapping[str, Any]) -> ChatRequest:
    """The request with what was given; the rest as `ChatRequest` has it."""
    return ChatRequest(messages, Sampling(**{name: value for name, value in given.items() if value is not None}))
