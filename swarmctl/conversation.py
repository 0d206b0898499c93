"""A conversation as `swarmctl chat` holds it, and what typed lines mean. Pure: no files, no terminal, no daemon.

- The whole conversation is sent with every question; nobody else remembers it.
- A question that got no answer is taken back. One that is asked again takes its old answer out only when the new one is there.
- An answer that was stopped stays as far as it came.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swarmctl.failure import NOT_FOUND, USAGE, Failure

MAX_TEXT = 1024 * 1024  # characters of one question; the daemon's ceiling for a conversation is 4 MiB

Message = dict[str, str]


class Conversation:
    """`model` is what the daemon is asked for: a code, CID or name, or None for its choice. `system` goes before everything."""

    def __init__(self, model: str | None = None, system: str | None = None, turns: Sequence[Message] = ()) -> None:
        self.model = model
        self.system = system
        self.turns = list(turns)
        self._before = self.turns
        self._question: str | None = None
        self._place = 0  # how many turns stand before the last question
        for place, turn in enumerate(turns):
            if turn["role"] == "user":
                self._question, self._place = turn["content"], place
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def ask(self, question: str) -> list[Message]:
        """The messages to send. `answered` or `take_back` must follow."""
        return self._send(question, len(self.turns))

    def again(self) -> list[Message]:
        """As `ask`, with the last question once more."""
        if self._question is None:
            raise Failure(USAGE, "/retry: nothing was asked yet", "ask something")
        return self._send(self._question, self._place)

    def answered(self, text: str) -> None:
        self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        self.turns = self._before

    def clear(self) -> None:
        """Forget everything but the system prompt and the model."""
        self.turns = []
        self._question = None

    def messages(self) -> list[Message]:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.turns]

    def document(self) -> dict[str, Any]:
        """As it is saved: `model` and `messages`."""
        return {"model": self.model, "messages": self.messages()}

    def _send(self, question: str, place: int) -> list[Message]:
        self._before = self.turns
        self._question, self._place = question, place
        self.turns = [*self.turns[:place], {"role": "user", "content": question}]
        return self.messages()


def from_document(document: Any) -> Conversation:
    """The conversation of `document()`; fields that it does not know are left out. Raises `ValueError` with why it is none."""
    if not isinstance(document, dict) or not isinstance(document.get("messages"), list):
        raise ValueError("it has no list of messages")
    model = document.get("model")
    if model is not None and not isinstance(model, str):
        raise ValueError("its model is not text")
    messages = [_message(value) for value in document["messages"]]
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
    if any(message["role"] == "system" for message in messages):
        raise ValueError("a system prompt stands in its middle")
    return Conversation(model, system, messages)


def _message(value: Any) -> Message:
    if not isinstance(value, dict) or value.get("role") not in ("system", "user", "assistant") or not isinstance(value.get("content"), str):
        raise ValueError("a message is not a role (system, user or assistant) with content")
    return {"role": value["role"], "content": value["content"]}


# -- what is typed ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Say:
    """Text for the model."""

    text: str


@dataclass(frozen=True, slots=True)
class Order:
    """A slash command."""

    name: str
    argument: str


ORDERS = {
    "help": ("", "what can be typed"),
    "clear": ("", "forget the conversation; the system prompt stays"),
    "model": ("[#CODE]", "what can be asked; with a code, CID or name: ask it from now on"),
    "system": ("[TEXT]", "the system prompt; with TEXT: set it, with -: remove it"),
    "save": ("[FILE]", "write the conversation to FILE; once more to the same without FILE"),
    "retry": ("", "ask the last question again, in place of its answer"),
    "exit": ("", "leave; so does Ctrl-D"),
}


NOTES = {
    "//TEXT": "say a text that begins with a slash",
    "TEXT\\": "a backslash at the end: the text goes on in the next line",
    '"""': "begins and ends a text of several lines, which is taken as it is",
    "Ctrl-C": "stop the answer; what it said so far stays",
}


def usage() -> str:
    """The text of /help."""
    rows = {f"/{name} {argument}".rstrip(): what for name, (argument, what) in ORDERS.items()} | NOTES
    return "\n".join(f"{typed:<15}{what}" for typed, what in rows.items())


def parse(text: str) -> Say | Order | None:
    """What a line means; None when it is blank. Raises `Failure` for a slash command that does not exist or does not fit."""
    line = text.strip()
    if not line.startswith("/"):
        return Say(text) if line else None
    if line.startswith("//"):
        return Say(line[1:])
    name, argument = [*re.split(r"\s+", line[1:], maxsplit=1), ""][:2]
    if name not in ORDERS:
        raise Failure(USAGE, f"/{name}: no such command", "/help lists them; begin with // to say it")
    if argument and not ORDERS[name][0]:
        raise Failure(USAGE, f"/{name}: it takes nothing behind it", "/help lists the commands; begin with // to say it")
    return Order(name, argument)


class Lines:
    """Puts typed lines together: a backslash at the end, or three quotation marks, and a text goes on."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._quoted = False

    @property
    def open(self) -> bool:
        """Whether the next line belongs to what was typed already."""
        return self._quoted or bool(self._parts)

    def feed(self, line: str) -> Say | Order | None:
        """What is complete now. Raises `Failure`; then nothing is open any more."""
        if sum(map(len, self._parts)) + len(line) > MAX_TEXT:
            self.drop()
            raise Failure(USAGE, f"chat: the text has more than {MAX_TEXT} characters", "send less")
        if self._quoted:
            return self._quote(line)
        if not self._parts and line.lstrip().startswith('"""'):
            self._quoted = True
            return self._quote(line.lstrip()[3:])
        self._parts.append(line.removesuffix("\\"))
        return None if line.endswith("\\") else self._complete()

    def end(self) -> Say | Order | None:
        """What is open when no line follows. Raises `Failure` when its end is missing."""
        if self._quoted:
            self.drop()
            raise Failure(USAGE, 'chat: the text that began with """ has no end', 'end it with """')
        return self._complete()

    def drop(self) -> None:
        """Forget what is open."""
        self._parts, self._quoted = [], False

    def _quote(self, line: str) -> Say | None:
        ended = line.rstrip().endswith('"""')
        self._parts.append(line.rstrip()[:-3] if ended else line)
        if not ended:
            return None
        text = "\n".join(self._parts).strip("\n")
        self.drop()
        return Say(text) if text.strip() else None

    def _complete(self) -> Say | Order | None:
        text = "\n".join(self._parts)
        self.drop()
        return parse(text)


# -- which model --------------------------------------------------------------------------------------------------------


def means(model: str | None, row: Mapping[str, Any]) -> bool:
    """Whether `model` is a row of `swarmctl models`."""
    if model is None:
        return False
    ref = model.removeprefix("ipfs://")
    code = model.removeprefix("#").lower()
    names = ("cid", "manifest", "name", "infohash", "infohash_v2", "magnet")
    return code.startswith(row["code"]) or ref in [row[name] for name in names]


def choose(model: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `model` can be asked now: somebody serves it, or it is here and loaded on first use.

    Raises `Failure` when nobody has it.
    """
    found = [row for row in rows if means(model, row)]
    if not found:
        raise Failure(NOT_FOUND, f"{model}: no node that is known has it", "/model in a chat, or swarmctl models, lists what there is")
    return any(row["serving"] or row["local"] for row in found)
