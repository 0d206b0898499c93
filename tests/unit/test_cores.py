"""How many cores the rest of the machine leaves."""

from __future__ import annotations

import os
import sys
import time

import pytest

from daemon.engine import cores
from daemon.engine.cores import Reading


@pytest.mark.parametrize(
    ("of", "busy", "own", "expected"),
    [
        (2, 0.0, 0.0, 2),  # nothing runs
        (2, 2.0, 1.8, 2),  # we run, and somebody now and then
        (2, 2.0, 1.33, 1),  # our two threads and a busy process
        (2, 2.0, 1.0, 1),  # our one thread and that process
        (2, 2.0, 0.5, 1),  # never none
        (8, 5.0, 4.6, 7),  # less than half of one is wanted
        (2, 0.0, 1.9, 2),  # a sandbox that does not count
    ],
)
def test_what_others_do_not_use_is_ours(of: int, busy: float, own: float, expected: int) -> None:
    before = Reading((1,), 100.0, 1000.0, 50.0)
    after = Reading((1,), 100.0 + 0.25, 1000.0 + 0.25 * busy, 50.0 + 0.25 * own)
    assert cores.left(before, after, of) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_reading_counts_what_our_workers_used() -> None:
    before = cores.read([os.getpid()])
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = cores.read([os.getpid()])
    assert before is not None and after is not None
    assert after.own - before.own >= 0.1
    assert after.at > before.at
    assert after.busy > before.busy
    gone = cores.read([2**22 + 1])  # no process has such a number
    assert gone is not None and gone.own == 0
