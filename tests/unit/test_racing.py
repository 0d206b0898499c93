"""A race: the winner's prize comes at once, and nothing of anybody else stays open, whenever somebody gives up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from daemon.errors import Declined, Unserved, VerificationError
from daemon.peerapi import racing
from daemon.peerapi.racing import Losers, Race, first

Runner = Coroutine[Any, Any, tuple[AsyncExitStack, str]]


class Track:
    """Counts what is open. A runner takes turns of the loop to open, and its context takes some to close."""

    def __init__(self, closing: int = 3) -> None:
        self.open = 0
        self._closing = closing

    async def runs(self, name: str, turns: int) -> tuple[AsyncExitStack, str]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._held())
            for _ in range(turns):
                await asyncio.sleep(0)
            return stack.pop_all(), name

    async def fails(self, error: Exception) -> tuple[AsyncExitStack, str]:
        await asyncio.sleep(0)
        raise error

    @asynccontextmanager
    async def _held(self) -> AsyncIterator[None]:
        self.open += 1
        try:
            yield
        finally:
            for _ in range(self._closing):
                await asyncio.sleep(0)
            self.open -= 1


class Slow:
    """What a loser holds: it closes when it may."""

    def __init__(self) -> None:
        self.may_close = asyncio.Event()
        self.closed = asyncio.Event()

    async def runs(self) -> tuple[AsyncExitStack, str]:
        stack = AsyncExitStack()
        stack.push_async_callback(self._close)
        return stack, "slow"

    async def holds_on(self) -> tuple[AsyncExitStack, str]:
        try:
            await asyncio.Event().wait()
        finally:
            await self._close()
        raise AssertionError

    async def _close(self) -> None:
        await self.may_close.wait()
        self.closed.set()


async def test_the_winner_does_not_wait_for_the_losers() -> None:
    losers, track, slow = Losers(), Track(), Slow()
    stack, name = await first([track.runs("quick", 1), slow.holds_on()], losers)
    assert (name, slow.closed.is_set(), track.open) == ("quick", False, 1)
    slow.may_close.set()
    await losers.close()
    assert slow.closed.is_set()
    await stack.aclose()
    assert track.open == 0


async def test_what_came_second_is_closed() -> None:
    losers, track = Losers(), Track()
    stack, name = await first([track.runs(name, 2) for name in "abc"], losers)
    await losers.close()
    await losers.close()
    assert (name, track.open) == ("a", 1)
    await stack.aclose()


@pytest.mark.parametrize("full", [False, True])
async def test_whoever_is_cancelled_at_any_moment_holds_nothing_open(
    monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """After so many turns of the loop, until the race is over before it can be cancelled. `full`: the losers of another race
    are on their way out for as long as this one runs, and the winner must wait for room.
    """
    monkeypatch.setattr(racing, "RACES_ENDING", 1 if full else 64)
    cancelled = 0
    for turns in range(40):
        losers, track, slow = Losers(), Track(), Slow()
        if full:
            lost = asyncio.create_task(slow.holds_on())
            await asyncio.sleep(0)
            losers.take([lost])
        race = asyncio.create_task(first((track.runs(name, 5) for name in "ab"), losers))
        for _ in range(turns):
            await asyncio.sleep(0)
        race.cancel()
        slow.may_close.set()
        try:
            stack, _ = await race
            await stack.aclose()
        except asyncio.CancelledError:
            cancelled += 1
        await losers.close()
        assert track.open == 0, f"after {turns} turns"
    assert cancelled > 5 and (cancelled == 40) == full


async def test_cancelled_in_a_race_within_a_race_nothing_stays_open() -> None:
    cancelled = 0
    for turns in range(40):
        losers, track = Losers(), Track()
        races = (first((track.runs(name, 5) for name in pair), losers) for pair in ("ab", "cd"))
        race = asyncio.create_task(first(races, losers))
        for _ in range(turns):
            await asyncio.sleep(0)
        race.cancel()
        try:
            stack, _ = await race
            await stack.aclose()
        except asyncio.CancelledError:
            cancelled += 1
        await losers.close()
        assert track.open == 0, f"after {turns} turns"
    assert 5 < cancelled < 40


async def test_races_wait_while_too_many_are_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "RACES_ENDING", 2)
    losers, track, slow = Losers(), Track(), Slow()
    for _ in range(2):
        stack, _ = await first([track.runs("quick", 1), slow.holds_on()], losers)
        await stack.aclose()
    third = asyncio.create_task(first([track.runs("quick", 1), slow.holds_on()], losers))
    await asyncio.wait({third}, timeout=0.05)
    assert not third.done()
    slow.may_close.set()
    stack, _ = await third
    await stack.aclose()
    await losers.close()


@pytest.mark.parametrize("ran", ["runs", "holds_on"])
async def test_a_loser_that_does_not_end_is_broken_off(
    monkeypatch: pytest.MonkeyPatch, ran: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(racing, "_END_S", 0.05)
    losers, slow = Losers(), Slow()
    task: asyncio.Task[Any] = asyncio.create_task(getattr(slow, ran)())
    await asyncio.sleep(0)
    losers.take([task])
    await losers.close()
    assert task.done() and not slow.closed.is_set()
    assert ("failed" in caplog.text) == (ran == "runs")


async def test_when_all_fail_every_reason_is_told() -> None:
    losers, track = Losers(), Track()
    one, two = Unserved("peer", "nothing answers there"), Unserved("peer", "no answer within 5 s")
    with pytest.raises(Unserved, match=r"nothing answers there; no answer within 5 s"):
        await first([track.fails(one), track.fails(two), track.fails(one)], losers)
    with pytest.raises(Unserved) as alone:
        await first([track.fails(one)], losers)
    assert alone.value is one
    with pytest.raises(Declined):
        await first([track.fails(one), track.fails(Declined("relay", "it does not want to"))], losers)
    with pytest.raises(VerificationError):
        liar = VerificationError("peer", "another node answers there")
        await first([track.fails(liar), track.fails(liar)], losers)
    await losers.close()


async def test_a_fault_of_ours_ends_the_race_and_closes_the_others() -> None:
    losers, track = Losers(), Track()
    with pytest.raises(ZeroDivisionError):
        await first([track.runs("a", 9), track.fails(ZeroDivisionError())], losers)
    await losers.close()
    assert track.open == 0


async def test_those_that_wait_start_when_nobody_else_is_left() -> None:
    race = Race(2)
    waits = asyncio.create_task(race.wait(1000.0))
    await asyncio.sleep(0)
    assert not waits.done()
    race.failed_or_won()
    await waits
