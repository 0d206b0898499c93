"""Ceilings of a relay: of those that it carries for, of those that ask through it, and of each
stream.

A holder is one connection to the peer API, and a stream is two: the asker's and that by which the
holder takes it. All of them together leave the rest of the peer API two fifths of its connections
(daemon/peerapi/limits.py), and all holders of one source fit into what one source may have there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Sizes are bytes, times seconds, rates per second. A source is an IP address or a libp2p peer.
    """

    held: int = 64  # nodes that are carried for
    held_per_source: int = 4
    requests_rate: float = 0.5  # signed requests of one source: each costs a signature check
    requests_burst: float = 16.0
    request_s: float = 5.0  # to send the first request
    heartbeat_s: float = 2.5  # a holder that is silent for one and a half of them is gone

    streams: int = 120  # at the same time
    streams_per_asker: int = 8  # of one source
    streams_per_holder: int = 12
    take_s: float = 5.0  # for the holder to take a call
    rate: float = 1 << 20  # of all streams of one source, both directions
    burst: float = 4 << 20
    idle_s: float = 60.0  # without a byte in either direction
    stream_bytes: int = 16 << 20  # both directions
    stream_s: float = 3600.0
    bulk_bytes: int = 64 << 30  # the same for model bytes, where the owner allows them
    bulk_s: float = 24 * 3600.0
