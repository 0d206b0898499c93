"""What relay, holder and asker say to each other: paths of the peer API, close codes, and the small
messages. Pure.

    holder                       relay                        asker
      | GET .../relay/hold         |                            |
      |--------------------------->|                            |
      |      {"challenge": SECRET} |                            |
      |<---------------------------|                            |
      | signed request (registry/relaying.py), again to renew   |
      |--------------------------->|                            |
      |             {"held": true} |                            |
      |<---------------------------|      GET .../relay/to/NODE |
      |           {"call": TICKET} |<---------------------------|
      |<---------------------------|                            |
      | GET .../relay/take/TICKET  |                            |
      |--------------------------->|                            |
      |<======= binary messages: the bytes of one connection ==>|

All are WebSockets (RFC 6455) without compression. On the first connection there are text messages
alone, on the others binary ones alone. Whoever withdraws closes the first connection, and what it
carried ends with it.
"""

from __future__ import annotations

from typing import Any

from registry import strictjson
from registry.errors import Malformed
from registry.relaying import SECRET

HOLD_PATH = "/swarm/1/relay/hold"
TO_PATH = "/swarm/1/relay/to/"
TAKE_PATH = "/swarm/1/relay/take/"

NOTE_LIMIT = 1 << 10  # bytes of a message of the relay to a holder
CHUNK = 32 << 10  # bytes that one message of a stream is made of
MESSAGE_LIMIT = 64 << 10  # bytes of one message of a stream

# Close codes (RFC 6455, section 7.4); from 4000 on they are ours.
DONE = 1000
GOING_AWAY = 1001
WRONG_KIND = 1003  # text on a stream
BROKEN = 1011  # the other end failed
NOT_ACCEPTED = 4001  # the request does not hold: not for this relay, replayed, wrongly signed
NO_RELAY = 4003  # this node relays no more
LATE = 4008  # no request in time
REPLACED = 4009  # the node came again over another connection
OVER_LIMIT = 4013  # the stream has had its bytes, or its time
TOO_MANY = 4029

_REASON_LIMIT = 123  # bytes of a close frame's reason


def challenge(secret: str) -> str:
    return _note({"challenge": secret})


def held(lifetime_s: int) -> str:
    return _note({"held": True, "lifetime": lifetime_s})


def call(ticket: str) -> str:
    return _note({"call": ticket})


def parse_challenge(text: str) -> str:
    """The secret to sign. Raises `Malformed`."""
    return _secret(_parsed(text), "challenge")


def parse_held(text: str) -> None:
    """Raises `Malformed` unless it says that the request was accepted."""
    if _parsed(text).get("held") is not True:
        raise Malformed("the relay did not say that it carries")


def parse_call(text: str) -> str | None:
    """The ticket of a call; None for a message that says something else. Raises `Malformed`."""
    fields = _parsed(text)
    return _secret(fields, "call") if "call" in fields else None


def reason(text: str) -> bytes:
    """`text` as the reason of a close frame."""
    return text.encode("ascii", "replace")[:_REASON_LIMIT]


def hex_of(node: str) -> str:
    """The 64 hex digits of a node key, as they stand in a path."""
    return node.removeprefix("ed25519:")


def _note(fields: dict[str, Any]) -> str:
    return strictjson.dumps(fields).decode()


def _parsed(text: str) -> dict[str, Any]:
    fields = strictjson.loads(text.encode(), limit=NOTE_LIMIT, what="the message")
    if not isinstance(fields, dict):
        raise Malformed("the message must be an object")
    return fields


def _secret(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not SECRET.fullmatch(value):
        raise Malformed(f"{name} must be 32 hex digits")
    return value
