"""The pure half of the sources: cutting a stream into pieces, and finding runs of missing ones."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

from hypothesis import given
from hypothesis import strategies as st

from daemon.transfer.sources import _regrouped, _runs


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
