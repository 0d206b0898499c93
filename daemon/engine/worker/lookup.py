"""Prompt-lookup speculation: answers often repeat what stands in the conversation already - names, code, lists.

What followed the last occurrence of the newest few tokens is a guess at what comes next. Guesses are decoded together with the
newest token, and kept as far as they are what is drawn anyway; so they never change an answer, only its speed. A decode with
more rows takes longer, so guesses are only decoded where they were right often enough. To know how often costs nothing: each
guess is compared with what is drawn whether it was decoded or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from daemon.engine.protocol import GUESSES

_GRAM: Final = 3  # tokens that must have occurred before
_WEIGHT: Final = 0.15  # of the newest guess in the share of right ones
_MARGIN: Final = 1.1  # by how much a guess must pay


class Lookup:
    """Guesses from one list of tokens, which may only grow."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._seen: dict[tuple[int, ...], int] = {}  # the place behind the last occurrence of these tokens
        self._indexed = _GRAM
        self._judged = len(tokens)
        self._source: int | None = None  # where the guess for the token at `_judged` stands
        self.right = 0.0  # share of guesses that were right, recent ones counting most

    def guess(self, threshold: float) -> list[int]:
        """What may follow, as far as it is likely enough: 0 to `GUESSES` tokens. `threshold`: see `price`."""
        if threshold * _MARGIN >= 1:
            return []  # not even certain ones
        self._catch_up()
        if self._source is None:
            return []
        count, chance = 0, self.right
        while count < GUESSES and chance > threshold * _MARGIN:
            count, chance = count + 1, chance * self.right
        # A passage that reaches to the end repeats itself.
        period = len(self._tokens) - self._source
        return [self._tokens[self._source + i % period] for i in range(count)]

    def _catch_up(self) -> None:
        """Judge the guesses for tokens that are known by now, and learn from these tokens."""
        tokens = self._tokens
        while True:
            # What ends where the guess begins is not indexed yet: it would find itself.
            while self._indexed < self._judged:
                self._seen[tuple(tokens[self._indexed - _GRAM : self._indexed])] = self._indexed
                self._indexed += 1
            if self._source is None and self._judged >= _GRAM:
                self._source = self._seen.get(tuple(tokens[self._judged - _GRAM : self._judged]))
            if self._judged >= len(tokens):
                return
            if self._source is not None:
                hit = tokens[self._source] == tokens[self._judged]
                self.right += _WEIGHT * (hit - self.right)
                # As long as it is right the same passage goes on.
                self._source = self._source + 1 if hit else None
            self._judged += 1


def price(answers: int, cost: float) -> float:
    """How likely a guess must be to pay when `answers` rows are decoded anyway.

    `cost` is the time that one more row adds to a decode of one row, as a part of it: 0.02 where reading the weights takes
    all the time (large models), 0.5 where computing does.
    """
    return cost * answers / (1 + cost * (answers - 1))
