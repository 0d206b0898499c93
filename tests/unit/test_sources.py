"""The pure half of the sources: cutting a stream into pieces, and finding runs of missing ones."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.errors import VerificationError
from daemon.transfer.sources import RangeSource, RateLimit, _regrouped, _runs


async def stream(chunks: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


@given(st.lists(st.binary(max_size=40), max_size=12), st.lists(st.integers(1, 30), min_size=1, max_size=12))
async def test_regrouped_cuts_the_same_bytes(chunks: list[bytes], sizes: list[int]) -> None:
    whole = b"".join(chunks)
    expected, at = [], 0
    for size in sizes:
        if at + size > len(whole):
            break
        expected.append(whole[at : at + size])
        at += size
    assert [piece async for piece in _regrouped(stream(chunks), sizes)] == expected


async def test_a_chunk_of_the_right_size_is_not_copied() -> None:
    chunk = b"12345678"
    (piece,) = [piece async for piece in _regrouped(stream([chunk]), [8])]
    assert piece is chunk


@given(st.sets(st.integers(0, 60)), st.integers(1, 8))
def test_runs_are_contiguous_bounded_and_complete(pieces: set[int], most: int) -> None:
    runs = list(_runs(iter(sorted(pieces)), most))
    assert [piece for run in runs for piece in run] == sorted(pieces)
    for run in runs:
        assert 1 <= len(run) <= most
        assert run == list(range(run[0], run[0] + len(run)))
    for left, right in itertools.pairwise(runs):
        assert len(left) == most or right[0] > left[-1] + 1  # no run ends early


class Sink:
    """One piece. It is refused a few times, as libtorrent does when a peer had brought a wrong block of it before."""

    piece_length = 8

    def __init__(self, refusals: int) -> None:
        self._refusals = refusals
        self._here = False

    def piece_size(self, index: int) -> int:
        return 8

    def missing(self) -> list[int]:
        return [] if self._here else [0]

    def is_missing(self, index: int) -> bool:
        return not self._here

    async def put(self, index: int, data: bytes) -> bool:
        self._refusals -= 1
        self._here = self._refusals < 0
        return self._here

    def exclude(self, pieces: Sequence[int]) -> None: ...

    def include(self, pieces: Sequence[int]) -> None: ...


class OneFile:
    async def leaves(self, cid: str, *, deadline_s: float) -> list[str]:
        return ["a leaf"]

    def read_range(self, cid: str, offset: int, length: int, *, stall_s: float) -> AsyncIterator[bytes]:
        return stream([b"GGUF", b"data"])

    async def drop_blocks(self, cids: Sequence[str]) -> None: ...


@pytest.mark.parametrize(("refusals", "right"), [(0, True), (1, True), (99, False)])
async def test_a_lying_peers_block_in_a_piece_does_not_speak_against_what_ipfs_gives(refusals: int, right: bool) -> None:
    node: Any = OneFile()
    sink, counted = Sink(refusals), list[int]()
    source = RangeSource(node, "the cid", 8, sink, RateLimit(0), counted.append, stall_s=1.0)
    if right:
        await source.run()
    else:
        with pytest.raises(VerificationError, match="piece 0"):
            await source.run()
    assert (sink.missing(), counted) == (([], [8]) if right else ([0], []))
