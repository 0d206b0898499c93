"""Deterministic torrents: one file's bytes to a hybrid (v1 + v2) .torrent, and a strict reader for what others send.

The info dict is a pure function of the bytes, so two people who publish one file without knowing of each other are in
one swarm. No dates, trackers, web seeds or attributes go in; the name is `<blake3>.gguf`, which is why it is only given
at the end. Sources: BEP 3 (v1), BEP 52 (v2, hybrid, piece layers). Nothing here touches files, clocks or libtorrent.

What `parse` accepts:
- at most `MAX_TORRENT` bytes of bencode, `MAX_DEPTH` deep and `MAX_TOKENS` items long, canonical (sorted, unique keys, no leading zeros);
- exactly one file, in both halves, with one name and one size;
- a name that is a plain file name;
- a piece length that is a power of two, 16 KiB to 16 MiB, and as many v1 hashes as the size asks for;
- piece layers that are complete and add up to the `pieces root`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from daemon.errors import UsageError, VerificationError
from daemon.torrent.bencode import BadBencode, decode, encode

BLOCK = 16 * 1024  # bytes under one leaf of the v2 tree (BEP 52)
MIN_PIECE = 1 << 20
MAX_PIECE = 16 << 20
_PIECES_AIMED_AT = 2048
MAX_SMALL = 64 << 10  # bytes of an object that travels as a small torrent, as large as a manifest may be

MAX_TORRENT = 64 << 20  # bytes
MAX_DEPTH = 32
MAX_TOKENS = 100_000  # ours have about 30; the room is for what other clients add
MAX_SIZE = 1 << 46  # 64 TiB: nothing larger is a model, and no arithmetic on it surprises
MAX_NAME = 255  # bytes, the limit of common file systems


class IncompleteLayers(VerificationError):
    """All is well with the torrent but its piece layers, which are missing or wrong."""


@dataclass(frozen=True, slots=True)
class Metainfo:
    """A made torrent: both infohashes in hex (40 and 64 digits) and the .torrent with its piece layers."""

    infohash: str
    infohash_v2: str
    torrent: bytes


@dataclass(frozen=True, slots=True)
class TorrentFacts:
    """What a checked .torrent says. `size` and `piece_length` are bytes."""

    infohash: str
    infohash_v2: str
    name: str
    size: int
    piece_length: int


def piece_length(size: int) -> int:
    """The piece length of a file of `size` bytes: size/2048 rounded up to a power of two, within 1 to 16 MiB."""
    aimed = min(max(-(-size // _PIECES_AIMED_AT), MIN_PIECE), MAX_PIECE)
    return 1 << (aimed - 1).bit_length()


class TorrentHasher:
    """Both hash trees of a file whose size is known beforehand, fed in any chunking.

    `pieces` (v1) and `blocks` (v2) are independent, so that two threads may feed them; `update` feeds both.
    """

    def __init__(self, size: int, piece: int | None = None) -> None:
        """`piece` is the piece length in bytes, a power of two; the rule of `piece_length` when it is not given."""
        if not 0 < size <= MAX_SIZE:
            raise UsageError("torrent", f"a file of {size} bytes cannot be shared", "publish a file that is not empty")
        self.size = size
        self.piece_length = piece or piece_length(size)
        self.pieces = PieceHasher(self.piece_length)
        self.blocks = BlockHasher(self.piece_length)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self.pieces.update(data)
        self.blocks.update(data)

    def finish(self, name: str) -> Metainfo:
        """The torrent of what was fed. Raises `VerificationError` when that was not `size` bytes."""
        if not self.pieces.size == self.blocks.size == self.size:
            raise VerificationError("torrent", "the file changed its size while it was read", "try again when nothing writes to it")
        root, layer = self.blocks.finish()
        encoded_name = _checked_name(name.encode())
        info = {
            b"file tree": {encoded_name: {b"": {b"length": self.size, b"pieces root": root}}},
            b"length": self.size,
            b"meta version": 2,
            b"name": encoded_name,
            b"piece length": self.piece_length,
            b"pieces": self.pieces.finish(),
        }
        layers = {root: layer} if self.size > self.piece_length else {}
        raw = encode(info)
        return Metainfo(
            infohash=_sha1(raw).hexdigest(),
            infohash_v2=hashlib.sha256(raw).hexdigest(),
            torrent=b"d4:info" + raw + b"12:piece layers" + encode(layers) + b"e",
        )


def small_torrent(name: str, data: bytes) -> Metainfo:
    """The torrent of a small object that has a name everywhere, such as a manifest under its CID.

    Hybrid, one file, pieces of 16 KiB, nothing else in it: whoever holds the same bytes under the same name is in the
    same swarm. Raises `UsageError` for nothing or more than `MAX_SMALL` bytes, `VerificationError` for a name that is
    no plain file name.
    """
    if not 0 < len(data) <= MAX_SMALL:
        why = f"it has {len(data)} bytes where 1 to {MAX_SMALL} make a small torrent"
        raise UsageError(name, why, "share it as a file of its own")
    hasher = TorrentHasher(len(data), piece=BLOCK)
    hasher.update(data)
    return hasher.finish(name)


class PieceHasher:
    """SHA-1 of every piece (BEP 3); the last piece is as short as the file makes it."""

    def __init__(self, piece_length: int) -> None:
        self.size = 0
        self._length = piece_length
        self._hashes = bytearray()
        self._open = _sha1()
        self._room = piece_length

    def update(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        self.size += len(view)
        start = 0
        while start < len(view):
            part = view[start : start + self._room]
            self._open.update(part)
            self._room -= len(part)
            start += len(part)
            if self._room == 0:
                self._close()

    def finish(self) -> bytes:
        if self._room < self._length:
            self._close()
        return bytes(self._hashes)

    def _close(self) -> None:
        self._hashes += self._open.digest()
        self._open = _sha1()
        self._room = self._length


class BlockHasher:
    """The v2 Merkle tree (BEP 52): SHA-256 of 16 KiB blocks, folded to one hash per piece as the pieces fill."""

    def __init__(self, piece_length: int) -> None:
        self.size = 0
        self._per_piece = piece_length // BLOCK
        self._leaves: list[bytes] = []
        self._layer: list[bytes] = []
        self._rest = bytearray()  # less than one block, carried from one update to the next

    def update(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        self.size += len(view)
        start = 0
        if self._rest:
            start = min(BLOCK - len(self._rest), len(view))
            self._rest += view[:start]
            if len(self._rest) < BLOCK:
                return
            self._leaf(self._rest)
            self._rest = bytearray()
        whole = start + (len(view) - start) // BLOCK * BLOCK
        for at in range(start, whole, BLOCK):
            self._leaf(view[at : at + BLOCK])
        self._rest += view[whole:]

    def finish(self) -> tuple[bytes, bytes]:
        """(pieces root, piece layer). The layer only goes into a torrent whose file is larger than one piece."""
        if self._rest:
            self._leaf(self._rest)
            self._rest = bytearray()
        if not self._layer:
            # Up to one piece the tree is only as wide as the next power of two of the blocks there are (BEP 52).
            return _fold(self._leaves, _ZERO), b"".join(self._leaves)
        if self._leaves:
            self._layer.append(_fold(self._leaves + [_ZERO] * (self._per_piece - len(self._leaves)), _ZERO))
            self._leaves = []
        return layer_root(self._layer, self._per_piece * BLOCK), b"".join(self._layer)

    def _leaf(self, block: bytes | bytearray | memoryview) -> None:
        self._leaves.append(hashlib.sha256(block).digest())
        if len(self._leaves) == self._per_piece:
            # A file of exactly one piece lands here too: its root is the piece's hash either way.
            self._layer.append(_fold(self._leaves, _ZERO))
            self._leaves = []


_ZERO = bytes(32)


def _sha1(data: bytes = b"") -> Any:
    # BitTorrent v1 names torrents by SHA-1; what it protects here is checked by SHA-256 and BLAKE3 as well.
    return hashlib.sha1(data, usedforsecurity=False)


def _fold(hashes: list[bytes], padding: bytes) -> bytes:
    """Root of a binary tree over `hashes`, widened with `padding` to the next power of two."""
    level = list(hashes)
    sha256 = hashlib.sha256
    while len(level) > 1:
        if len(level) % 2:
            level.append(padding)
        level = [sha256(level[i] + level[i + 1]).digest() for i in range(0, len(level), 2)]
        padding = sha256(padding + padding).digest()
    return level[0]


def layer_root(layer: list[bytes], piece_length: int) -> bytes:
    """The `pieces root` over a piece layer; missing pieces count as pieces of zero leaves (BEP 52)."""
    padding = _ZERO
    for _ in range((piece_length // BLOCK).bit_length() - 1):
        padding = hashlib.sha256(padding + padding).digest()
    return _fold(layer, padding)


def parse(torrent: bytes) -> TorrentFacts:
    """Read a .torrent by the rules on top of this file. Raises `VerificationError` that says which one it breaks."""
    if len(torrent) > MAX_TORRENT:
        raise _refused(f"it is larger than {MAX_TORRENT} bytes")
    try:
        whole, places = decode(torrent, max_depth=MAX_DEPTH, max_tokens=MAX_TOKENS)
    except BadBencode as error:
        raise _refused(str(error)) from error
    if not isinstance(whole, dict):
        raise _refused("it is no torrent")
    info = _dict(whole, b"info")
    if b"files" in info:
        raise _refused("it holds several files")
    if info.get(b"meta version") != 2:
        raise _refused("it is no hybrid (v1 and v2) torrent")
    name = _checked_name(_bytes(info, b"name"))
    size = _int(info, b"length", 1, MAX_SIZE)
    length = _int(info, b"piece length", BLOCK, MAX_PIECE)
    if length & (length - 1):
        raise _refused("its piece length is no power of two")
    if len(_bytes(info, b"pieces")) != 20 * -(-size // length):
        raise _refused("the number of its v1 hashes does not match its size")
    root = _only_file(_dict(info, b"file tree"), name, size)
    _check_layers(whole.get(b"piece layers"), root, size, length)
    raw = torrent[slice(*places[b"info"])]
    return TorrentFacts(_sha1(raw).hexdigest(), hashlib.sha256(raw).hexdigest(), name.decode(), size, length)


def _only_file(tree: Mapping[bytes, Any], name: bytes, size: int) -> bytes:
    if list(tree) != [name]:
        raise _refused("its two halves name different files")
    entry = tree[name]
    if not isinstance(entry, dict) or list(entry) != [b""]:
        raise _refused("it holds a folder")
    facts = _dict(entry, b"")
    if _int(facts, b"length", 1, MAX_SIZE) != size:
        raise _refused("its two halves give different sizes")
    root = _bytes(facts, b"pieces root")
    if len(root) != 32:
        raise _refused("its pieces root is no SHA-256")
    return root


def _check_layers(layers: Any, root: bytes, size: int, length: int) -> None:
    if size <= length:
        if layers not in (None, {}):
            raise _refused("it has piece layers that belong to no file")
        return  # the tree is inside the one piece, and the root is all there is
    if not isinstance(layers, dict) or list(layers) != [root] or not isinstance(layers[root], bytes):
        raise _refused("its piece layers are missing or belong to another file", IncompleteLayers)
    layer = layers[root]
    if len(layer) != 32 * -(-size // length):
        raise _refused("its piece layers do not match its size", IncompleteLayers)
    if layer_root([layer[i : i + 32] for i in range(0, len(layer), 32)], length) != root:
        raise _refused("its piece layers do not add up to its root", IncompleteLayers)


def _checked_name(name: bytes) -> bytes:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise _refused("its file name is no UTF-8") from None
    if not text or text in (".", "..") or len(name) > MAX_NAME or re.search(r"[/\\\x00-\x1f\x7f]", text):
        raise _refused("its file name is no plain name")
    return name


def _dict(where: Mapping[bytes, Any], key: bytes) -> dict[bytes, Any]:
    value = where.get(key)
    if not isinstance(value, dict):
        raise _refused(f"{key.decode() or 'file'} is missing")
    return value


def _bytes(where: Mapping[bytes, Any], key: bytes) -> bytes:
    value = where.get(key)
    if not isinstance(value, bytes):
        raise _refused(f"{key.decode()} is missing")
    return value


def _int(where: Mapping[bytes, Any], key: bytes, low: int, high: int) -> int:
    value = where.get(key)
    if not isinstance(value, int) or not low <= value <= high:
        raise _refused(f"{key.decode()} is missing or out of range")
    return value


def _refused(why: str, kind: type[VerificationError] = VerificationError) -> VerificationError:
    return kind("torrent", why, "get it from another source")
