"""Which announced manifests count for a model that is here unsigned, and how often they are asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from daemon.errors import VerificationError
from daemon.transfer.resolve import Plan
from daemon.transfer.vouching import Vouching
from registry.records import GgufFacts, Identity, Model, Trust

IDENTITY = Identity(9, "aa" * 32, "bb" * 32, "a cid", "cc" * 20, "dd" * 32)
UNSIGNED = Model(IDENTITY, "Qwen", GgufFacts("llama"), "2026-11-21T12:00:00Z", "pulled")


class World:
    """The library and the resolver in one, with what they were asked."""

    def __init__(self, model: Model, name: str, standing: Trust = "unknown") -> None:
        self.model, self.standing, self.now = model, standing, 1000.0
        self.plan = Plan(ref="x", name=name, identity=IDENTITY, envelope="{}", manifest="m", signed_by="alice")
        self.announced = {"m"}
        self.asked = 0
        self.wrong = False

    def models(self) -> list[Model]:
        return [self.model]

    def manifests_of(self, model: Model) -> frozenset[str]:
        return frozenset(self.announced)

    async def vouched(self, model: Model) -> Plan:
        self.asked += 1
        if self.wrong:
            raise VerificationError("Qwen", "its signature could not be checked")
        return self.plan

    async def sign(self, model: Model, plan: Plan) -> None:
        self.model = replace(model, name=plan.name, signed_by=plan.signed_by)

    def vouching(self) -> Vouching:
        both: Any = self
        return Vouching(both, both, lambda key, name: self.standing, lambda: self.now)


@pytest.mark.parametrize(
    ("name", "standing", "counts"),
    [("Qwen", "unknown", True), ("Other", "unknown", False), ("Other", "pinned", False), ("Other", "trusted", True)],
)
async def test_a_strangers_manifest_renames_nothing(name: str, standing: Trust, counts: bool) -> None:
    world = World(UNSIGNED, name, standing)
    await world.vouching().look()
    assert world.asked == 1
    assert (world.model.signed_by, world.model.name) == (("alice", name) if counts else (None, "Qwen"))


@pytest.mark.parametrize("more", [{"signed_by": "bob"}, {"quarantined": "changed"}])
async def test_what_is_signed_or_quarantined_is_left_alone(more: dict[str, Any]) -> None:
    world = World(replace(UNSIGNED, **more), "Qwen")
    await world.vouching().look()
    assert world.asked == 0


async def test_what_did_not_help_is_asked_for_again_later_or_when_more_is_announced() -> None:
    world = World(UNSIGNED, "Qwen")
    world.wrong = True
    vouching = world.vouching()
    for _ in range(3):
        await vouching.look()
    assert world.asked == 1
    world.now += 601
    await vouching.look()
    assert world.asked == 2
    world.announced.add("another")
    world.wrong = False
    await vouching.look()
    assert world.asked == 3 and world.model.signed_by == "alice"


async def test_without_an_announced_manifest_nothing_is_asked() -> None:
    world = World(UNSIGNED, "Qwen")
    world.announced.clear()
    await world.vouching().look()
    assert world.asked == 0
