"""How models write that they want a tool called, and how conversations about tools are told to models that know none.

Each family has its own marks; a `Format` is such a family as data, from which the streaming parser (toolparse.py) and the
grammar (constraint.py) are made, so that both always agree. Which one a model speaks is read from the text of its chat
template. Where the template knows no tools, or in a way that is not known here, the way of Hermes and Qwen is described to
the model in a system message, and calls and results travel as plain text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from daemon.engine.interface import Tool
from daemon.engine.worker.text import overlap

SPACES: Final = 8  # characters of whitespace that may stand between two marks
NAME: Final = "\0name"  # stands for the name of a tool among the marks of a format
THINK, THOUGHT = "<think>", "</think>"
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]*")
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_LONGEST_NAME: Final = 64

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """The marks around calls. Between two marks whitespace may stand; arguments are a JSON object.

    `head` name `middle` arguments `tail`, then again from `head`; or, where `more` is not empty,
    `head` name `middle` arguments `tail`, `more` name `middle` arguments `tail` ..., `end`.
    """

    head: tuple[str, ...]
    middle: tuple[str, ...]
    tail: tuple[str, ...]
    more: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    opening: int = 1  # so many marks of `head` tell that a call begins
    alone: bool = False  # one call is the whole answer

    def call(self, marks: Sequence[str]) -> tuple[str, ...]:
        """All that stands before the arguments of a call that begins with `marks`."""
        return (*marks, NAME, *self.middle)


_JSON_NAME = ("{", '"name"', ":", '"')
_JSON_ARGUMENTS = ('"', ",", '"arguments"', ":")
HERMES: Final = Format(("<tool_call>", *_JSON_NAME), _JSON_ARGUMENTS, ("}", "</tool_call>"))
# Some of these models put <|python_tag|> in front; it is a control token, so its text is not in the answer.
LLAMA_3: Final = Format(_JSON_NAME, ('"', ",", '"parameters"', ":"), ("}",), opening=len(_JSON_NAME), alone=True)
MISTRAL: Final = Format(("[TOOL_CALLS]", "[", *_JSON_NAME), _JSON_ARGUMENTS, ("}",), (",", *_JSON_NAME), ("]",))
MISTRAL_ARGS: Final = Format(("[TOOL_CALLS]",), ("[ARGS]",), ())
# Their bars are wide ones, and their spaces are those of tokens.
_DEEPSEEK_BEGIN, _DEEPSEEK_CALL, _DEEPSEEK_SEPARATOR, _DEEPSEEK_TAIL, _DEEPSEEK_END = (
    f"<|{words}|>".replace("|", "\uff5c").replace(" ", "\u2581")
    for words in ("tool calls begin", "tool call begin", "tool sep", "tool call end", "tool calls end")
)
DEEPSEEK_3: Final = Format(
    (_DEEPSEEK_BEGIN, _DEEPSEEK_CALL, "function", _DEEPSEEK_SEPARATOR),
    ("```json",),
    ("```", _DEEPSEEK_TAIL),
    (_DEEPSEEK_CALL, "function", _DEEPSEEK_SEPARATOR),
    (_DEEPSEEK_END,),
)
DEEPSEEK_31: Final = Format(
    (_DEEPSEEK_BEGIN, _DEEPSEEK_CALL), (_DEEPSEEK_SEPARATOR,), (_DEEPSEEK_TAIL,), (_DEEPSEEK_CALL,), (_DEEPSEEK_END,)
)


def format_of(template: str | None) -> Format | None:
    """The format that a chat template speaks by itself; None where tools must be described to the model."""
    if not template or not re.search(r"\btools\b", template):
        return None
    # Others use the same mark around something that is no JSON: Qwen3-Coder and GLM.
    if "<tool_call>" in template and "arguments" in template and not re.search(r"<function=|<arg_key>", template):
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if _DEEPSEEK_BEGIN in template:
        return DEEPSEEK_3 if "```json" in template else DEEPSEEK_31
    if "<|start_header_id|>" in template and "parameters" in template:
        return LLAMA_3
    return None


# --- finding a call in a text that grows ---


def match(marks: Sequence[str], text: str, at: int) -> tuple[int | None, str]:
    """Where `marks` end that begin at `at`, and the name among them. -1: they do not stand there; None: more text must tell."""
    name = ""
    for place, mark in enumerate(marks):
        if place:
            start, at = at, _end(_SPACE, text, at)
            if at - start > SPACES:
                return -1, name
            if at == len(text):
                return None, name
        if mark is NAME:
            start, at = at, _end(_NAME, text, at)
            name = text[start:at]
            if not 0 < len(name) <= _LONGEST_NAME:
                return -1, name
            if at == len(text):
                return None, name
        elif text.startswith(mark, at):
            at += len(mark)
        else:
            return (None if mark.startswith(text[at:]) else -1), name
    return at, name


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


class Watch:
    """Waits for the beginning of a call. What cannot be part of one comes out at once, apart from whitespace at its end.

    A model that thinks aloud may write anything meanwhile: between <think> and </think> no call begins.
    """

    def __init__(self, style: Format, thinking: bool = False) -> None:
        self._style = style
        self._opening = style.head[: style.opening]
        self._thinking = thinking
        self._blank = True  # nothing has been said yet
        self._space = ""  # in front of what was found
        self.held = ""  # begins with the call when `found`
        self.found = False

    def push(self, text: str) -> str:
        """The text that comes out; nothing more does when `found`."""
        self.held += text
        return "" if self.found else "".join(self._advance())

    def reject(self, text: str) -> str:
        """`text`, which began with what was found, is no call after all: go on behind its first character."""
        first, self.held = self._space + text[0], text[1:]
        self.found, self._blank = False, False
        return first + "".join(self._advance())

    def again(self) -> None:
        """A call has ended; wait for the next."""
        self.held, self.found = "", False

    def _advance(self) -> Iterator[str]:
        while True:
            if self._thinking:
                at = self.held.find(THOUGHT)
                if at < 0:
                    yield self._release(len(self.held) - overlap(self.held, THOUGHT))
                    return
                yield self._release(at + len(THOUGHT))
                self._thinking, self._blank = False, True
            end, thinks = self._next()
            if thinks:
                yield self._release(end + len(THINK))
                self._thinking = True
                continue
            yield self._release(len(self.held[:end].rstrip()))
            if self.found:
                begin = len(self.held) - len(self.held.lstrip())
                self._space, self.held = self.held[:begin], self.held[begin:]
            return

    def _next(self) -> tuple[int, bool]:
        """Where the text ends that may come out, and whether <think> stands there."""
        text = self.held
        think = text.find(THINK)
        start, end = self._opening[0][0], think if think >= 0 else len(text)
        at = -1 if self._style.alone and not self._blank else text.find(start, 0, end)
        while at >= 0 and not (self._style.alone and text[:at].strip()):
            position, _ = match(self._opening, text, at)
            if position != -1:
                self.found = position is not None
                return at, False
            at = text.find(start, at + 1, end)
        return (think, True) if think >= 0 else (len(text) - overlap(text, THINK), False)

    def _release(self, end: int) -> str:
        text, self.held = self.held[:end], self.held[end:]
        if text.strip():
            self._blank = False
        return text


# --- telling a conversation ---


def described(tools: Sequence[Tool]) -> list[Json]:
    """Tools in OpenAI's shape, for which the templates are written."""
    return [{"type": "function", "function": tool.as_json()} for tool in tools]


def native(messages: Sequence[Mapping[str, Any]], style: Format, parsed: bool = True) -> list[Json]:
    """Messages as templates that know tools want them: arguments as objects if `parsed`, ids that Mistral's accept."""
    known = []
    for message in messages:
        told = dict(message)
        if calls := message.get("tool_calls"):
            told["tool_calls"] = [
                {
                    **call,
                    "id": _id(call["id"], style),
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": _arguments(call["function"]["arguments"]) if parsed else call["function"]["arguments"],
                    },
                }
                for call in calls
            ]
        if "tool_call_id" in message:
            told["tool_call_id"] = _id(message["tool_call_id"], style)
            told["name"] = _called(messages, message["tool_call_id"])
        known.append(told)
    return known


def plain(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[Json]:
    """The same conversation for templates that know no tools: only the roles system, user and assistant, and only text."""
    told: list[Json] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if told and told[-1].get("results"):
                told[-1]["content"] += f"\n{text}"
            else:
                told.append({"role": "user", "content": text, "results": True})
        else:
            calls = "\n".join(_written(call["function"]) for call in message.get("tool_calls", ()))
            told.append({"role": message["role"], "content": "\n".join(filter(None, (message["content"], calls)))})
    for one in told:
        one.pop("results", None)
    if tools:
        text = "\n\n".join(filter(None, (told.pop(0)["content"] if told[0]["role"] == "system" else "", instructions(tools))))
        told.insert(0, {"role": "system", "content": text})
    return told


def without_system(messages: Sequence[Mapping[str, Any]]) -> list[Json]:
    """The system message as the beginning of the first user's, for templates that refuse the role."""
    first, *rest = (dict(message) for message in messages)
    if first["role"] != "system" or not rest or rest[0]["role"] != "user":
        return [first, *rest]
    return [{**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def instructions(tools: Sequence[Tool]) -> str:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in described(tools))
    return (
        "# Tools\n\nYou can call functions. Their signatures are, one per line:\n"
        f"<tools>\n{lines}\n</tools>\n\n"
        "To call one, answer with a JSON object of its name and arguments between <tool_call> tags, one pair of tags per call:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>\n'
        "The result comes back between <tool_response> tags. Call a function only when it helps; otherwise answer as usual."
    )


def _written(function: Mapping[str, Any]) -> str:
    call = json.dumps({"name": function["name"], "arguments": _arguments(function["arguments"])}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def _arguments(text: str) -> Any:
    """Arguments as an object; what a client sent back damaged stays the text it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _id(given: str, style: Format) -> str:
    """Mistral's templates refuse every id that is not nine letters and digits."""
    if style not in (MISTRAL, MISTRAL_ARGS) or re.fullmatch(r"[A-Za-z0-9]{9}", given):
        return given
    return hashlib.blake2s(given.encode("utf-8", "replace")).hexdigest()[:9]


def _called(messages: Sequence[Mapping[str, Any]], call_id: str) -> str:
    """The name of the tool that was called with this id: some templates want it beside the result."""
    calls = (call for message in messages for call in message.get("tool_calls", ()))
    return next((str(call["function"]["name"]) for call in calls if call["id"] == call_id), "")
