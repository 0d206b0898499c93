"""The `messages` of a chat, as OpenAI writes them, made into what a chat template is given.

`developer` is taken as `system`, parts of text are joined, and a refusal is what the assistant said. What a model of text cannot
be shown - images, sound, files - is refused; so are calls of tools that are not functions.
"""

from __future__ import annotations

from typing import Any

from daemon.api.body import Fields
from daemon.engine.codec import MAX_CALLS, MAX_MESSAGES, TOOL_NAME

Message = dict[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_PARTS = {"text": "text", "refusal": "refusal"}  # type of a part: where its text is
_CALL_ID = 256  # characters


def messages(fields: Fields) -> tuple[Message, ...]:
    """The `messages` of a chat. Raises `UsageError` for what is no chat, or has nothing to answer."""
    given = fields.take("messages")
    if not isinstance(given, list) or not given:
        raise fields.wrong("messages", "must be a list of at least one message")
    if len(given) > MAX_MESSAGES:
        raise fields.wrong("messages", f"has more than {MAX_MESSAGES} messages")
    found = tuple(_message(fields.within(f"messages[{place}]", value)) for place, value in enumerate(given))
    last = found[-1]
    if last["role"] in ("system", "user") and not last["content"].strip():
        raise fields.wrong("messages", "end with an empty message: there is nothing to answer")
    return found


def _message(fields: Fields) -> Message:
    role = fields.take("role")
    if not isinstance(role, str) or role not in ROLES:
        raise fields.wrong("role", f"must be one of {', '.join(ROLES)}")
    told: Message = {"role": ROLES[role], "content": _content(fields, role)}
    if role == "assistant" and (calls := _calls(fields)):
        told["tool_calls"] = calls
    if role == "tool":
        told["tool_call_id"] = fields.required_text("tool_call_id", _CALL_ID)
    fields.text("name")  # templates have no place for it
    if fields.take("annotations") not in (None, []):  # a client that sends our own answer back includes them, empty
        raise fields.wrong("annotations", "are not supported")
    fields.done()
    return told


def _content(fields: Fields, role: str) -> str:
    content = fields.take("content")
    if role == "assistant":
        refusal = fields.take("refusal")
        content = (refusal or "") if content is None else content
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise fields.wrong("content", "must be text or a list of text parts")
    return "".join(_part(fields, part) for part in content)


def _part(fields: Fields, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in _PARTS:
        raise fields.wrong("content", f"has a part of the type {kind[:40]!a}: the models here read text only")
    key = _PARTS.get(kind) if isinstance(kind, str) else None
    if key is None or set(part) != {"type", key} or not isinstance(part[key], str):
        raise fields.wrong("content", "has a part that is not a type and its text")
    return str(part[key])


def _calls(fields: Fields) -> list[Message]:
    given = fields.take("tool_calls")
    if given is None:
        return []
    if not isinstance(given, list) or len(given) > MAX_CALLS:
        raise fields.wrong("tool_calls", f"must be a list of at most {MAX_CALLS} calls")
    return [_call(fields.within(f"tool_calls[{place}]", value)) for place, value in enumerate(given)]


def _call(fields: Fields) -> Message:
    identifier = fields.required_text("id", _CALL_ID)
    if fields.take("type") not in (None, "function"):
        raise fields.wrong("type", "must be function")
    function = fields.within("function", fields.take("function"))
    fields.done()
    name, arguments = function_name(function), function.take("arguments")
    if not isinstance(arguments, str):
        raise function.wrong("arguments", "must be text that is JSON")
    function.done()
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def function_name(fields: Fields) -> str:
    """The `name` of a function. Raises `UsageError`."""
    name = fields.required_text("name")
    if TOOL_NAME.fullmatch(name) is None:
        raise fields.wrong("name", "must be 1 to 64 of A-Z, a-z, 0-9, _, . and -")
    return name
