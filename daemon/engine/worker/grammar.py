"""What an answer must look like, as a grammar in llguidance's dialect of Lark: a JSON schema, or calls of tools in a model's own format.

A schema for the answer is followed to the letter, and one with a keyword that llguidance does not know is refused. Schemas
of tools come from programs that nobody asks to change, so there such a keyword is left out: OpenAI promises as little.
Whitespace is what models like, a space or a new line with its indentation, and never so much that a small one goes on for ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from daemon.engine.interface import ChatRequest, Tool
from daemon.engine.worker.tools import SPACES, Format

_WHITESPACE: Final = r"\x20|\x0A\x20{0,16}"
_MOST_CALLS: Final = 8  # in an answer that is held to calls: a small model has no other end than this
_COMBINED: Final = frozenset({"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties"})


class GrammarRefused(Exception):
    """No answer can be held to this. The text is one line."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How an answer is constrained."""

    grammar: str
    waits: bool = False  # the grammar is of what follows when a call begins, not of the whole answer
    single: bool = False  # nothing may follow the first such part
    what: str = "response_format"  # that is refused when the grammar is


def plan(request: ChatRequest, style: Format, control: Mapping[str, int]) -> Plan | None:
    """None: the answer is free. `control` are the marks of `style` that are one control token each. Raises `GrammarRefused`."""
    tools = [tool for tool in request.tools if request.forced_tool in (None, tool.name)]
    if request.tool_choice == "none" or not tools:
        return None if request.schema is None else Plan(f"start: {_answer(request.schema)}")
    several = request.parallel_tool_calls and not style.alone
    if request.tool_choice == "required":
        return Plan(_calls(style, tools, control, several), what="tools")
    if request.schema is not None:
        if style.alone:
            raise GrammarRefused("this model's calls cannot be told from other JSON; set tool_choice to none or required")
        return Plan(_calls(style, tools, control, several, f" | {_answer(request.schema)}"))
    again = several and not style.more
    return Plan(_calls(style, tools, control, several and not again), waits=True, single=not again, what="tools")


def _answer(schema: Mapping[str, Any]) -> str:
    return _json({**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}})


def _calls(style: Format, tools: Sequence[Tool], control: Mapping[str, int], several: bool, otherwise: str = "") -> str:
    def marks(texts: Sequence[str]) -> str:
        return " ws ".join(f"<[{control[text]}]>" if text in control else _text(text) for text in texts)

    glue = "" if style.middle[0] == '"' else "ws "
    lines = [
        *(f"call_{i}: {_text(tool.name)} {glue}{marks(style.middle)} ws arguments_{i}" for i, tool in enumerate(tools)),
        *(f"arguments_{i}: {_json(_parameters(tool))}" for i, tool in enumerate(tools)),
        f"any: {' | '.join(f'call_{i}' for i in range(len(tools)))}",
        f"call: any {'ws ' if style.tail else ''}{marks(style.tail)}",
        "ws: SPACE?",
        f"SPACE: /[ \\t\\r\\n]{{1,{SPACES}}}/",
    ]
    more = marks(style.more or style.head)
    repeated = f"(ws {more} call){{0,{_MOST_CALLS - 1}}}" if several else ""
    lines.append(f"start: calls{otherwise}")
    lines.append(f"calls: {marks(style.head)} call {repeated} {f'ws {marks(style.end)}' if style.end else ''}")
    return "\n".join(lines)


def _parameters(tool: Tool) -> dict[str, Any]:
    """The schema of the arguments, which are an object; without a word about further ones there are none."""
    kinds = tool.parameters.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise GrammarRefused(f"the parameters of {tool.name} are no object")
    schema = {**tool.parameters, "type": "object"}
    if not _COMBINED & schema.keys():
        schema |= {"properties": schema.get("properties", {}), "additionalProperties": False}
    return {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE, "lenient": True}}


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps(schema)}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
