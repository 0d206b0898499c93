"""Conversations that the daemon remembers, so that a client sends only what is new.

- They live in memory alone: what people say to a model is not written to disk.
- An answer that ended well is kept with its question; of any other nothing is kept, and the question can be asked again.
- One question at a time: two at once would each be answered without the other.
- A conversation that nobody used for its `timeout` is forgotten, never one that waits for an answer. None is forgotten to make
  room for another: who comes when it is full has to wait.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from daemon.engine.codec import MAX_MESSAGES
from daemon.errors import Busy, NotFound, UsageError
from registry import strictjson

MAX_SESSIONS: Final = 1024
MAX_SIZE: Final = 4 << 20  # bytes of JSON of the messages of one, as of a request
MAX_SIZE_OF_ALL: Final = 64 << 20
MAX_TIMEOUT_S: Final = 7 * 24 * 3600
_FORGOTTEN: Final = 4096  # ids that are remembered as expired
_SWEEP_S: Final = 10.0

Message = dict[str, Any]


class Taken(UsageError):
    http_status = 409


@dataclass
class Session:
    """`model` is a code, None until the first answer when it was not chosen. Times are unix seconds."""

    id: str
    model: str | None
    timeout: float
    created: float
    used: float
    messages: tuple[Message, ...]
    size: int
    asked: bool = False

    @property
    def expires(self) -> float:
        return self.used + self.timeout


class Sessions:
    """`timeout` is in seconds, for sessions that do not choose their own; `clock` gives unix seconds."""

    def __init__(self, timeout: float, clock: Callable[[], float]) -> None:
        self._timeout = timeout
        self._clock = clock
        self._open: dict[str, Session] = {}
        self._expired: dict[str, None] = {}

    def create(self, model: str | None, messages: Sequence[Message] = (), timeout: float | None = None) -> Session:
        """Raises `Busy` when there is no room."""
        self.expire()
        if len(self._open) >= MAX_SESSIONS:
            raise Busy("sessions", f"there are {MAX_SESSIONS} already", "delete one, or wait until one expires")
        size = self._check_size(messages, now=0)
        session = Session(
            id=secrets.token_urlsafe(18),
            model=model,
            timeout=self._timeout if timeout is None else timeout,
            created=self._clock(),
            used=self._clock(),
            messages=tuple(messages),
            size=size,
        )
        self._open[session.id] = session
        return session

    def all(self) -> list[Session]:
        self.expire()
        return list(self._open.values())

    def get(self, session_id: str) -> Session:
        """Raises `NotFound`."""
        self.expire()
        found = self._open.get(session_id)
        if found is None:
            why = "it has expired" if session_id in self._expired else "there is no such session"
            raise NotFound("session", why, "POST /api/ai/sessions begins one")
        return found

    def delete(self, session_id: str) -> Session:
        """Raises `NotFound`. An answer that is on its way comes to its end, and is not kept."""
        session = self.get(session_id)
        del self._open[session_id]
        return session

    @contextmanager
    def question(self, session_id: str, messages: Sequence[Message]) -> Iterator[Question]:
        """Ask in a session: what is kept is decided by `answered`. Raises `NotFound`, `Taken`, `Busy` and `UsageError`."""
        session = self.get(session_id)
        if session.asked:
            raise Taken("session", "it waits for an answer already", "ask again when that has come")
        asked = Question(session, (*session.messages, *messages))
        if len(asked.messages) >= MAX_MESSAGES:
            raise UsageError("session", f"it would have more than {MAX_MESSAGES} messages", "begin another")
        self._check_size(asked.messages, now=session.size)
        session.asked, session.used = True, self._clock()
        try:
            yield asked
        finally:
            session.asked, session.used = False, self._clock()

    def expire(self) -> None:
        """Forget those whose time is over."""
        now = self._clock()
        for session in [one for one in self._open.values() if not one.asked and one.expires <= now]:
            del self._open[session.id]
            self._expired[session.id] = None
        while len(self._expired) > _FORGOTTEN:
            del self._expired[next(iter(self._expired))]

    async def sweep(self) -> None:
        """Without end: what has expired leaves the memory also when nobody asks for any session."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.expire()

    def _check_size(self, messages: Sequence[Message], now: int) -> int:
        """Bytes of what a session that has `now` would have. Raises `UsageError` and `Busy`."""
        size = _size(messages)
        if size > MAX_SIZE:
            raise UsageError("session", f"it would have more than {MAX_SIZE} bytes", "begin another")
        if sum(session.size for session in self._open.values()) - now + size > MAX_SIZE_OF_ALL:
            raise Busy("sessions", f"they would have more than {MAX_SIZE_OF_ALL} bytes", "delete some, or wait until some expire")
        return size


class Question:
    """A question in a session. `messages` are the whole conversation, the question last."""

    def __init__(self, session: Session, messages: tuple[Message, ...]) -> None:
        self.session = session
        self.messages = messages

    def answered(self, text: str, model: str) -> None:
        """Keep question and answer; `model` is the code of what answered, with which the conversation goes on.

        An answer has its room in any case: the next question is what no longer fits.
        """
        self.session.messages = (*self.messages, {"role": "assistant", "content": text})
        self.session.size = _size(self.session.messages)
        self.session.model = self.session.model or model


def _size(messages: Sequence[Message]) -> int:
    return len(strictjson.dumps(list(messages)))


SESSIONS = web.AppKey("sessions", Sessions)
