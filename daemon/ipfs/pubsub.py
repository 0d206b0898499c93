"""How pubsub topics and messages are written in Kubo's RPC: multibase base64url, whatever their bytes (core/commands/pubsub.go)."""

from __future__ import annotations

import base64
from typing import Any

from daemon.ipfs.interface import PubsubMessage


def topic_argument(topic: str) -> str:
    return "u" + base64.urlsafe_b64encode(topic.encode()).decode().rstrip("=")


def read_message(line: dict[str, Any]) -> PubsubMessage | None:
    """A line of `pubsub/sub`; None for what is no message."""
    sender, data = line.get("from"), line.get("data")
    if not isinstance(sender, str) or not isinstance(data, str) or not data.startswith("u"):
        return None
    try:
        return PubsubMessage(sender, base64.urlsafe_b64decode(data[1:] + "=" * (-(len(data) - 1) % 4)))
    except ValueError:
        return None
