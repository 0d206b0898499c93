"""IPFS content addresses: the CID of a file by the profile `unixfs-v1-2025` (IPIP-499), and the parser of CIDs.

The profile for files: CIDv1, sha2-256, raw leaves of 1 MiB, balanced tree with at most 1024 links per node. A file of at
most 1 MiB is its one raw leaf (`bafkrei..`); a larger one is a dag-pb tree (`bafybei..`) in which all leaves have the same
depth. Sources: kubo `ipfs add`, boxo `ipld/unixfs/importer/balanced`, the dag-pb and UnixFS specifications. Agreement with
Kubo is held by vectors in tests/unit/test_cid.py.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from registry.errors import Malformed, shown

LEAF_SIZE = 1 << 20
MAX_LINKS = 1024
MAX_CID_TEXT = 128  # the longest accepted spelling (base16) of a sha2-256 CIDv1 has 73 characters

Codec = Literal["raw", "dag-pb"]

_RAW = b"\x01\x55\x12\x20"  # CIDv1, raw, sha2-256, 32 bytes
_DAG_PB = b"\x01\x70\x12\x20"
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Cid:
    """A CID that can name a file: sha2-256 with codec raw or dag-pb."""

    codec: Codec
    digest: bytes  # 32 bytes

    @property
    def canonical(self) -> str:
        """CIDv1 in lower-case base32, the one spelling used everywhere else."""
        return _text((_RAW if self.codec == "raw" else _DAG_PB) + self.digest)

    def __str__(self) -> str:
        return self.canonical


@dataclass(frozen=True, slots=True)
class Leaf:
    """One chunk of a file: its sha2-256 and its length in bytes."""

    digest: bytes
    size: int

    @property
    def cid(self) -> str:
        return _text(_RAW + self.digest)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tree node seen from its parent: its binary CID, the file bytes below it and its cumulative DAG size."""

    cid: bytes
    size: int
    dag_size: int


class UnixfsHasher:
    """The CID of a stream, fed in pieces of any length; pieces are hashed where they lie, never copied.

    `leaves` are the CIDs of the leaves in file order; after `finish()` every byte fed is covered and `nodes` holds the
    CIDs of the inner nodes, the root last (empty when the file is one leaf).
    """

    def __init__(self) -> None:
        self.nodes: list[str] = []
        self._leaves: list[Leaf] = []
        self._hash = hashlib.sha256()
        self._filled = 0
        self._root: str | None = None

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Feed the next bytes. The GIL is released for long pieces, so this may run on a thread of its own."""
        if self._root is not None:
            raise RuntimeError("the hasher is finished")
        view = memoryview(data).cast("B")
        offset = 0
        while offset < len(view):
            piece = view[offset : offset + LEAF_SIZE - self._filled]
            self._hash.update(piece)
            offset += len(piece)
            self._filled += len(piece)
            if self._filled == LEAF_SIZE:
                self._close_leaf()

    def finish(self) -> str:
        """The CID of everything fed. Calling it again returns the same."""
        if self._root is None:
            if self._filled or not self._leaves:
                self._close_leaf()
            self._root, self.nodes = tree(self._leaves)
        return self._root

    @property
    def leaves(self) -> list[str]:
        return [leaf.cid for leaf in self._leaves]

    def _close_leaf(self) -> None:
        self._leaves.append(Leaf(self._hash.digest(), self._filled))
        self._hash = hashlib.sha256()
        self._filled = 0


def leaf_cid(data: bytes | bytearray | memoryview) -> str:
    """The CID of one leaf: raw codec over the bytes. Also the CID of any object of at most 1 MiB."""
    return _text(_RAW + hashlib.sha256(data).digest())


def tree(leaves: Sequence[Leaf]) -> tuple[str, list[str]]:
    """The balanced tree over `leaves` (at least one): its root CID and the CIDs of all inner nodes, the root last."""
    level = [_Entry(_RAW + leaf.digest, leaf.size, leaf.size) for leaf in leaves]
    nodes: list[str] = []
    while len(level) > 1:
        level = [_node(level[i : i + MAX_LINKS]) for i in range(0, len(level), MAX_LINKS)]
        nodes += [_text(entry.cid) for entry in level]
    return _text(level[0].cid), nodes


def parse_cid(text: str) -> Cid:
    """A CID in any common spelling: v0, or v1 in base32, base36, base58btc or base16.

    Raises `Malformed` unless it is sha2-256 with codec raw or dag-pb: others exist on IPFS, but no file of ours has one.
    """
    if len(text) > MAX_CID_TEXT:
        raise Malformed(f"not a CID: longer than {MAX_CID_TEXT} characters")
    if len(text) == 46 and text.startswith("Qm"):
        return _from_v0(_from_digits(text, _BASE58))
    return _from_v1(_decode_multibase(text))


def _node(children: Sequence[_Entry]) -> _Entry:
    """A dag-pb node (links before data, as every IPFS implementation writes them) around UnixFS file metadata."""
    size = sum(child.size for child in children)
    # UnixFS `Data`: Type=File, filesize, then one blocksizes entry per link.
    meta = b"\x08\x02\x18" + _varint(size) + b"".join(b"\x20" + _varint(child.size) for child in children)
    links = b"".join(_field(0x12, _link(child)) for child in children)
    block = links + _field(0x0A, meta)
    return _Entry(_DAG_PB + hashlib.sha256(block).digest(), size, len(block) + sum(child.dag_size for child in children))


def _link(child: _Entry) -> bytes:
    # The name is empty but present: leaving it out gives another CID.
    return _field(0x0A, child.cid) + b"\x12\x00" + b"\x18" + _varint(child.dag_size)


def _field(tag: int, value: bytes) -> bytes:
    return bytes((tag,)) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _text(binary: bytes) -> str:
    return "b" + base64.b32encode(binary).decode().rstrip("=").lower()


def _from_v0(binary: bytes) -> Cid:
    if len(binary) != 34 or binary[:2] != b"\x12\x20":
        raise Malformed("not a CID: version 0 must be a sha2-256 multihash")
    return Cid("dag-pb", binary[2:])


def _from_v1(binary: bytes) -> Cid:
    version, codec, at = _read_varint(binary, 0), 0, 0
    if version[0] != 1:
        raise Malformed("not a CID: only versions 0 and 1 exist")
    codec, at = _read_varint(binary, version[1])
    function, at = _read_varint(binary, at)
    length, at = _read_varint(binary, at)
    digest = binary[at:]
    if function != 0x12:
        raise Malformed(f"CID with hash function 0x{function:x}: models are named by sha2-256")
    if length != 32 or len(digest) != 32:
        raise Malformed("not a CID: the digest has the wrong length")
    if codec not in (0x55, 0x70):
        raise Malformed(f"CID with codec 0x{codec:x}: it names no file (raw and dag-pb do)")
    return Cid("raw" if codec == 0x55 else "dag-pb", digest)


def _read_varint(binary: bytes, at: int) -> tuple[int, int]:
    """An unsigned varint in its shortest form (the multiformats rule); returns the value and where it ends."""
    value = shift = 0
    for end in range(at, min(at + 9, len(binary))):
        value |= (binary[end] & 0x7F) << shift
        shift += 7
        if not binary[end] & 0x80:
            if binary[end] == 0 and end > at:
                break
            return value, end + 1
    raise Malformed("not a CID: a number in it does not parse")


def _decode_multibase(text: str) -> bytes:
    base, body = text[:1], text[1:]
    if base in ("b", "B"):
        return _from_base32(body, upper=base == "B")
    if base in ("f", "F"):
        return _from_base16(body, upper=base == "F")
    if base == "k":
        return _from_digits(body, _BASE36)
    if base == "z":
        return _from_digits(body, _BASE58)
    raise Malformed(f"not a CID: {shown(text)}")


def _from_base32(body: str, *, upper: bool) -> bytes:
    try:
        binary = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
    except ValueError:
        raise Malformed("not a CID: wrong base32") from None
    # Decoders ignore leftover bits and case; two spellings of one CID would slip through.
    again = base64.b32encode(binary).decode().rstrip("=")
    if body != (again if upper else again.lower()):
        raise Malformed("not a CID: wrong base32")
    return binary


def _from_base16(body: str, *, upper: bool) -> bytes:
    digits = "0123456789ABCDEF" if upper else "0123456789abcdef"
    if len(body) % 2 or any(c not in digits for c in body):
        raise Malformed("not a CID: wrong base16")
    return bytes.fromhex(body)


def _from_digits(body: str, alphabet: str) -> bytes:
    """Base58btc or base36: one large number, with a leading zero byte for every leading zero digit."""
    number = 0
    for character in body:
        digit = alphabet.find(character)
        if digit < 0:
            raise Malformed(f"not a CID: wrong character {shown(character)}")
        number = number * len(alphabet) + digit
    zeros = len(body) - len(body.lstrip(alphabet[0]))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
