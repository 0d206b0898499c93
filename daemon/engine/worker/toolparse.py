"""From the text of an answer to what a client gets: text, and calls whose arguments come as they grow.

Nothing is held back but what may be the beginning of a call. A call is told when its arguments begin: from then on it
stands, whatever follows. What only looks like a call is given back as text; that happens where no grammar is at work, or
when an answer is cut off.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection

from daemon.engine.codec import MAX_CALLS
from daemon.engine.interface import Delta, ToolCallDelta
from daemon.engine.worker.tools import Format, Watch, match


def new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class JsonObject:
    """Follows one JSON object through pieces of text, to know where it ends. What stands in it is not checked."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = False
        self._escaped = False

    def push(self, text: str, at: int) -> tuple[int, bool]:
        """Where the object ends in `text`, which is read from `at` on, and whether it does at all."""
        for place in range(at, len(text)):
            character = text[place]
            if self._escaped:
                self._escaped = False
            elif self._string:
                self._escaped = character == "\\"
                self._string = character != '"'
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return place + 1, True
        return len(text), False


class ToolParser:
    """One answer. `names` are the tools that were offered; `thinking` says that the prompt ended in <think>.

    `only`: the answer is held to calls, so whatever text there is are marks around them, or one that was cut off.
    """

    def __init__(
        self, style: Format, names: Collection[str], thinking: bool = False, make_id: Callable[[], str] = new_id, *, only: bool = False
    ) -> None:
        self._style = style
        self._only = only
        self._names = frozenset(names)
        self._make_id = make_id
        self._watch = Watch(style, thinking)
        self._held = ""  # what is read of a call and not told
        self._state: Callable[[], bool] = self._wait
        self._marks: tuple[str, ...] = ()
        self._arguments = JsonObject()
        self._text: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self.calls = 0  # how many have begun

    def push(self, text: str) -> Delta:
        """What is certain after `text`: a delta with text and pieces of calls, maybe empty."""
        self._held += text
        while self._state():
            pass
        return self._take()

    def finish(self) -> Delta:
        """What was held back, at the end of the answer."""
        if self._state == self._wait:
            rest = self._watch.held
            self._text.append(rest if rest.strip() or not self.calls else "")
        elif self._state == self._begin and not self._inside():
            self._text.append(self._held)
        self._held = ""
        return self._take()

    def _take(self) -> Delta:
        delta = Delta(text="" if self._only else "".join(self._text), tool_calls=tuple(self._calls))
        self._text.clear()
        self._calls.clear()
        return delta

    # Each state reads from `_held` what it can and says whether another state has work to do.

    def _wait(self) -> bool:
        """Between calls."""
        text, self._held = self._held, ""
        if self.calls >= MAX_CALLS or (self.calls and self._style.alone):
            self._text.append(text)
            return False
        self._text.append(self._watch.push(text))
        if not self._watch.found:
            return False
        self._held, self._marks, self._state = self._watch.held, self._style.head, self._begin
        return True

    def _begin(self) -> bool:
        """From the first mark to the first character of the arguments."""
        at, name = match((*self._style.call(self._marks), "{"), self._held, 0)
        if at is None:
            return False
        if at < 0 or name not in self._names:
            return self._broken()
        self._calls.append(ToolCallDelta(self.calls, self._make_id(), name))
        self.calls += 1
        self._arguments = JsonObject()
        self._held, self._state = self._held[at - 1 :], self._argue
        return True

    def _argue(self) -> bool:
        at, over = self._arguments.push(self._held, 0)
        if at:
            self._calls.append(ToolCallDelta(self.calls - 1, arguments=self._held[:at]))
        self._held = self._held[at:]
        if over:
            self._state = self._end
        return over

    def _end(self) -> bool:
        """Behind the arguments."""
        at, _ = match(("", *self._style.tail), self._held, 0)
        if at is None:
            return False
        if at < 0:
            return self._outside(self._held)
        if not self._style.more:
            return self._outside(self._held[at:])
        self._held, self._state = self._held[at:], self._between
        return True

    def _between(self) -> bool:
        """Behind one call of several between common marks."""
        over, _ = match(("", *self._style.end), self._held, 0)
        if over is None:
            return False
        if over >= 0:
            return self._outside(self._held[over:])
        if self.calls >= MAX_CALLS:
            return self._outside(self._held)
        self._marks, self._state = ("", *self._style.more), self._begin
        return True

    def _inside(self) -> bool:
        return self._marks != self._style.head

    def _broken(self) -> bool:
        if self._inside():
            return self._outside(self._held)
        self._text.append(self._watch.reject(self._held))
        self._held = self._watch.held if self._watch.found else ""
        if not self._watch.found:
            self._state = self._wait
        return self._watch.found

    def _outside(self, text: str) -> bool:
        self._watch.again()
        self._held, self._state = text, self._wait
        return True
