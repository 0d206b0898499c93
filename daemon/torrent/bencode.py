"""Bencode (BEP 3): a canonical encoder and a strict, bounded decoder.

A torrent's name is the hash of its bencoded info dict, so only the canonical form is read: sorted, unique keys and
numbers without leading zeros. Anything else could be named differently by different clients.
"""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(rb"i(0|-?[1-9][0-9]{0,18})e")
_LENGTH = re.compile(rb"(0|[1-9][0-9]{0,9}):")


class BadBencode(ValueError):
    """The bytes are no canonical bencode, or exceed a ceiling."""


def encode(value: Any) -> bytes:
    """`int`, `bytes`, `list` and `dict` with `bytes` keys to canonical bencode. Raises `TypeError` for anything else."""
    parts: list[bytes] = []
    _encode(value, parts)
    return b"".join(parts)


def _encode(value: Any, parts: list[bytes]) -> None:
    if isinstance(value, bool):
        raise TypeError("bencode has no truth values")
    if isinstance(value, int):
        parts.append(b"i%de" % value)
    elif isinstance(value, bytes):
        parts.append(b"%d:" % len(value))
        parts.append(value)
    elif isinstance(value, list):
        parts.append(b"l")
        for item in value:
            _encode(item, parts)
        parts.append(b"e")
    elif isinstance(value, dict):
        parts.append(b"d")
        for key in sorted(value):
            _encode(key, parts)
            _encode(value[key], parts)
        parts.append(b"e")
    else:
        raise TypeError(f"bencode has no {type(value).__name__}")


def decode(data: bytes, *, max_depth: int, max_tokens: int) -> tuple[Any, dict[bytes, tuple[int, int]]]:
    """The value in `data`, and for a top-level dict where each of its values lies (start, end).

    Raises `BadBencode` when it is not canonical, has bytes after its end, or exceeds a ceiling.
    """
    reader = _Reader(data, max_depth, max_tokens)
    value, end = reader.read(0, 0)
    if end != len(data):
        raise BadBencode("bytes follow its end")
    return value, reader.top


class _Reader:
    def __init__(self, data: bytes, max_depth: int, max_tokens: int) -> None:
        self.data = data
        self.top: dict[bytes, tuple[int, int]] = {}
        self._max_depth = max_depth
        self._tokens = max_tokens

    def read(self, at: int, depth: int) -> tuple[Any, int]:
        """The value that starts at `at`, and where it ends. Recursion is bounded by `max_depth`."""
        self._tokens -= 1
        if self._tokens < 0:
            raise BadBencode("it has too many items")
        kind = self.data[at : at + 1]
        if kind == b"i":
            return self._number(at)
        if kind in (b"l", b"d"):
            if depth >= self._max_depth:
                raise BadBencode("it is nested too deep")
            return self._list(at + 1, depth) if kind == b"l" else self._dict(at + 1, depth)
        return self._text(at)

    def _number(self, at: int) -> tuple[int, int]:
        found = _NUMBER.match(self.data, at)
        if found is None:
            raise BadBencode("it has a malformed number")
        return int(found[1]), found.end()

    def _text(self, at: int) -> tuple[bytes, int]:
        found = _LENGTH.match(self.data, at)
        if found is None:
            raise BadBencode("it is no bencode")
        end = found.end() + int(found[1])
        if end > len(self.data):
            raise BadBencode("it is cut off")
        return self.data[found.end() : end], end

    def _list(self, at: int, depth: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        while self.data[at : at + 1] != b"e":
            item, at = self.read(at, depth + 1)
            items.append(item)
        return items, at + 1

    def _dict(self, at: int, depth: int) -> tuple[dict[bytes, Any], int]:
        items: dict[bytes, Any] = {}
        last: bytes | None = None
        while self.data[at : at + 1] != b"e":
            key, at = self._text(at)
            if last is not None and key <= last:
                raise BadBencode("its keys are not sorted and unique")
            last, start = key, at
            items[key], at = self.read(at, depth + 1)
            if depth == 0:
                self.top[key] = (start, at)
        return items, at + 1
