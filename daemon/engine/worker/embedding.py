"""Texts that become vectors, a bounded decode at a time, so that answers go on in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from daemon.engine.interface import Embeddings


class Encoder(Protocol):
    """What `daemon.engine.worker.llama.Llama` does for texts."""

    def embed(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]: ...


@dataclass(slots=True, eq=False)
class Texts:
    """One request: the tokens of its texts, none longer than a batch."""

    id: int
    texts: list[list[int]]
    on_end: Callable[[Embeddings], None]
    on_error: Callable[[str], None]
    vectors: list[bytes] = field(default_factory=list)


class EmbeddingQueue:
    """First come, first served."""

    def __init__(self, encoder: Encoder, together: int) -> None:
        """At most `together` texts in one decode."""
        self._encoder = encoder
        self._together = together
        self._waiting: deque[Texts] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def submit(self, texts: Texts) -> None:
        self._waiting.append(texts)

    def cancel(self, request_id: int) -> None:
        self._waiting = deque(texts for texts in self._waiting if texts.id != request_id)

    def fail(self, why: str) -> None:
        """The request that had its turn cannot be answered."""
        self._waiting.popleft().on_error(why)

    def step(self, most: int) -> None:
        """One decode of as many texts of the first request as have `most` tokens together, but of one at least."""
        first = self._waiting[0]
        rest = first.texts[len(first.vectors) :]
        count, tokens = 1, len(rest[0])
        while count < min(len(rest), self._together) and (tokens := tokens + len(rest[count])) <= most:
            count += 1
        first.vectors += [vector.astype("<f4").tobytes() for vector in self._encoder.embed(rest[:count])]
        if len(first.vectors) == len(first.texts):
            self._waiting.popleft()
            first.on_end(Embeddings(tuple(first.vectors), sum(map(len, first.texts))))
