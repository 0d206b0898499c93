"""How many cores the rest of the machine leaves."""

from __future__ import annotations

import os
import sys
import time

import pytest

from daemon.engine import cores
from daemon.engine.cores import Reading


@pytest.mark.parametrize(
    ("idle", "own", "expected"),
    [
        (2.0, 0.0, 2),  # nothing runs
        (0.0, 1.8, 2),  # we run, and somebody now and then
        (0.0, 1.33, 1),  # our two threads and a busy process on two cores
        (0.0, 1.0, 1),  # our one thread and that process
        (0.0, 0.5, 1),  # never none
        (3.0, 4.6, 7),  # of eight, less than half of one is wanted
    ],
)
def test_what_is_idle_and_what_our_workers_use_is_ours(idle: float, own: float, expected: int) -> None:
    before = Reading((1,), 100.0, 1000.0, 50.0)
    after = Reading((1,), 100.0 + 0.25, 1000.0 + 0.25 * idle, 50.0 + 0.25 * own)
    assert cores.left(before, after) == expected


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
    assert after.idle >= before.idle > 0
    gone = cores.read([2**22 + 1])  # no process has such a number
    assert gone is not None and gone.own == 0
