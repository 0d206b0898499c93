"""A model that this node can answer with."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.engine.interface import Provider
from registry.records import Offer


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model of this node: how it is announced and what answers."""

    offer: Offer
    provider: Provider
    usable: bool = True  # if not, the provider says why; it is never chosen for somebody who did not name it
