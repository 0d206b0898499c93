"""Models that came unsigned are verified when a manifest of them is heard of.

A manifest is taken as in a pull: its signature verifies, it speaks of exactly these bytes, and its signer is not refused. Because nobody
asked for it now, it renames nothing either: it counts under the name that the model has here, or from a signer whom the owner trusts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from daemon.errors import SwarmError
from daemon.transfer.library import Library
from daemon.transfer.resolve import Plan, Resolver
from registry.records import Model, Trust

log = logging.getLogger(__name__)

_LOOK_S = 5.0  # between two looks at what is announced
_AGAIN_S = 600.0  # until manifests that did not help are asked for again


class Vouching:
    """`standing` is the operator's trust in a key for a name, `clock` monotonic seconds."""

    def __init__(
        self,
        library: Library,
        resolver: Resolver,
        standing: Callable[[str | None, str], Trust],
        clock: Callable[[], float],
    ) -> None:
        self._library = library
        self._resolver = resolver
        self._standing = standing
        self._clock = clock
        self._tried: dict[str, tuple[frozenset[str], float]] = {}  # manifests and when, by blake3

    async def run(self) -> None:
        """Supervised."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> None:
        for model in self._library.models():
            if model.signed_by is None and model.quarantined is None and self._due(model):
                await self._try(model)

    def _due(self, model: Model) -> bool:
        """Whether manifests are announced that were not looked at in a while."""
        announced = self._resolver.manifests_of(model)
        tried, when = self._tried.get(model.identity.blake3, (frozenset(), 0.0))
        if announced <= tried and self._clock() < when + _AGAIN_S:
            return False
        self._tried[model.identity.blake3] = (announced, self._clock())
        return bool(announced)

    async def _try(self, model: Model) -> None:
        try:
            plan = await self._resolver.vouched(model)
            if self._counts(plan, model):
                await self._library.sign(model, plan)
                log.info("%s is verified now: %s signed it", plan.name, plan.signed_by)
        except SwarmError as error:
            log.info("what is announced as the manifest of %s does not help: %s", model.name, error)

    def _counts(self, plan: Plan, model: Model) -> bool:
        return plan.name == model.name or self._standing(plan.signed_by, plan.name) == "trusted"
