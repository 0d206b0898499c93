"""A way by which our words travel. Each implementation is one file: pubsub.py, http.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Transport(Protocol):
    """Carries what this node says to others, and brings what they say to the `Ear`."""

    async def say(self, words: Sequence[bytes], *, news: bool) -> None:
        """Give our words to whoever this transport reaches. Without `news` they say only that we live.

        A transport that is away says nothing and raises nothing.
        """
        ...

    async def farewell(self, words: Sequence[bytes]) -> None:
        """Give our last word to whoever should know; returns when it is on its way."""
        ...
