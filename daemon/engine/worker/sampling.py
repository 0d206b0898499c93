"""How one answer draws its tokens from a row of logits: NumPy alone, so that nothing in it can end the process.

The order is that of llama.cpp's own server: bias, penalties, top_k, top_p, min_p, temperature, draw. Only the few candidates
that the filters can leave are ever sorted or turned into probabilities: a vocabulary has up to 262,144 entries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from daemon.engine.interface import Candidate, Sampling, TokenLogprob

Logits = NDArray[np.float32]  # one row: one number per token of the vocabulary
Tokens = NDArray[np.intp]

_FORBIDDEN: Final = -100.0  # a bias from here on leaves no chance at all
_COLUMN: Final = 64  # values of which one maximum is taken to find the largest values of all
_PART: Final = 512
_COLDEST: Final = 1e-6  # a temperature below this leaves nothing but the likeliest token, and would divide by zero in float32
_LEAST: Final = -1e9  # a logprob of minus infinity is no JSON


class NothingToDraw(Exception):
    """Every token is forbidden, or the model computed no numbers."""


class Sampler:
    """Draws with its own random numbers: one per token, whatever else is decoded meanwhile."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(seed)
        self._biased = np.fromiter(sampling.logit_bias.keys(), np.intp)
        biases = np.fromiter(sampling.logit_bias.values(), np.float32)
        self._biases = np.where(biases <= _FORBIDDEN, np.float32(-np.inf), biases)
        self._penalised = sampling.repeat_penalty != 1 or bool(sampling.frequency_penalty or sampling.presence_penalty)
        self._taken: Counter[int] = Counter()

    def accept(self, token: int) -> None:
        """`token` is part of the answer now. Penalties are for what stands in the answer, not in the prompt."""
        if self._penalised:
            self._taken[token] += 1

    def draw(self, logits: Logits) -> int:
        """The next token. `logits` stay as they are. Raises `NothingToDraw`."""
        if self._biased.size or self._taken:
            logits = self._adjusted(logits)
        likeliest = int(logits.argmax())
        if not math.isfinite(logits[likeliest]):
            raise NothingToDraw
        if self._sampling.temperature < _COLDEST:
            return likeliest
        candidates = self._candidates(logits)
        values = logits if candidates is None else logits[candidates]
        weights = values - logits[likeliest]
        weights /= np.float32(self._sampling.temperature)
        drawn = _choose(np.exp(weights, out=weights), self._random.random())
        return drawn if candidates is None else int(candidates[drawn])

    def _adjusted(self, logits: Logits) -> Logits:
        logits = logits.copy()
        logits[self._biased] += self._biases
        if self._taken:
            sampling = self._sampling
            tokens = np.fromiter(self._taken.keys(), np.intp, len(self._taken))
            counts = np.fromiter(self._taken.values(), np.float32, len(self._taken))
            values = logits[tokens]
            values = np.where(values > 0, values / sampling.repeat_penalty, values * sampling.repeat_penalty)
            logits[tokens] = values - counts * sampling.frequency_penalty - sampling.presence_penalty
        return logits

    def _candidates(self, logits: Logits) -> Tokens | None:
        """The tokens that top_k, top_p and min_p leave, which is at least one; None: all."""
        sampling = self._sampling
        found = largest(logits, sampling.top_k) if 0 < sampling.top_k < len(logits) else None
        if sampling.top_p < 1:
            found = _nucleus(logits, found, sampling.top_p)
        if sampling.min_p > 0:
            values = logits if found is None else logits[found]
            likely = values >= values.max() + math.log(sampling.min_p)
            found = np.flatnonzero(likely) if found is None else found[likely]
        return found


def _choose(weights: Logits, chance: float) -> int:
    """The place at which the running sum of `weights` passes `chance` of the whole. Sums of parts come first: one over all is slow."""
    parts = len(weights) // _PART
    sums = weights[: parts * _PART].reshape(parts, _PART).sum(axis=1)
    ends = np.append(sums, weights[parts * _PART :].sum()).cumsum(dtype=np.float64)
    wanted = chance * ends[-1]
    part = min(int(ends.searchsorted(wanted, side="right")), parts)
    inside = weights[part * _PART : (part + 1) * _PART].cumsum(dtype=np.float64)
    place = int(inside.searchsorted(wanted - (ends[part - 1] if part else 0.0), side="right"))
    if place < len(inside) and weights[part * _PART + place] > 0:
        return part * _PART + place
    # Two sums of the same numbers may differ in their last bit.
    return int(np.flatnonzero(weights[: (part + 1) * _PART])[-1])


def _nucleus(logits: Logits, among: Tokens | None, top_p: float) -> Tokens:
    """The fewest likeliest tokens that have `top_p` of the probability together. `among` is sorted, likeliest first."""
    values = logits if among is None else logits[among]
    chances = np.exp(values - values.max())
    total = chances.sum(dtype=np.float64)
    if among is None:
        # All tokens below this have less than 1 - top_p together, so none of them is needed.
        among = np.flatnonzero(chances >= (1 - top_p) / len(chances) * total)
        order = np.argsort(-chances[among], kind="stable")
        among, chances = among[order], chances[among][order]
    return among[: int(chances.cumsum(dtype=np.float64).searchsorted(top_p * total)) + 1]


def largest(logits: Logits, count: int) -> Tokens:
    """The `count` tokens with the largest logits, largest first, the lower token first where they are equal."""
    columns = len(logits) // _COLUMN
    if count > columns // 2:
        found = np.arange(len(logits))
    else:
        # At least `count` values reach the `count`-th largest of the maxima of disjoint parts: an exact bound, and cheap.
        grid = logits[: columns * _COLUMN].reshape(_COLUMN, columns)
        maxima = grid.max(axis=0)
        bound = np.partition(maxima, columns - count)[columns - count]
        promising = np.flatnonzero(maxima >= bound)
        lines, places = np.nonzero(grid[:, promising] >= bound)
        found = np.concatenate((lines * columns + promising[places], np.arange(columns * _COLUMN, len(logits))))
        found.sort()
    return found[np.argsort(-logits[found], kind="stable")[:count]]


def logprob(logits: Logits, token: int, likeliest: int, piece: Callable[[int], bytes]) -> TokenLogprob:
    """What the model itself thought of `token`, and of the `likeliest` likeliest, before anything was filtered."""
    top = logits.max()
    total = float(top) + math.log(float(np.exp(logits - top).sum(dtype=np.float64)))

    def candidate(one: int) -> Candidate:
        return Candidate(piece(one), max(min(float(logits[one]) - total, 0.0), _LEAST))

    return TokenLogprob(candidate(token), tuple(candidate(int(one)) for one in largest(logits, likeliest)) if likeliest else ())
