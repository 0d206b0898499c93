"""What a GGUF header says, read without trusting it: our own bounded reader, before any native parser sees the file.

Accepted is a file for which all of this holds (facts/security.md, rows R6-R11):
- it begins with "GGUF", version 2 or 3, little-endian, and is not one part of a split model;
- every count, length and array fits under its ceiling and inside the file; no key and no tensor name comes twice;
- the alignment is a power of two; every tensor has 1 to 4 dimensions, a known type, rows of whole blocks;
- every tensor lies inside the file at an aligned offset, and no two overlap;
- `general.architecture` is a plain word.

Only the header is read, never the tensors. Format: ggml/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from daemon.engine.ggml import FILE_TYPES, TENSOR_TYPES
from daemon.errors import NotFound, UsageError
from registry.records import GgufFacts

MAX_HEADER: Final = 256 << 20  # bytes from the start of the file to the end of the tensor list
MAX_KEYS: Final = 4096
MAX_TENSORS: Final = 1 << 17
MAX_ARRAY: Final = 1 << 24  # items; vocabularies have up to 2^18, their merges twice that
MAX_NAME: Final = 256  # bytes of a key or a tensor name
MAX_TEMPLATE: Final = 1 << 20  # bytes of a chat template
MAX_TEXT: Final = 64 << 10  # bytes of any other text that is kept; longer ones are skipped
MAX_LAYERS: Final = 4096  # items of a numeric array that are kept (per-layer settings)
MAX_KEPT: Final = 2 << 20  # characters and numbers of all values that are kept
MAX_ELEMENTS: Final = 1 << 48  # per tensor; keeps every product and sum far from 2^63

_WINDOW = 1 << 20
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _BOOL = 8, 9, 7
_ARCHITECTURE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_TEMPLATE_KEY = "tokenizer.chat_template"
_IMPOSTORS: Final = (
    (b"version https://git-lfs", "a Git LFS pointer", "download the file itself, for example with git lfs pull"),
    (b"<", "a web page", "the address needs a login or is a page about the model; use the address of the file"),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)", "convert it to GGUF first"),
    (b"\x80", "a Python pickle", "convert it to GGUF first"),
    (b"ggjt", "in the GGML format from before GGUF", "convert it to GGUF first"),
)

Value = str | int | float | bool | tuple[int | float | bool, ...]


class _Bad(Exception):
    """Why the header is refused, and what to do."""


def _damaged(why: str) -> _Bad:
    return _Bad(f"a damaged GGUF: {why}", "fetch it again")


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The checked header of one file. `values` has scalars, short texts and short numeric arrays by key."""

    facts: GgufFacts
    size: int  # bytes of the file
    tensor_bytes: int  # sum over the tensors
    elements: Mapping[int, int]  # how many of each tensor type of ggml, over all tensors
    tensors: int
    vocabulary: int  # tokens; 0 when the file does not list them
    values: Mapping[str, Value]

    @property
    def chat_template(self) -> str | None:
        template = self.values.get(_TEMPLATE_KEY)
        return template if isinstance(template, str) and template.strip() else None

    @property
    def for_texts(self) -> bool:
        """Whether it was made to turn texts into vectors: only such models say how they pool."""
        return f"{self.facts.architecture}.pooling_type" in self.values

    def integer(self, key: str, default: int = 0) -> int:
        """The number under `<architecture>.<key>`, or `default` where it is missing, negative or no number."""
        value = self.values.get(f"{self.facts.architecture}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default

    def per_layer(self, key: str, default: int) -> list[int]:
        """The same for a setting that is one number for all layers or an array with one for each."""
        layers = min(self.integer("block_count"), MAX_LAYERS)
        value = self.values.get(f"{self.facts.architecture}.{key}")
        if isinstance(value, tuple):
            return [v if isinstance(v, int) and v > 0 else 0 for v in value[:layers]]
        return [self.integer(key, default)] * layers


def inspect(path: Path) -> GgufHeader:
    """Read and check the header of `path`. Raises `UsageError` that names the reason, `NotFound` for no such file."""
    try:
        with path.open("rb") as file:
            return _parse(file, os.fstat(file.fileno()).st_size)
    except _Bad as error:
        why, hint = error.args
        raise UsageError(path.name, why, hint) from None
    except FileNotFoundError:
        raise NotFound(path.name, "no such file", "check the path") from None
    except OSError as error:
        raise UsageError(path.name, f"cannot be read ({error.strerror})", "check the path and its permissions") from None


class _Reader:
    """Little-endian values from a window over the file; refuses to pass the end of the file or the ceiling."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._data = b""
        self._start = 0  # offset of the window in the file
        self._at = 0  # position in the window

    @property
    def position(self) -> int:
        return self._start + self._at

    def _need(self, count: int) -> None:
        if self.position + count > min(self._size, MAX_HEADER):
            if self.position + count > self._size:
                raise _damaged("the header runs past the end of the file")
            raise _Bad(f"the header is larger than {MAX_HEADER >> 20} MiB", "nothing sane has that; do not use this file")

    def take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            self._need(count)
            self._start, self._at = self.position, 0
            self._file.seek(self._start)
            self._data = self._file.read(max(count, _WINDOW))
            if len(self._data) < count:
                raise _damaged("the header runs past the end of the file")
        self._need(count)
        self._at += count
        return self._data[self._at - count : self._at]

    def skip(self, count: int) -> None:
        self._need(count)
        self._at += count
        if self._at > len(self._data):
            self._start, self._data, self._at = self.position, b"", 0

    def number(self, code: str) -> int:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return int(value)

    def name(self, what: str) -> str:
        length = self.number("Q")
        if not 0 < length <= MAX_NAME:
            raise _damaged(f"{what} of {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged(f"{what} is not UTF-8") from None

    def text(self, ceiling: int) -> str | None:
        """A text, or None (and skipped) when it is longer than `ceiling`."""
        length = self.number("Q")
        if length > ceiling:
            self.skip(length)
            return None
        return self.take(length).decode("utf-8", "replace")

    def skip_texts(self, count: int) -> None:
        # A vocabulary has 10^5 of them: this loop stays on local names and one window at a time.
        length_at = struct.Struct("<Q").unpack_from
        while count:
            data, at = self._data, self._at
            last = len(data) - 8
            while count and at <= last:
                after = at + 8 + length_at(data, at)[0]
                if after > len(data):
                    break
                at, count = after, count - 1
            self._at = at
            if count:
                self.skip(self.number("Q"))
                count -= 1
        self._need(0)


def _parse(file: BinaryIO, size: int) -> GgufHeader:
    version = _preamble(file, size)
    reader = _Reader(file, size)
    reader.skip(8)
    tensors, keys = reader.number("Q"), reader.number("Q")
    if keys > MAX_KEYS or tensors > MAX_TENSORS:
        raise _Bad(f"a damaged GGUF (version {version}): {tensors} tensors and {keys} keys", "fetch it again")
    values, lengths = _metadata(reader, keys)
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
        raise _Bad("the GGUF does not name its architecture", "it may be an adapter or a damaged file")
    parts = values.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        why = f"one part of a model that is split into {parts} files, which is not supported yet"
        raise _Bad(why, "join them with llama-gguf-split --merge")
    tensor_bytes, elements = _tensors(reader, tensors, _alignment(values), size)
    facts = GgufFacts(
        architecture=architecture,
        name=_short(values, "general.name"),
        quantization=_quantization(values),
        parameters=sum(elements.values()) or None,
        context_length=_count(values, f"{architecture}.context_length"),
        chat_template_hash=_digest(values.get(_TEMPLATE_KEY)),
        license=_short(values, "general.license"),
    )
    vocabulary = lengths.get("tokenizer.ggml.tokens") or _count(values, f"{architecture}.vocab_size") or 0
    return GgufHeader(facts, size, tensor_bytes, elements, tensors, vocabulary, values)


def _preamble(file: BinaryIO, size: int) -> int:
    """Check magic and version, naming what the file is when it is no GGUF."""
    start = file.read(64)
    file.seek(0)
    if start[:4] != b"GGUF":
        text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
        for magic, kind, hint in _IMPOSTORS:
            if text.startswith(magic) or start.startswith(magic):
                raise _Bad(f"not a GGUF: it is {kind}", hint)
        if len(start) > 9 and start[8:9] == b"{":
            raise _Bad("not a GGUF: it is a safetensors file", "convert it to GGUF first")
        raise _Bad("not a GGUF: " + ("it is empty" if size == 0 else "it does not begin with GGUF"), "give a .gguf model file")
    if size < 24:
        raise _damaged("the file ends after a few bytes")
    (version,) = struct.unpack_from("<I", start, 4)
    if version not in (2, 3):
        big_endian = version in (2 << 24, 3 << 24)
        why = "a big-endian GGUF" if big_endian else f"GGUF version {version} is not known (2 and 3 are)"
        raise _Bad(why, "convert it to a little-endian version 3")
    return int(version)


def _metadata(reader: _Reader, count: int) -> tuple[dict[str, Value], dict[str, int]]:
    """The kept values by key, and the length of every array by key."""
    values: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    seen: set[str] = set()
    kept = 0
    for _ in range(count):
        key = reader.name("a key")
        if key in seen:
            raise _damaged(f"the key {key!r} comes twice")
        seen.add(key)
        kind = reader.number("I")
        value: Value | None
        if kind == _STRING:
            value = reader.text(MAX_TEMPLATE if key == _TEMPLATE_KEY else MAX_TEXT)
            if value is None and key == _TEMPLATE_KEY:
                raise _Bad("the chat template is larger than 1 MiB", "nothing sane has that; do not use this file")
        elif kind == _ARRAY:
            value, lengths[key] = _array(reader, key)
        else:
            value = _scalars(reader, kind, 1, key)[0]
        if value is not None:
            values[key] = value
            kept += len(value) if isinstance(value, str | tuple) else 1
        if kept > MAX_KEPT:  # each for itself is under its ceiling
            raise _Bad("its settings are larger than those of any model", "nothing sane has that; do not use this file")
    return values, lengths


def _scalars(reader: _Reader, kind: int, count: int, key: str) -> tuple[int | float | bool, ...]:
    code = _scalar_code(kind, key)
    data = reader.take(count * struct.calcsize("<" + code))
    if kind == _BOOL and data.strip(b"\x00\x01"):
        raise _damaged(f"{key!r} is neither true nor false")
    return struct.unpack(f"<{count}{code}", data)


def _scalar_code(kind: int, key: str) -> str:
    if kind not in _SCALARS:
        raise _damaged(f"{key!r} has the unknown type {kind}")
    return _SCALARS[kind]


def _array(reader: _Reader, key: str) -> tuple[Value | None, int]:
    kind, count = reader.number("I"), reader.number("Q")
    if count > MAX_ARRAY:
        raise _damaged(f"{key!r} is an array of {count} items")
    if kind == _STRING:
        reader.skip_texts(count)
        return None, count
    if count <= MAX_LAYERS:
        return _scalars(reader, kind, count, key), count
    reader.skip(count * struct.calcsize("<" + _scalar_code(kind, key)))
    return None, count


def _alignment(values: Mapping[str, Value]) -> int:
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _damaged(f"the alignment is {alignment}")
    return int(alignment)


def _tensors(reader: _Reader, count: int, alignment: int, size: int) -> tuple[int, Counter[int]]:
    """Check the tensor list against the file. Bytes of all tensors, and elements by tensor type."""
    names: set[str] = set()
    places: list[tuple[int, int]] = []
    elements: Counter[int] = Counter()
    for _ in range(count):
        name = reader.name("a tensor name")
        if name in names:
            raise _damaged(f"the tensor {name!r} comes twice")
        names.add(name)
        dimensions = reader.number("I")
        if not 1 <= dimensions <= 4:
            raise _damaged(f"{name!r} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", reader.take(8 * dimensions))
        kind, offset = reader.number("I"), reader.number("Q")
        in_tensor, in_bytes = _extent(name, shape, kind)
        if offset % alignment:
            raise _damaged(f"{name!r} is not aligned")
        elements[kind] += in_tensor
        places.append((offset, in_bytes))
    begin = -(-reader.position // alignment) * alignment
    end = 0
    for offset, length in sorted(places):
        if offset < end:
            raise _damaged("two tensors overlap")
        end = offset + length
    if begin + end > size:
        raise _Bad(f"cut short: the tensors need {begin + end} bytes, the file has {size}", "fetch the rest of it")
    return sum(length for _, length in places), elements


def _extent(name: str, shape: tuple[int, ...], kind: int) -> tuple[int, int]:
    """Elements and bytes of a tensor."""
    if kind not in TENSOR_TYPES:
        raise _Bad(f"{name!r} has the unknown tensor type {kind}", "it may need a newer release")
    elements = 1
    for side in shape:
        elements *= side
        if not 0 < elements <= MAX_ELEMENTS:
            raise _damaged(f"the shape of {name!r} is impossible")
    per_block, block_bytes = TENSOR_TYPES[kind]
    if shape[0] % per_block:
        raise _damaged(f"the rows of {name!r} are not whole blocks")
    return elements, elements // per_block * block_bytes


def _short(values: Mapping[str, Value], key: str) -> str | None:
    value = values.get(key)
    return value[:256] if isinstance(value, str) and value else None


def _count(values: Mapping[str, Value], key: str) -> int | None:
    value = values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _quantization(values: Mapping[str, Value]) -> str | None:
    kind = values.get("general.file_type")
    return FILE_TYPES.get(kind) if isinstance(kind, int) else None


def _digest(template: Value | None) -> str | None:
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) and template else None
