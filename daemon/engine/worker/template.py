"""The chat template that came inside a GGUF: a program by a stranger, run in Jinja's sandbox.

The sandbox keeps it away from Python's insides; against endless loops and huge texts the caller puts limits on the
process around `ChatTemplate()` and `render()` (constants are folded, and so allocated, while a template is compiled).
Environment and helpers are those of Hugging Face's `apply_chat_template`, for which the templates are written.

A user who types the text of a control token ("<|im_end|>") must not end the turn. Such text is put between two
Unicode noncharacters before rendering; `split` then tells the tokeniser which parts are only text. That holds for all
that clients write: contents, calls, results, and descriptions of tools. All other text, the template's own and what it
copies from roles, is parsed for control tokens as usual.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from daemon.engine.interface import Tool
from daemon.engine.worker.tools import HERMES, described, format_of, native, plain, without_system

MAX_PROMPT: Final = 8 << 20  # characters that a template may produce

# For models that bring no template. Base models were not trained on it, but it keeps the turns apart.
FALLBACK: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FALLBACK_STOP: Final = "<|im_end|>"

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_END = "\ufdd2"  # of an answer that is to be continued
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}{_END}]")
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


class TemplateFailure(Exception):
    """The template refused these messages, or is broken. The text is one line."""


class _Refusal(TemplateError):
    """A template called `raise_exception`."""


class ChatTemplate:
    """One compiled template. Raises `TemplateFailure`. `calls` is how its model writes calls of tools."""

    def __init__(self, source: str | None) -> None:
        self.stops = () if source else (FALLBACK_STOP,)
        self.calls = format_of(source) or HERMES
        self._knows_tools = format_of(source) is not None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False)
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source or FALLBACK)
        except Exception as error:  # whatever a stranger's constant expressions raise while they are folded
            raise TemplateFailure(_reason(error)) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special: Mapping[str, str],
        control: re.Pattern[str] | None,
        tools: Sequence[Tool] = (),
    ) -> str:
        """The prompt, with client text that looks like a control token still marked for `split`.

        `special` has `bos_token` and `eos_token`; `control` matches the text of every control token. It ends where the
        assistant begins to speak; where the last message is the assistant's own, at its end, so that it goes on there.
        """
        try:
            if self._knows_tools:
                return self._native(messages, special, control, tools)
            told = plain(messages, tools)
            try:
                return self._fill(_guard(told, control), special, None)
            except TemplateFailure:
                if not tools or told[0]["role"] != "system":
                    raise
                return self._fill(_guard(without_system(told), control), special, None)  # some know no such role
        except RecursionError as error:
            raise TemplateFailure("it gets a description of a tool that is nested too deeply") from error
        except MemoryError as error:  # calls whose arguments are millions of small values
            raise TemplateFailure("it would need too much memory for this conversation") from error

    def _native(
        self, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str], control: re.Pattern[str] | None, tools: Sequence[Tool]
    ) -> str:
        offered = _guard(described(tools), control) or None
        try:
            return self._fill(_guard(native(messages, self.calls), control), special, offered)
        except TemplateFailure:
            if not any("tool_calls" in message for message in messages):
                raise
            # A few put the arguments together as text themselves.
            return self._fill(_guard(native(messages, self.calls, parsed=False), control), special, offered)

    def _fill(self, messages: list[dict[str, Any]], special: Mapping[str, str], tools: list[dict[str, Any]] | None) -> str:
        """A template that does not show the last answer as it is gets to begin another one."""
        last = messages[-1] if messages else {"role": ""}
        if last["role"] == "assistant" and "tool_calls" not in last:
            prompt = self._run([*messages[:-1], {**last, "content": last["content"] + _END}], special, tools, begin=False)
            if _END in prompt:
                return prompt[: prompt.rindex(_END)]
        return self._run(messages, special, tools, begin=True)

    def _run(self, messages: list[dict[str, Any]], special: Mapping[str, str], tools: list[dict[str, Any]] | None, begin: bool) -> str:
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(messages=messages, add_generation_prompt=begin, tools=tools, documents=None, **special):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_PROMPT:
                    raise TemplateFailure(f"it makes a prompt of more than {MAX_PROMPT} characters")
        except TemplateFailure:
            raise
        except Exception as error:  # a stranger's program may raise anything
            raise TemplateFailure(_reason(error)) from error
        return "".join(pieces)


def split(prompt: str) -> Iterator[tuple[str, bool]]:
    """(text, may hold control tokens) for each part of a rendered prompt, in order, without the marks."""
    at = 0
    for found in _MARKED.finditer(prompt):
        yield prompt[at : found.start()], True
        yield found[1], False
        at = found.end()
    yield prompt[at:], True


class _Text(str):
    """Marked text. Templates that print a whole object show its `repr`, which would hide the marks."""

    def __repr__(self) -> str:
        return "'" + "".join(c if _MARKS.match(c) else "\\'" if c == "'" else repr(c)[1:-1] for c in self) + "'"


def _guard(value: Any, control: re.Pattern[str] | None) -> Any:
    """The same JSON value with all that looks like a control token marked."""
    if isinstance(value, dict):
        return {_guard(key, control): _guard(one, control) for key, one in value.items()}
    if isinstance(value, list):
        return [_guard(one, control) for one in value]
    if not isinstance(value, str):
        return value
    clean = _MARKS.sub("", value)
    if not control or not control.search(clean):
        return clean
    return _Text(control.sub(lambda found: f"{_OPEN}{found[0]}{_CLOSE}", clean))


def _refuse(message: object) -> None:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    # Never only ASCII, whatever the template wants: the marks would be escaped, and so no longer be marks.
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)


def _reason(error: Exception) -> str:
    if isinstance(error, _Refusal):
        why = f"it refuses this conversation: {error}"
    elif isinstance(error, SecurityError):
        why = f"it tried something that the sandbox forbids: {error}"
    else:
        why = f"it fails with {type(error).__name__}: {error}"
    return " ".join(why.split())[:300]
