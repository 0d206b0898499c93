"""A way by which pages travel. Each implementation is one file: pubsub.py, http.py, rendezvous.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Transport(Protocol):
    """Carries what this node says to others, and brings what they say to the `Ear`."""

    async def say(self, pages: Sequence[bytes]) -> None:
        """Give our pages to whoever this transport reaches. A transport that is away says nothing and raises nothing."""
        ...

    async def farewell(self, pages: Sequence[bytes]) -> None:
        """Give our last page to whoever should know; returns when it is on its way."""
        ...
