"""Nodes that failed rest, longer each time, and are forgotten when they are of no use."""

from __future__ import annotations

import pytest

from daemon.peerapi.rests import Rests


def test_each_failure_doubles_the_rest_up_to_the_longest() -> None:
    now = [0.0]
    rests = Rests(lambda: now[0], first_s=1, longest_s=3)
    for pause in (1.0, 2.0, 3.0, 3.0):
        rests.begin("a")
        assert rests.next_end_s() == pytest.approx(pause)
        now[0] += pause - 0.1
        assert rests.resting("a")
        now[0] += 0.2
        assert not rests.resting("a") and rests.next_end_s() is None
    rests.end("a")
    rests.begin("a")
    assert rests.next_end_s() == pytest.approx(1.0)


def test_the_spread_is_of_the_rest_and_does_not_add_up() -> None:
    rests = Rests(lambda: 0.0, first_s=1, longest_s=8, spread=0.5)
    for pause in (1, 2, 4, 8, 8):
        rests.begin("a")
        end = rests.next_end_s()
        assert end is not None and 0.5 * pause <= end <= 1.5 * pause


def test_whoever_is_not_kept_begins_anew() -> None:
    rests = Rests(lambda: 0.0, first_s=1, longest_s=8)
    for node in ("a", "b", "a", "b"):
        rests.begin(node)
    rests.keep_only({"a"})
    assert rests.resting("a") and not rests.resting("b")
    rests.begin("b")
    assert rests.next_end_s() == 1.0
