"""Drawing with NumPy against the plain definition of every filter, over all of a small vocabulary."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.interface import Candidate, Sampling
from daemon.engine.worker.sampling import Logits, NothingToDraw, Sampler, largest, logprob

SIZES = st.sampled_from((1, 3, 63, 64, 130, 3000))


def row(seed: int, size: int) -> Logits:
    """Logits with some equal ones and some forbidden ones."""
    random = np.random.default_rng(seed)
    found = (random.normal(size=size) * 4).round(1).astype(np.float32)
    found[random.integers(0, size, size // 10)] = -np.inf
    found[random.integers(0, size)] = 3.0
    return found


def allowed(logits: Logits, sampling: Sampling) -> dict[int, float]:
    """The tokens that the filters leave, one after the other as llama.cpp does it, and their chances."""
    order = sorted((token for token in range(len(logits)) if logits[token] > -np.inf), key=lambda token: (-logits[token], token))
    if sampling.top_k:
        order = order[: sampling.top_k]

    def chances(temperature: float = 1.0) -> list[float]:
        weights = [math.exp((float(logits[token]) - float(logits[order[0]])) / temperature) for token in order]
        whole = sum(weights)
        return [weight / whole for weight in weights]

    total = 0.0
    for count, chance in enumerate(chances(), 1):
        total += chance
        if total >= sampling.top_p:
            order = order[:count]
            break
    left = chances()
    order = [token for token, chance in zip(order, left, strict=True) if chance >= sampling.min_p * left[0]]
    return dict(zip(order, chances(sampling.temperature), strict=True))


@given(
    seed=st.integers(0, 2**32),
    size=SIZES,
    top_k=st.sampled_from((0, 1, 5, 40, 3000)),
    top_p=st.sampled_from((0.0, 0.31, 0.95, 1.0)),
    min_p=st.sampled_from((0.0, 0.052, 0.7)),
    temperature=st.sampled_from((0.3, 1.0, 2.0)),
)
def test_what_is_drawn_passed_every_filter(seed: int, size: int, top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    logits = row(seed, size)
    before = logits.copy()
    sampler = Sampler(sampling, seed)
    drawn = [sampler.draw(logits) for _ in range(40)]
    assert (logits == before).all()
    chances = allowed(logits, sampling)
    # At the edge of top_p the last bit of a sum decides.
    edge = min((logits[token] for token in chances), default=0.0)
    assert all(token in chances or logits[token] == edge for token in drawn)
    again = Sampler(sampling, seed)
    assert drawn == [again.draw(logits) for _ in range(40)]


def test_tokens_are_drawn_as_often_as_they_should() -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=0, min_p=0.0)
    logits = row(5, 130)
    sampler = Sampler(sampling, 1)
    seen = Counter(sampler.draw(logits) for _ in range(20_000))
    chances = allowed(logits, sampling)
    assert seen.keys() <= chances.keys()
    assert all(abs(seen[token] / 20_000 - chance) < 0.02 for token, chance in chances.items())


@given(seed=st.integers(0, 2**32), size=SIZES, count=st.integers(1, 100))
def test_the_largest_are_the_largest(seed: int, size: int, count: int) -> None:
    logits = row(seed, size)
    expected = sorted(range(size), key=lambda token: (-logits[token], token))[:count]
    assert largest(logits, count).tolist() == expected


def test_no_temperature_is_the_likeliest() -> None:
    assert Sampler(Sampling(temperature=0), 1).draw(row(1, 1000)) == int(row(1, 1000).argmax())


def test_bias_and_penalties_change_what_is_likeliest() -> None:
    logits = np.array([5.0, 4.0, 3.0, -1.0], np.float32)

    def drawn(taken: tuple[int, ...] = (), **options: object) -> int:
        sampler = Sampler(Sampling(temperature=0, **options), 1)  # type: ignore[arg-type]
        for token in taken:
            sampler.accept(token)
        return sampler.draw(logits)

    assert drawn() == 0
    assert drawn(logit_bias={0: -100}) == 1
    assert drawn(logit_bias={3: 100}) == 3
    assert drawn((0,), repeat_penalty=1.5) == 1
    assert drawn((0,), presence_penalty=1.5) == 1
    assert drawn((0,), frequency_penalty=0.8) == 0
    assert drawn((0, 0), frequency_penalty=0.8) == 1
    assert drawn((0, 0, 1, 2), frequency_penalty=2.0) == 1
    assert drawn((0, 1, 2), repeat_penalty=0.1, logit_bias={0: -100, 1: -100, 2: -100}) == 3


@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
def test_without_numbers_nothing_is_drawn(value: float) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(NothingToDraw):
            Sampler(Sampling(temperature=temperature), 1).draw(np.full(100, value, np.float32))
    with pytest.raises(NothingToDraw):
        Sampler(Sampling(logit_bias={0: -100, 1: -100}), 1).draw(np.zeros(2, np.float32))


@given(seed=st.integers(0, 2**32), size=SIZES, count=st.integers(0, 20))
def test_logprobs_are_of_all_tokens(seed: int, size: int, count: int) -> None:
    logits = row(seed, size)
    total = math.log(sum(math.exp(value) for value in logits.tolist()))
    said = logprob(logits, size - 1, count, lambda token: str(token).encode())
    assert said.drawn.bytes == str(size - 1).encode()
    assert said.drawn.logprob == pytest.approx(max(float(logits[-1]) - total, -1e9), abs=1e-3)
    likeliest = largest(logits, count) if count else ()
    assert [one.bytes for one in said.likeliest] == [str(token).encode() for token in likeliest]
    assert all(isinstance(one, Candidate) and -1e9 <= one.logprob <= 0 for one in said.likeliest)


def test_the_smallest_temperature_is_none() -> None:
    logits = np.array([1.0, 3.0, -np.inf, 2.0], np.float32)
    for temperature in (1e-320, 1e-50, 1e-30, 1e-7):
        assert Sampler(Sampling(temperature=temperature), 1).draw(logits) == 1
