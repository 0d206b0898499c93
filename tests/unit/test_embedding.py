"""Texts in batches: as many as fit, in their order, whatever comes beside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from daemon.engine.interface import Embeddings
from daemon.engine.worker.embedding import EmbeddingQueue, Texts

TOGETHER = 5


class Encoder:
    batch = 20

    def __init__(self) -> None:
        self.decodes = 0

    def embed(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        assert 0 < len(texts) <= TOGETHER and sum(map(len, texts)) <= self.batch
        self.decodes += 1
        return [np.array([sum(text), len(text)], np.float32) for text in texts]


TEXTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=20)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.sets(st.integers(0, 3)), st.integers(1, Encoder.batch))
def test_each_text_gets_its_own_vector(requests: list[list[list[int]]], failing: set[int], most: int) -> None:
    queue = EmbeddingQueue(Encoder(), TOGETHER)
    answers: dict[int, Embeddings] = {}
    failed: list[str] = []
    for number, texts in enumerate(requests):
        queue.submit(Texts(number, texts, lambda found, number=number: answers.__setitem__(number, found), failed.append))
    queue.cancel(1)
    order = [number for number in range(len(requests)) if number != 1]
    for number in order:
        if number in failing:
            queue.fail("no")
        while number not in answers and number not in failing:
            queue.step(most)
    assert not queue.busy and len(failed) == len(failing & set(order))
    for number, found in answers.items():
        assert found.prompt_tokens == sum(map(len, requests[number]))
        assert found.vectors == tuple(np.array([sum(text), len(text)], "<f4").tobytes() for text in requests[number])


def test_texts_share_a_decode() -> None:
    encoder = Encoder()
    queue = EmbeddingQueue(encoder, TOGETHER)
    queue.submit(Texts(1, [[1] * 4] * 12, lambda found: None, print))
    while queue.busy:
        queue.step(encoder.batch)
    assert encoder.decodes == 3


def test_a_decode_has_no_more_than_it_may_but_one_text() -> None:
    encoder = Encoder()
    queue = EmbeddingQueue(encoder, TOGETHER)
    queue.submit(Texts(1, [[1] * 4] * 4 + [[1] * 20], lambda found: None, print))
    for decodes in (1, 2, 3):
        assert queue.busy
        queue.step(8)
        assert encoder.decodes == decodes
    assert not queue.busy
