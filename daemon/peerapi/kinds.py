"""What is asked of a relay: to carry messages, or the bytes of models, which few relays do."""

from __future__ import annotations

from typing import Literal

Kind = Literal["messages", "bytes"]
MESSAGES: Kind = "messages"
BYTES: Kind = "bytes"
