from __future__ import annotations

import pytest

from registry.records import Trust
from registry.trust import KeyState, decide

A, B = "ed25519:" + "aa" * 32, "ed25519:" + "bb" * 32


@pytest.mark.parametrize(
    ("key", "keys", "pins", "trust"),
    [
        (None, {}, {}, "unknown"),
        (None, {A: "trusted"}, {"m": A}, "unknown"),
        (A, {}, {}, "unknown"),
        (A, {}, {"other": A}, "unknown"),
        (A, {B: "trusted"}, {}, "unknown"),
        (A, {}, {"m": A}, "pinned"),
        (A, {}, {"m": B}, "MISMATCH"),
        (A, {B: "trusted"}, {"m": B}, "MISMATCH"),
        (A, {A: "trusted"}, {}, "trusted"),
        (A, {A: "trusted"}, {"m": A}, "trusted"),
        (A, {A: "trusted"}, {"m": B}, "trusted"),
        (A, {A: "blocked"}, {}, "blocked"),
        (A, {A: "blocked"}, {"m": A}, "blocked"),
        (A, {A: "blocked"}, {"m": B}, "blocked"),
    ],
)
def test_the_table_of_trust(key: str | None, keys: dict[str, KeyState], pins: dict[str, str], trust: Trust) -> None:
    assert decide(key, "m", keys, pins) == trust
