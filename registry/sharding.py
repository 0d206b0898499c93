"""Where a word is said in a swarm too large for everybody to hear everybody.

Up to `SHARD_AT` known nodes there is one topic. Beyond, a model's words go to the shard of its code, so that a node hears of
the codes that it cares for and of no others: it cannot list the swarm, only those shards. The number of shards is fixed, because
two nodes that estimate the swarm differently have to meet.

On a shard that is crowded not everybody speaks. Of those that serve, and of those that only hold, so many are drawn by lot that
a subscriber hears a bounded number of beats; the lot of a node holds for an hour and is a hash of its key, so that a draw costs
nobody a word. Who is drawn is drawn for everybody: `ROOM_SERVING` nodes, about, are enough to answer for a code, and to fetch it.

Nothing in the daemon uses this yet, see docs/architecture.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from registry.codes import normalise

SHARD_AT = 1000  # known nodes
SHARDS = 4096
ROOM_SERVING = 24  # nodes that serve and speak on one shard, about
ROOM_HOLDING = 8  # nodes that hold and do not serve
EPOCH_S = 3600  # a lot is drawn anew
BEAT_EVERY_S = 6.0  # on one shard, about: twenty codes of interest are three beats a second
LONGEST_S = 290.0  # three of them are less than an announcement may live

_DIGITS = "abcdefghijklmnopqrstuvwxyz234567"  # RFC 4648, five bits each
_LOTS = 1 << 32


def shard(code: str) -> int:
    """The shard of a model: the first 12 bits of its full code or of any prefix of it. Raises `Malformed` for no code."""
    bits = 0
    for digit in normalise(code)[:3]:
        bits = bits << 5 | _DIGITS.index(digit)
    return bits >> 3


def topics(main: str, codes: Iterable[str], known_nodes: int) -> frozenset[str]:
    """Where to listen for `codes`, or to speak of them. `main` is the topic of a small swarm."""
    if known_nodes <= SHARD_AT:
        return frozenset((main,))
    return frozenset(f"{main}/{shard(code):03x}" for code in codes)


def drawn(node: str, topic: str, now: float, share: float) -> bool:
    """Whether a node speaks on a topic, of whose nodes that `share` (0 to 1) does. `now` in unix seconds."""
    epoch = int(now // EPOCH_S)
    lot = hashlib.sha256(f"{epoch} {topic} {node}".encode()).digest()
    return int.from_bytes(lot[:4], "big") < share * _LOTS


def next_share(share: float, heard: int, room: int) -> float:
    """The share of those on a topic that speak from now on, when `heard` of them spoke at `share`; RFC 2762 samples like this."""
    estimate = max(heard, 1) / share
    return min(1.0, room / estimate)


def interval_s(heartbeat_s: float, speakers: int) -> float:
    """Seconds between two beats of a node on a shard on which that many speak."""
    return max(heartbeat_s, min(LONGEST_S, BEAT_EVERY_S * speakers))
