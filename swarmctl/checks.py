"""What `doctor` finds: one line for each thing that it looks at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`ok`: it does not keep the node from working. `hint`: what to do, or what could be better."""

    name: str
    ok: bool
    detail: str
    hint: str = ""
