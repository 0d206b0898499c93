"""The records that every room passes around. All are immutable and know nothing of files, clocks or sockets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Trust = Literal["trusted", "pinned", "unknown", "blocked", "MISMATCH"]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a file's bytes are called everywhere. A pure function of the bytes: no name, no date, no publisher."""

    size: int  # bytes
    blake3: str  # 64 hex digits
    sha256: str  # 64 hex digits
    cid: str  # CIDv1, base32, UnixFS profile unixfs-v1-2025
    infohash: str  # BitTorrent v1, 40 hex digits
    infohash_v2: str  # BitTorrent v2, 64 hex digits

    @property
    def filename(self) -> str:
        """The one name these bytes have in every store and in every torrent."""
        return f"{self.blake3}.gguf"


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What the header of a GGUF says about the model; everything but `architecture` may be missing."""

    architecture: str
    name: str | None = None
    quantization: str | None = None
    parameters: int | None = None
    context_length: int | None = None
    chat_template_hash: str | None = None  # sha256 hex of tokenizer.chat_template
    license: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """One model in the local store."""

    identity: Identity
    name: str  # what people call it; never used as a path
    facts: GgufFacts
    added: str  # ISO 8601, UTC
    origin: Literal["published", "pulled"]
    manifest: str | None = None  # CID of the signed manifest
    torrent: str | None = None  # CID of the .torrent on IPFS
    signed_by: str | None = None  # "ed25519:<hex>"
    source: str | None = None  # URL the publisher named
    file_stamp: tuple[int, int, int] = (0, 0, 0)  # inode, size, mtime in ns when it entered the store
    quarantined: str | None = None  # why it may not be used


@dataclass(frozen=True, slots=True)
class Offer:
    """What one node announces about one model."""

    node: str  # "ed25519:<hex>"
    cid: str
    infohash: str | None
    infohash_v2: str | None
    manifest: str | None
    name: str
    size: int
    serving: bool
    free_slots: int = 0
    context_length: int = 0
    seeders: int = 0
    peers: int = 0
    tokens_per_second: float = 0.0
    manifest_infohash: str | None = None  # v1, of the torrent by which the manifest travels over BitTorrent


@dataclass(frozen=True, slots=True)
class SealKey:
    """A node's hourly HPKE key: `key_id` 0..255, `public` 32 raw X25519 bytes as hex, `expires` unix seconds."""

    key_id: int
    public: str
    expires: int


@dataclass(frozen=True, slots=True)
class Address:
    """How to reach every part of a node that is on."""

    node: str  # "ed25519:<hex>"
    ipfs: tuple[str, ...] = ()  # multiaddrs with /p2p/ID
    bittorrent: tuple[str, ...] = ()  # host:port
    http: tuple[str, ...] = ()  # base URLs of the peer API
    relays: tuple[str, ...] = ()  # nodes that carry for this one: "<64 hex of the node key>@ENDPOINT"


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a node says about itself: a beat, or a page with offers (see registry/announcement.py).

    `revisions` names, for each page that the node has, the sequence number of the announcement that said it last.
    """

    node: str
    peer_id: str | None
    sequence: int  # strictly increasing per node, over all that it says
    expires: int  # unix seconds
    address: Address
    seal_keys: tuple[SealKey, ...]
    offers: tuple[Offer, ...] = ()
    page: int | None = None  # None: a beat, which has no offers
    revisions: tuple[int, ...] = ()
    hello: bool = False  # the sender is new and wants to be answered
    relay: bool = False  # the sender carries for nodes that ask it to


@dataclass(frozen=True, slots=True)
class Peer:
    """What the newest announcement of another node says about it."""

    node: str
    peer_id: str | None
    address: Address
    sequence: int
    expires: int
    seal_keys: tuple[SealKey, ...] = field(default=())
    relay: bool = False  # it carries for nodes that ask it to
    revisions: tuple[int, ...] = ()
