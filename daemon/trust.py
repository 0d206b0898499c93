"""The operator's trust: keys marked trusted or blocked, and which key first signed each name.

The rule itself is pure and stands in registry/trust.py; this keeps its tables in memory and in the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from daemon.errors import NotFound, Refused, UsageError
from daemon.ledger import LedgerThread
from registry import trust as rules
from registry.records import Trust
from registry.store import Ledger

_KEY_PREFIX = "ed25519:"


@dataclass(frozen=True, slots=True)
class KeyEntry:
    key: str  # "ed25519:<hex>"
    state: Literal["trusted", "blocked"]
    name: str


class TrustBook:
    def __init__(self, ledger: LedgerThread, own_key: str) -> None:
        self._ledger = ledger
        self._own = own_key
        self._keys: dict[str, KeyEntry] = {}
        self._pins: dict[str, str] = {}

    async def open(self) -> None:
        self._keys = {row.key: KeyEntry(row.key, row.state, row.name) for row in await self._ledger.call(Ledger.keys)}
        self._pins = dict(await self._ledger.call(Ledger.pins))

    def decide(self, signed_by: str | None, name: str) -> Trust:
        states = {entry.key: entry.state for entry in self._keys.values()}
        return rules.decide(signed_by, name, {self._own: "trusted", **states}, self._pins)

    def require(self, signed_by: str | None, name: str) -> Trust:
        """The trust in a signer, or `Refused` where the operator blocked the key or another key is known for this name."""
        trust = self.decide(signed_by, name)
        if trust == "blocked":
            raise Refused(name, "its publisher's key is blocked here", f"swarmctl trust remove {signed_by} lifts the block")
        if trust == "MISMATCH":
            raise Refused(
                name,
                "another key signed this name before",
                f"check with the publisher; if the new key is right: swarmctl trust add {signed_by} --name '{name}'",
            )
        return trust

    def publisher(self, name: str) -> str | None:
        """The key that is known to sign this name."""
        return self._pins.get(name)

    async def remember(self, signed_by: str, name: str) -> None:
        """The first key seen for a name stays its key."""
        if name not in self._pins:
            await self._ledger.call(Ledger.pin, name, signed_by)
            self._pins[name] = signed_by

    def standing(self, key: str) -> Literal["trusted", "blocked"] | None:
        """What the operator has said of a key, if anything."""
        entry = self._keys.get(key)
        return entry.state if entry is not None else None

    def entries(self) -> list[KeyEntry]:
        return sorted(self._keys.values(), key=lambda entry: entry.key)

    async def set(self, key: str, state: str, name: str = "") -> KeyEntry:
        key = _checked(key)
        if state == "trusted":
            entry = KeyEntry(key, "trusted", name)
        elif state == "blocked":
            entry = KeyEntry(key, "blocked", name)
        else:
            raise UsageError("trust", f"{state!r} is not a state", "use trusted or blocked")
        await self._ledger.call(Ledger.set_key, key, entry.state, name)
        self._keys[key] = entry
        if name and state == "trusted":
            await self._ledger.call(Ledger.pin, name, key)
            self._pins[name] = key
        return entry

    async def remove(self, key: str) -> KeyEntry:
        entry = self._keys.pop(_checked(key), None)
        if entry is None:
            raise NotFound("key", "it is neither trusted nor blocked here", "swarmctl trust list shows the keys")
        await self._ledger.call(Ledger.remove_key, entry.key)
        return entry


def _checked(key: str) -> str:
    digits = key.lower().removeprefix(_KEY_PREFIX)
    if len(digits) != 64 or any(c not in "0123456789abcdef" for c in digits):
        raise UsageError("key", "a key is ed25519: and 64 hex digits", "copy it from signed_by in swarmctl ls --json")
    return _KEY_PREFIX + digits
