"""Reading a request: strict JSON under a ceiling, and fields that are named, typed and in range.

- A body is strict UTF-8 JSON: no duplicate keys, no NaN, no lone surrogates, no endless nesting (registry/strictjson.py).
- It is an object, and every field in it is one that the route knows; null is the same as absent.
- A body over its ceiling is refused before it is read whole (413), one that does not arrive in time is given up (408).
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from daemon.api.limits import LIMITS
from daemon.errors import UsageError
from registry import strictjson
from registry.errors import Malformed

SMALL = 64 * 1024  # bytes; a request that names things
CHAT = 4 * 1024 * 1024  # bytes; a request that carries a conversation
TEXT = 4096  # characters of a field that names something

HINT = "docs/http.md lists the fields"


class TooLarge(UsageError):
    http_status = 413


class TooSlow(UsageError):
    http_status = 408


class WrongField(UsageError):
    """`what` is the name of the field."""


async def read(request: web.Request, limit: int) -> bytes:
    """The body, at most `limit` bytes. Raises `TooLarge` (413), `TooSlow` (408) and `UsageError` for chunks that are none."""
    seconds = request.app[LIMITS].body_s
    if request.content_length is not None and request.content_length > limit:
        raise TooLarge("request", f"its body has more than {limit} bytes", "send less")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > limit:
                    raise TooLarge("request", f"its body has more than {limit} bytes", "send less")
    except TimeoutError:
        raise TooSlow("request", f"its body did not arrive within {seconds:g} s", "send it at once") from None
    except web.RequestPayloadError as error:
        raise UsageError("request", "its body is not what its header promised", "send it again") from error
    return bytes(body)


async def fields(request: web.Request, limit: int = SMALL) -> Fields:
    """The JSON object of the body; an empty body is an empty object."""
    data = await read(request, limit)
    if not data:
        return Fields({})
    try:
        # Millions of small values take a second; everybody else's answers go on meanwhile.
        value = await asyncio.to_thread(strictjson.loads, data, limit=limit, what="the body")
    except Malformed as error:
        raise UsageError("request", str(error), "send one JSON object") from error
    if not isinstance(value, dict):
        raise UsageError("request", "the body is not a JSON object", "send one JSON object")
    return Fields(value)


class Fields:
    """The fields of one JSON object, taken one by one; `done()` refuses what nobody took."""

    def __init__(self, values: dict[str, Any], within: str = "") -> None:
        self._left = {name: value for name, value in values.items() if value is not None}
        self._within = within

    def take(self, name: str) -> Any:
        """The value as it came, or None."""
        return self._left.pop(name, None)

    def text(self, name: str, limit: int = TEXT) -> str | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, "must be text")
        if not value.strip() or "\0" in value:
            raise self.wrong(name, "must not be empty or hold a NUL")
        if len(value) > limit:
            raise self.wrong(name, f"is longer than {limit} characters")
        return value

    def required_text(self, name: str, limit: int = TEXT) -> str:
        value = self.text(name, limit)
        if value is None:
            raise self.wrong(name, "is missing")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "must be a whole number")
        if not low <= value <= high:
            raise self.wrong(name, f"must be from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "must be a number")
        # An infinity (1e999 in JSON) is out of every range; comparing never overflows, converting would.
        if not low <= value <= high:
            raise self.wrong(name, f"must be from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return value

    def within(self, name: str, value: Any) -> Fields:
        """The fields of the object `value`, which stands at `name`."""
        if not isinstance(value, dict):
            raise self.wrong(name, "must be an object")
        return Fields(value, f"{self._within}{name}.")

    def done(self) -> None:
        if self._left:
            raise self.wrong(sorted(self._left)[0], "is not a field that is known here")

    def wrong(self, name: str, why: str) -> WrongField:
        return WrongField(ascii(self._within + name[:80])[1:-1], why, HINT)
