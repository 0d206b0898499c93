"""What a stranger's tree nodes may say, and what of them is believed."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.ipfs.dag import Child, Layout, parse_file_node
from registry.errors import Malformed

RAW = b"\x01\x55\x12\x20"


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def number(at: int, value: int) -> bytes:
    return varint(at << 3) + varint(value)


def node(sizes: list[int], *, kind: int = 2, total: int | None = None, inline: bytes = b"", links: int | None = None) -> bytes:
    count = len(sizes) if links is None else links
    body = b"".join(field(2, field(1, RAW + bytes([i % 256]) * 32) + field(2, b"") + number(3, 9)) for i in range(count))
    size = sum(sizes) + len(inline) if total is None else total
    meta = number(1, kind) + (field(2, inline) if inline else b"") + number(3, size) + b"".join(number(4, s) for s in sizes)
    return body + field(1, meta)


@given(st.lists(st.integers(0, 1 << 40), max_size=30))
def test_a_node_is_read_as_it_was_written(sizes: list[int]) -> None:
    found = parse_file_node(node(sizes))
    assert found.size == sum(sizes)
    assert [child.size for child in found.children] == sizes
    assert all(child.raw for child in found.children)


def test_version_0_links_are_named_by_the_version_1_of_the_same_block() -> None:
    digest = bytes(range(32))
    block = field(2, field(1, b"\x12\x20" + digest)) + field(1, number(1, 2) + number(3, 5) + number(4, 5))
    (child,) = parse_file_node(block).children
    expected = "b" + base64.b32encode(b"\x01\x70\x12\x20" + digest).decode().rstrip("=").lower()
    assert child == Child(expected, raw=False, size=5)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (node([1, 2], kind=1), "folder"),
        (node([], kind=4), "folder"),
        (b"", "folder"),
        (node([1, 2], links=1), "differ in number"),
        (node([1, 2], total=4), "balanced"),
        (node([1], inline=b"x"), "balanced"),
        (b"\x12\x05abc", "parse"),
        (b"\xff" * 12, "number"),
        (b"\x0d\x01", "parse"),
        (field(2, b"") + field(1, number(1, 2) + number(3, 1) + number(4, 1)), "without a CID"),
        (field(2, field(1, b"\x01\x71\x12\x20" + bytes(32))) + field(1, number(1, 2) + number(3, 1) + number(4, 1)), "kind"),
    ],
)
def test_a_node_that_is_no_file_or_does_not_add_up_is_refused(block: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        parse_file_node(block)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_node_or_malformed(block: bytes) -> None:
    try:
        parse_file_node(block)
    except Malformed:
        pass


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(0, 300), st.integers(0, 300))
def test_parts_cover_exactly_the_range(sizes: list[int], offset: int, length: int) -> None:
    data = bytes(i % 251 for i in range(sum(sizes)))
    leaves, blobs, at = [], {}, 0
    for index, size in enumerate(sizes):
        leaves.append(Child(str(index), True, size))
        blobs[str(index)] = data[at : at + size]
        at += size
    parts = Layout(len(data), tuple(leaves), ()).parts(offset, length)
    assert b"".join(blobs[p.leaf.cid][p.skip : p.skip + p.take] for p in parts) == data[offset : offset + length]
