"""JSON as peers may send it: bounded, no duplicate keys, no NaN, no lone surrogates, no endless nesting; and our one way to write it."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from registry.errors import Malformed

MAX_DEPTH = 64  # a JSON schema takes two for each of its own levels

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

# Made once: json.dumps makes a new one for each call with settings of its own.
_SORTED, _AS_IT_IS = (
    json.JSONEncoder(sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for sort_keys in (True, False)
)


def dumps(value: Any, *, sort_keys: bool = True) -> bytes:
    """Compact UTF-8, with sorted keys so that equal values are equal bytes; not sorted where the order says something (schemas)."""
    return (_SORTED if sort_keys else _AS_IT_IS).encode(value).encode()


def loads(data: bytes, *, limit: int, what: str) -> Any:
    """The value in `data`. Raises `Malformed`, naming `what`, for anything that two parsers could read differently."""
    if len(data) > limit:
        raise Malformed(f"{what} has {len(data)} bytes, more than {limit}")
    try:
        text = data.decode("utf-8")
        value = _DECODER.decode(text)
        if _SURROGATE.search(text):
            # A lone surrogate written as \\ud800 passes the parser and cannot be encoded again.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise Malformed(f"{what} is not strict JSON") from None
    # With fewer brackets than that nothing can be nested too deeply.
    if text.count("[") + text.count("{") >= MAX_DEPTH:
        _check_depth(value, what)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


# Made once, as above.
_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)


def _check_depth(value: Any, what: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level if isinstance(item, dict | list) for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    raise Malformed(f"{what} is nested too deeply")
