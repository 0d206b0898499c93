"""UnixFS files as trees of blocks: just enough of dag-pb and UnixFS to find a file's leaves and their sizes.

Pure: blocks come in as bytes. Kubo has checked every block against its CID; what a block *says* is still a stranger's word, so
sizes, counts and kinds are checked here. Sources: ipld.io dag-pb specification, specs.ipfs.tech/unixfs.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass

from registry.errors import Malformed

MAX_LEAVES = 1 << 20  # 1 TiB in our profile
MAX_DEPTH = 4
MAX_LEAF = 4 << 20  # bytes; Bitswap carries no block above 2 MiB

_RAW_TYPE, _FILE_TYPE = 0, 2  # UnixFS Data.Type


@dataclass(frozen=True, slots=True)
class Child:
    """A link of a file's tree node: the CID (v1, base32), whether it is a raw block, and the file bytes below it."""

    cid: str
    raw: bool
    size: int


@dataclass(frozen=True, slots=True)
class FileNode:
    """A dag-pb node of a file. A node without children is a leaf of an old layout, its bytes lie inside."""

    size: int
    children: tuple[Child, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """What of one leaf belongs to a range: `skip` bytes are before it, `take` bytes are in it."""

    leaf: Child
    skip: int
    take: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A file as its leaves in order, and the CIDs of the inner nodes above them."""

    size: int
    leaves: tuple[Child, ...]
    nodes: tuple[str, ...]

    def parts(self, offset: int, length: int) -> Iterator[Part]:
        """What covers the bytes `offset .. offset+length`, in order; ends early where the file ends."""
        at, end = 0, offset + length
        for leaf in self.leaves:
            first, last = max(offset, at), min(end, at + leaf.size)
            if first < last:
                yield Part(leaf, first - at, last - first)
            at += leaf.size
            if at >= end:
                return


def parse_file_node(block: bytes) -> FileNode:
    """Raises `Malformed` unless `block` is a node of a file whose sizes add up."""
    links: list[tuple[str, bool]] = []
    data = b""
    for number, value in _fields(block):
        if number == 2 and isinstance(value, bytes):
            links.append(_link(value))
        elif number == 1 and isinstance(value, bytes):
            data = value
    kind, size, sizes, inline = _unixfs(data)
    if kind not in (_RAW_TYPE, _FILE_TYPE):
        raise Malformed("it is a folder or a link, not a file")
    if len(links) != len(sizes):
        raise Malformed("its links and its sizes differ in number")
    if (links and inline) or sum(sizes) + len(inline) != size:
        raise Malformed("its layout is not a balanced tree")
    return FileNode(size, tuple(Child(cid, raw, part) for (cid, raw), part in zip(links, sizes, strict=True)))


def _link(block: bytes) -> tuple[str, bool]:
    for number, value in _fields(block):
        if number == 1 and isinstance(value, bytes):
            return _cid(value)
    raise Malformed("a link without a CID")


def _unixfs(data: bytes) -> tuple[int, int, list[int], bytes]:
    kind, size, inline = -1, None, b""
    sizes: list[int] = []
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            kind = value
        elif number == 2 and isinstance(value, bytes):
            inline = value
        elif number == 3 and isinstance(value, int):
            size = value
        elif number == 4 and isinstance(value, int):
            sizes.append(value)
        elif number == 4 and isinstance(value, bytes):  # packed, as some writers have it
            at = 0
            while at < len(value):
                part, at = _varint(value, at)
                sizes.append(part)
    return kind, len(inline) + sum(sizes) if size is None else size, sizes, inline


def _cid(binary: bytes) -> tuple[str, bool]:
    """A binary CID as v1 text, and whether its codec is raw. Version 0 becomes the same block's version 1."""
    if len(binary) == 34 and binary[:2] == b"\x12\x20":
        binary = b"\x01\x70" + binary
    if binary[:4] not in (b"\x01\x55\x12\x20", b"\x01\x70\x12\x20") or len(binary) != 36:
        raise Malformed("a link of a kind that files do not have")
    return "b" + base64.b32encode(binary).decode().rstrip("=").lower(), binary[1] == 0x55


def _fields(block: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message; of the wire types only varint and bytes occur in these formats."""
    at = 0
    while at < len(block):
        tag, at = _varint(block, at)
        value, at = _varint(block, at)
        if tag & 7 == 0:
            yield tag >> 3, value
        elif tag & 7 == 2 and at + value <= len(block):
            yield tag >> 3, block[at : at + value]
            at += value
        else:
            raise Malformed("it does not parse as a tree node")


def _varint(block: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(block[at : at + 9]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise Malformed("a number in it does not parse")
