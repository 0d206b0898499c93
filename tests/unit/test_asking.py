"""Several answers to one caller: begun in turn where there is no room for all, and ended together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from daemon.api.asking import Part, asking
from daemon.api.tally import Tally
from daemon.engine.interface import ChatRequest, Delta, Usage
from daemon.errors import Busy, InferenceError

QUESTION = ChatRequest(({"role": "user", "content": "hi"},))


@dataclass
class Answer:
    deltas: AsyncIterator[Delta]
    answered_by: str = "ed25519:" + "ab" * 32
    code: str = "abc2def"
    name: str = "tiny"


class Answers:
    """Has room for `room` answers at once; the one with the number `fails` ends in an error."""

    def __init__(self, room: int, fails: int | None = None) -> None:
        self.room = room
        self.fails = fails
        self.begun = 0
        self.open_now = 0
        self.most = 0

    async def open(self, model: str | None, request: Any, *, via: str) -> Answer:
        assert via == "auto"
        await asyncio.sleep(0)
        if self.open_now >= self.room:
            raise Busy("tiny", "it has no room", "try again")
        self.open_now += 1
        self.most = max(self.most, self.open_now)
        self.begun += 1
        return Answer(self._deltas(self.begun - 1))

    async def _deltas(self, number: int) -> AsyncGenerator[Delta, None]:
        try:
            for _ in range(3):
                await asyncio.sleep(0)
                yield Delta("x")
            if number == self.fails:
                raise InferenceError("tiny", "it died")
            yield Delta(finish="stop", usage=Usage(7, 3, 2))
        finally:
            self.open_now -= 1

    async def embed(self, model: str | None, request: Any) -> Any:
        raise NotImplementedError


async def asked(answers: Answers, tally: Tally, count: int, each: int = 1) -> tuple[list[Part], Usage]:
    async with asyncio.timeout(10), asking(answers, tally, "tiny", [QUESTION] * count, each) as (all_of_them, parts):
        return [part async for part in parts], all_of_them.usage()


@pytest.mark.parametrize(("room", "each"), [(1, 8), (2, 8), (3, 1), (8, 4)])
async def test_those_for_which_there_is_no_room_take_turns(room: int, each: int) -> None:
    answers, tally = Answers(room), Tally()
    parts, usage = await asked(answers, tally, 8, each)
    assert sorted(index for index, delta in parts if delta.finish) == list(range(8))
    assert (answers.begun, answers.open_now) == (8, 0) and answers.most <= room
    assert usage == Usage(7 * (8 // each), 24, 2 * (8 // each))
    assert (tally.ended["done"], tally.ended["refused"], tally.waiting, tally.running) == (8, 0, 0, 0)


@pytest.mark.parametrize("count", [1, 4])
async def test_without_any_room_it_is_busy(count: int) -> None:
    answers, tally = Answers(0), Tally()
    with pytest.raises(Busy):
        await asked(answers, tally, count, count)
    assert (answers.open_now, tally.waiting, tally.running) == (0, 0, 0)


async def test_one_that_fails_ends_all() -> None:
    answers, tally = Answers(2, fails=1), Tally()
    with pytest.raises(InferenceError):
        await asked(answers, tally, 8, 8)
    assert (answers.open_now, tally.waiting, tally.running, tally.ended["failed"]) == (0, 0, 0, 1)
