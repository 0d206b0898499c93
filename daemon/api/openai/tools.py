"""What holds an answer to a form: `tools` and `tool_choice`, and `response_format`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from daemon.api.body import Fields
from daemon.api.messages import function_name
from daemon.engine.codec import MAX_SCHEMA, MAX_TEXT, MAX_TOOLS, check_schema
from daemon.engine.interface import Tool, ToolChoice
from registry.errors import Malformed

ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}
_SCHEMA_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Asked:
    tools: tuple[Tool, ...]
    choice: ToolChoice
    forced: str | None


def read(fields: Fields) -> Asked:
    """`tools` and `tool_choice`. Raises `UsageError`."""
    given = fields.take("tools")
    if given is not None and (not isinstance(given, list) or len(given) > MAX_TOOLS):
        raise fields.wrong("tools", f"must be a list of at most {MAX_TOOLS} tools")
    found = tuple(_tool(fields.within(f"tools[{place}]", value)) for place, value in enumerate(given or []))
    names = {tool.name for tool in found}
    if len(names) < len(found):
        raise fields.wrong("tools", "has two functions of one name")
    choice, forced = _choice(fields)
    if not found and choice == "required":
        raise fields.wrong("tool_choice", "asks for a call, and there are no tools")
    if forced is not None and forced not in names:
        raise fields.wrong("tool_choice", "names a function that is not among the tools")
    return Asked(found, choice if found else "auto", forced)


def _choice(fields: Fields) -> tuple[ToolChoice, str | None]:
    value = fields.take("tool_choice")
    match value:
        case None:
            return "auto", None
        case "auto" | "none" | "required":
            return value, None
        case {"type": "function"}:
            choice = fields.within("tool_choice", value)
            choice.take("type")
            function = choice.within("function", choice.take("function"))
            name = function_name(function)
            function.done()
            choice.done()
            return "required", name
    raise fields.wrong("tool_choice", "must be auto, none, required, or the name of a function")


def _tool(fields: Fields) -> Tool:
    if fields.take("type") != "function":
        raise fields.wrong("type", "must be function; other tools are not supported")
    function = fields.within("function", fields.take("function"))
    fields.done()
    name, description = function_name(function), _text(function, "description")
    function.flag("strict")  # arguments follow their schema in any case
    parameters = _schema(function, "parameters")
    function.done()
    return Tool(name, description) if parameters is None else Tool(name, description, parameters)


def response_format(fields: Fields) -> Mapping[str, Any] | None:
    """The schema that the answer follows, None for free text. Raises `UsageError`."""
    value = fields.take("response_format")
    if value is None:
        return None
    wanted = fields.within("response_format", value)
    kind, schema = wanted.take("type"), None
    if kind == "json_schema":
        inner = wanted.within("json_schema", wanted.take("json_schema"))
        if _SCHEMA_NAME.fullmatch(inner.required_text("name")) is None:
            raise inner.wrong("name", "must be 1 to 64 of A-Z, a-z, 0-9, _ and -")
        _text(inner, "description")
        inner.flag("strict")  # it is followed in any case
        schema = _schema(inner, "schema")
        schema = ANY_OBJECT if schema is None else schema
        inner.done()
    elif kind == "json_object":
        schema = ANY_OBJECT
    elif kind != "text":
        raise wanted.wrong("type", "must be text, json_object or json_schema")
    wanted.done()
    return schema


def _schema(fields: Fields, name: str) -> Mapping[str, Any] | None:
    value = fields.take(name)
    if value is None:
        return None
    try:
        check_schema(value, name)
    except Malformed:
        raise fields.wrong(name, f"must be a JSON schema: an object of at most {MAX_SCHEMA} bytes") from None
    found: Mapping[str, Any] = value
    return found


def _text(fields: Fields, name: str) -> str:
    value = fields.take(name)
    if value is not None and (not isinstance(value, str) or len(value) > MAX_TEXT):
        raise fields.wrong(name, "must be text")
    return value or ""
