"""The short codes of models: base32 (RFC 4648, lower case, no padding) of a digest, like git's short hashes.

A model's code comes from its v2 infohash; where only the CID is known, from the CID's digest. Both resolve. A code is shown
with 7 characters and any longer prefix names the same model; one that several models share is settled in registry/routing.py.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from functools import lru_cache

from registry.cid import parse_cid
from registry.errors import Malformed, shown

SHORT = 7
FULL = 52  # base32 characters of 32 bytes

_REMEMBERED = 8192  # models whose codes are not computed again
_CODE = re.compile(rf"[a-z2-7]{{{SHORT},{FULL}}}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


@lru_cache(_REMEMBERED)
def code_of_infohash_v2(infohash_v2: str) -> str:
    """The full code (52 characters) of a v2 infohash of 64 hex digits."""
    if not _HEX64.fullmatch(infohash_v2):
        raise Malformed("a v2 infohash has 64 hex digits")
    return _base32(bytes.fromhex(infohash_v2))


@lru_cache(_REMEMBERED)
def code_of_cid(cid: str) -> str:
    """The full code (52 characters) of a CID."""
    return _base32(parse_cid(cid).digest)


def codes_of(cid: str, infohash_v2: str | None) -> tuple[str, ...]:
    """Every full code of a model, the one that is shown first."""
    by_cid = code_of_cid(cid)
    return (by_cid,) if infohash_v2 is None else (code_of_infohash_v2(infohash_v2), by_cid)


def short(code: str) -> str:
    """The code as it is shown: its first 7 characters."""
    return code[:SHORT]


def told_apart(codes: Sequence[str]) -> tuple[str, ...]:
    """Full codes, each as short as the others allow: never less than is shown, and enough to mean one of them alone."""
    length = SHORT
    while length < FULL and len({code[:length] for code in codes}) < len(set(codes)):
        length += 1
    return tuple(code[:length] for code in codes)


def is_code(text: str) -> bool:
    """Whether `text`, less a `#`, could be a code. A model's name may look like one too."""
    return _CODE.fullmatch(_bare(text)) is not None


def normalise(text: str) -> str:
    """`#ABC2def` -> `abc2def`. Raises `Malformed` unless 7 to 52 characters of base32 are left."""
    code = _bare(text)
    if not _CODE.fullmatch(code):
        raise Malformed(f"not a code: {shown(text)}; a code has {SHORT} to {FULL} letters a-z and digits 2-7")
    return code


def _bare(text: str) -> str:
    # str.lower() would turn a Kelvin sign into "k".
    bare = text.strip().removeprefix("#")
    return bare.lower() if bare.isascii() else bare


def _base32(digest: bytes) -> str:
    return base64.b32encode(digest).decode().rstrip("=").lower()
