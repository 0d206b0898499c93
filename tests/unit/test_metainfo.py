"""Making and reading torrents: edge sizes against a second, naive implementation, and everything that must be refused."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.errors import UsageError, VerificationError
from daemon.torrent import metainfo
from daemon.torrent.bencode import BadBencode, decode, encode
from daemon.torrent.metainfo import (
    BLOCK,
    MAX_PIECE,
    MAX_SMALL,
    MIN_PIECE,
    TorrentHasher,
    parse,
    piece_length,
    small_torrent,
)

NAME = "ab" * 32 + ".gguf"
SIZES = [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, MIN_PIECE - 1, MIN_PIECE, MIN_PIECE + 1, 2 * MIN_PIECE, 3 * MIN_PIECE + 17]

_bencoded: Any = st.recursive(
    st.integers(-(2**62), 2**62) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=8), inner, max_size=4),
    max_leaves=20,
)


def content(size: int) -> bytes:
    return (hashlib.shake_128(b"content").digest(4099) * (size // 4099 + 1))[:size]


def make(data: bytes, chunk: int = 1 << 20, name: str = NAME) -> metainfo.Metainfo:
    hasher = TorrentHasher(len(data))
    view = memoryview(data)
    for at in range(0, len(data), chunk):
        hasher.update(view[at : at + chunk])
    return hasher.finish(name)


def naive_root(data: bytes, leaves: int) -> bytes:
    """BEP 52 word for word: hash the blocks, pad with zero hashes to `leaves`, halve until one is left."""
    level = [hashlib.sha256(data[i : i + BLOCK]).digest() for i in range(0, len(data), BLOCK)]
    level += [bytes(32)] * (leaves - len(level))
    while len(level) > 1:
        level = [hashlib.sha256(a + b).digest() for a, b in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def changed(torrent: bytes, **info: Any) -> bytes:
    """`torrent` with entries of its info dict replaced; None removes one."""
    whole, _ = decode(torrent, max_depth=32, max_tokens=1000)
    for key, value in info.items():
        whole[b"info"][key.replace("_", " ").encode()] = value
    whole[b"info"] = {k: v for k, v in whole[b"info"].items() if v is not None}
    return encode(whole)


@pytest.mark.parametrize("size", SIZES)
def test_both_hash_trees_at_the_edges(size: int) -> None:
    data = content(size)
    made = make(data)
    whole, _ = decode(made.torrent, max_depth=32, max_tokens=1000)
    info = whole[b"info"]
    pieces = [data[i : i + MIN_PIECE] for i in range(0, size, MIN_PIECE)]
    assert info[b"pieces"] == b"".join(hashlib.sha1(piece).digest() for piece in pieces)
    blocks = -(-size // BLOCK)
    root = naive_root(data, 1 << (blocks - 1).bit_length())
    assert info[b"file tree"] == {NAME.encode(): {b"": {b"length": size, b"pieces root": root}}}
    layer = b"".join(naive_root(piece, MIN_PIECE // BLOCK) for piece in pieces)
    assert whole[b"piece layers"] == ({root: layer} if size > MIN_PIECE else {})
    assert made.infohash == hashlib.sha1(encode(info)).hexdigest()
    assert made.infohash_v2 == hashlib.sha256(encode(info)).hexdigest()


@pytest.mark.parametrize("size", SIZES)
def test_what_is_made_is_read(size: int) -> None:
    made = make(content(size))
    assert parse(made.torrent) == metainfo.TorrentFacts(made.infohash, made.infohash_v2, NAME, size, MIN_PIECE)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 3 * MIN_PIECE), chunk=st.integers(1000, 2 * MIN_PIECE))
def test_chunking_changes_nothing(size: int, chunk: int) -> None:
    data = content(size)
    assert make(data, chunk) == make(data, size)


@given(size=st.integers(1, 1 << 45))
def test_piece_length_rule(size: int) -> None:
    length = piece_length(size)
    assert MIN_PIECE <= length <= MAX_PIECE and length & (length - 1) == 0
    assert length == MAX_PIECE or size <= 2048 * length
    assert length == MIN_PIECE or size > 2048 * (length // 2)


def test_infohashes_stay_what_they_are() -> None:
    """Pinned for ever: another value would split the swarm of everything that was published."""
    made = make(content(3 * MIN_PIECE + 17))
    assert made.infohash == "7f6ccdb19aaa4ed83ee7e347c1524951cf47df36"
    assert made.infohash_v2 == "230b8fe0f5a3a8e2c2cb02a473de6a7c1cad77ca94182025b303fd8ca0877bd6"


@pytest.mark.parametrize(
    ("size", "infohash", "infohash_v2"),
    [
        (1, "af75e5b560823f8d41818910e62c252d8fce6e40", "3f7ec491ed2ac404e0cb54460ba4b6ed908945c63f3f1d876e67d006ae0078e5"),
        (BLOCK, "d370da90968ed2b0efc7e14170dd5e7061bb965b", "00b19632ce2e20c643bfab0e73677ba41e2d906aa50c63eb97fdaac16d550b28"),
        (BLOCK + 1, "5a680ae2a0e6c3dd061ec9f9a357ff34137d1ac8", "c8cff961ef5d41ddfe71fbb386e88542558e6d45ac4391fa07e90929b6d1000b"),
        (MAX_SMALL, "a470bb150cb78357f2519e7f0fa628727aeee9e4", "34141589486f226cefe4ac373ca516401236587bf7819e95df68b59a53d5dcf1"),
    ],
)
def test_small_torrents_stay_what_they_are(size: int, infohash: str, infohash_v2: str) -> None:
    """Pinned for ever: whoever holds one manifest has to be in one swarm. test_torrent.py shows that libtorrent agrees."""
    made = small_torrent("bafkreigh2akiscaildc.json", content(size))
    assert (made.infohash, made.infohash_v2) == (infohash, infohash_v2)
    facts = parse(made.torrent)
    assert (facts.infohash, facts.size, facts.piece_length) == (infohash, size, BLOCK)


@pytest.mark.parametrize("size", [0, MAX_SMALL + 1])
def test_sizes_that_are_not_small(size: int) -> None:
    with pytest.raises(UsageError):
        small_torrent("a.json", bytes(size))


def test_a_small_torrent_has_a_plain_name() -> None:
    with pytest.raises(VerificationError):
        small_torrent("../a.json", b"x")


@pytest.mark.parametrize("size", [0, -1, metainfo.MAX_SIZE + 1])
def test_sizes_that_cannot_be_shared(size: int) -> None:
    with pytest.raises(UsageError):
        TorrentHasher(size)


@pytest.mark.parametrize("fed", [0, 99, 101])
def test_a_file_that_changes_its_size_has_no_torrent(fed: int) -> None:
    hasher = TorrentHasher(100)
    hasher.update(bytes(fed))
    with pytest.raises(VerificationError):
        hasher.finish(NAME)


@pytest.mark.parametrize("name", ["", ".", "..", "../evil", "a/b", "a\\b", "a\0b", "a\x1b[2J", "x" * 256])
def test_names_that_are_no_plain_names(name: str) -> None:
    with pytest.raises(VerificationError):
        make(b"x", name=name)
    raw = name.encode()
    tree = {raw: {b"": {b"length": 1, b"pieces root": hashlib.sha256(b"x").digest()}}}
    with pytest.raises(VerificationError):
        parse(changed(make(b"x").torrent, name=raw, file_tree=tree))


def test_a_name_that_is_no_utf8() -> None:
    with pytest.raises(VerificationError, match="UTF-8"):
        parse(changed(make(b"x").torrent, name=b"\xff\xfe"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"files": [{b"length": 1, b"path": [b"a"]}]}, "several files"),
        ({"meta_version": None}, "no hybrid"),
        ({"meta_version": 3}, "no hybrid"),
        ({"pieces": None}, "pieces is missing"),
        ({"pieces": bytes(20 * 3)}, "v1 hashes"),
        ({"pieces": bytes(20 * 4 + 1)}, "v1 hashes"),
        ({"length": 3 * MIN_PIECE + 18}, "different sizes"),
        ({"length": 2**60}, "length is missing or out of range"),
        ({"length": -1}, "length is missing or out of range"),
        ({"length": None}, "length is missing or out of range"),
        ({"length": b"17"}, "length is missing or out of range"),
        ({"piece_length": MIN_PIECE - 1}, "power of two"),
        ({"piece_length": 1}, "out of range"),
        ({"piece_length": 1 << 40}, "out of range"),
        ({"name": b"other"}, "different files"),
        ({"name": None}, "name is missing"),
        ({"file_tree": {}}, "different files"),
        ({"file_tree": {NAME.encode(): {b"sub": {b"": {}}}}}, "folder"),
        ({"file_tree": {NAME.encode(): {b"": {b"length": 3 * MIN_PIECE + 17, b"pieces root": b"short"}}}}, "no SHA-256"),
        ({"file_tree": {NAME.encode(): {b"": {b"length": 3 * MIN_PIECE + 17, b"pieces root": bytes(32)}}}}, "another file"),
    ],
)
def test_info_dicts_that_are_refused(changes: dict[str, Any], why: str) -> None:
    torrent = make(content(3 * MIN_PIECE + 17)).torrent
    with pytest.raises(VerificationError, match=why):
        parse(changed(torrent, **changes))


@pytest.mark.parametrize("spoil", ["none", "short", "bit", "extra"])
def test_piece_layers_that_are_refused(spoil: str) -> None:
    whole, _ = decode(make(content(3 * MIN_PIECE)).torrent, max_depth=32, max_tokens=1000)
    ((root, layer),) = whole[b"piece layers"].items()
    whole[b"piece layers"] = {
        "none": {},
        "short": {root: layer[:-32]},
        "bit": {root: layer[:-1] + bytes([layer[-1] ^ 1])},
        "extra": {root: layer, b"\xff" * 32: bytes(32)},
    }[spoil]
    with pytest.raises(VerificationError, match="piece layers"):
        parse(encode(whole))


@settings(deadline=None)
@given(at=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_never_keeps_the_infohash(at: int, bit: int) -> None:
    """A mutated torrent is refused, or it is openly another torrent."""
    made = make(content(2 * MIN_PIECE + 1))
    raw = bytearray(made.torrent)
    raw[at % len(raw)] ^= 1 << bit
    try:
        facts = parse(bytes(raw))
    except VerificationError:
        return
    assert facts.infohash_v2 != made.infohash_v2


@given(_bencoded)
def test_bencode_round_trip(value: Any) -> None:
    raw = encode(value)
    assert decode(raw, max_depth=32, max_tokens=1000)[0] == value


@given(st.binary(max_size=200))
def test_what_decodes_is_canonical(raw: bytes) -> None:
    try:
        value, _ = decode(raw, max_depth=32, max_tokens=1000)
    except BadBencode:
        return
    assert encode(value) == raw


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"i", b"ie", b"i-0e", b"i01e", b"i1", b"i" + b"9" * 30 + b"e", b"01:a", b"2:a", b"9999999999:a", b"99999999999999:a", b"-1:a",
        b"l", b"li1e", b"d", b"d1:a", b"d1:ae", b"di1ei2ee", b"d1:bi1e1:ai2ee", b"d1:ai1e1:ai2ee", b"i1ei2e", b"le ", b"x",
        b"l" * 200_000, b"l" * 33 + b"e" * 33, b"l" + b"i1e" * 2000 + b"e",
    ],
)  # fmt: skip
def test_bencode_that_is_refused(raw: bytes) -> None:
    with pytest.raises(BadBencode):
        decode(raw, max_depth=32, max_tokens=1000)
    with pytest.raises(VerificationError):
        parse(raw)


def test_an_oversized_torrent_is_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    torrent = make(b"x").torrent
    monkeypatch.setattr(metainfo, "MAX_TORRENT", len(torrent) - 1)
    with pytest.raises(VerificationError, match="larger"):
        parse(torrent)
