"""The chat template that came inside a GGUF: a program by a stranger, run in Jinja's sandbox.

The sandbox keeps it away from Python's insides; against endless loops and huge texts the caller puts limits on the
process around `ChatTemplate()` and `render()` (constants are folded, and so allocated, while a template is compiled).
Environment and helpers are those of Hugging Face's `apply_chat_template`, for which the templates are written.

A user who types the text of a control token ("<|im_end|>") must not end the turn. Such text is put between two
Unicode noncharacters before rendering; `split` then tells the tokeniser which parts are only text. All other text,
the template's own and what it copies from roles, is parsed for control tokens as usual.
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

MAX_PROMPT: Final = 8 << 20  # characters that a template may produce

# For models that bring no template. Base models were not trained on it, but it keeps the turns apart.
FALLBACK: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FALLBACK_STOP: Final = "<|im_end|>"

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


class TemplateFailure(Exception):
    """The template refused these messages, or is broken. The text is one line."""


class _Refusal(TemplateError):
    """A template called `raise_exception`."""


class ChatTemplate:
    """One compiled template. Raises `TemplateFailure`."""

    def __init__(self, source: str | None) -> None:
        self.stops = () if source else (FALLBACK_STOP,)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False)
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source or FALLBACK)
        except Exception as error:  # whatever a stranger's constant expressions raise while they are folded
            raise TemplateFailure(_reason(error)) from error

    def render(self, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str], control: re.Pattern[str] | None) -> str:
        """The prompt, with user text that looks like a control token still marked for `split`.

        `special` has `bos_token` and `eos_token`; `control` matches the text of every control token.
        """
        guarded = [{key: _guard(value, control) if key == "content" else value for key, value in message.items()} for message in messages]
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(messages=guarded, add_generation_prompt=True, tools=None, documents=None, **special):
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


def _guard(content: Any, control: re.Pattern[str] | None) -> Any:
    if not isinstance(content, str):
        return content
    clean = content.replace(_OPEN, "").replace(_CLOSE, "")
    return control.sub(lambda found: f"{_OPEN}{found[0]}{_CLOSE}", clean) if control else clean


def _refuse(message: object) -> None:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _reason(error: Exception) -> str:
    if isinstance(error, _Refusal):
        why = f"it refuses this conversation: {error}"
    elif isinstance(error, SecurityError):
        why = f"it tried something that the sandbox forbids: {error}"
    else:
        why = f"it fails with {type(error).__name__}: {error}"
    return " ".join(why.split())[:300]
