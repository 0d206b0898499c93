"""Whether a signer is to be trusted for a name. The operator's word comes first, then what was seen before.

| the signer's key                           | trust    |
|---|---|
| none: the model is not signed              | unknown  |
| the operator blocked it                    | blocked  |
| the operator trusts it                     | trusted  |
| it signed this name before                 | pinned   |
| another key signed this name before        | MISMATCH |
| never seen                                 | unknown  |

No row trusts a key because it came with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from registry.records import Trust

KeyState = Literal["trusted", "blocked"]


def decide(key: str | None, name: str, keys: Mapping[str, KeyState], pins: Mapping[str, str]) -> Trust:
    """The trust in `key` (`ed25519:<hex>`) as signer of the model called `name`; `pins` maps names to the first key seen for them."""
    if key is None:
        return "unknown"
    state = keys.get(key)
    if state is not None:
        return state
    pinned = pins.get(name)
    if pinned is None:
        return "unknown"
    return "pinned" if pinned == key else "MISMATCH"
