"""What the rest of the daemon may ask of an IPFS node, whichever implementation it is.

Nothing outside this folder knows that the node is Kubo: the other rooms see `IpfsNode`, and a successor is one more file
behind it. Every read takes a deadline, because an IPFS node waits for ever for blocks that nobody has.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from daemon.ipfs.reach import Reachability


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """Who the node is on the libp2p network: its peer id and full multiaddrs (`/ip4/../tcp/../p2p/ID`)."""

    peer_id: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PubsubMessage:
    """One pubsub message; `sender` is the libp2p peer id that signed it."""

    sender: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Connection:
    """One libp2p connection. `address` is the far end without its peer id; `relayed`: it goes through a third node."""

    peer_id: str
    address: str
    inbound: bool
    relayed: bool  # carries neither blocks nor streams nor pubsub until a hole is punched


@dataclass(frozen=True, slots=True)
class Provider:
    """Somebody who says to have a block. `addresses` end in /p2p/ID, at most 16; without any it may be dialled by its id."""

    peer_id: str
    addresses: tuple[str, ...]


class IpfsNode(Protocol):
    """An IPFS node that answers. Every method raises `Unavailable` when the node is gone."""

    async def identity(self) -> PeerIdentity: ...

    async def version(self) -> str: ...

    async def add_in_place(self, path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
        """Pin `path` without copying it and return its CID (unixfs-v1-2025). `on_bytes` gets the running total of bytes read."""
        ...

    async def pins(self) -> set[str]:
        """CIDs of everything pinned recursively."""
        ...

    async def remove_in_place(self, cid: str) -> None:
        """Unpin a model and forget its references; the file itself is never touched. Unknown CIDs are no error."""
        ...

    async def broken_references(self, cid: str) -> list[str]:
        """CIDs of leaves under `cid` whose file bytes no longer match; empty when all is well."""
        ...

    async def add_bytes(self, data: bytes) -> str:
        """Add and pin a small object (<= 1 MiB, one raw leaf); return its CID."""
        ...

    async def read_bytes(self, cid: str, *, limit: int, deadline_s: float) -> bytes:
        """A small object whole. Raises `Unserved` at the deadline and `VerificationError` when it is larger than `limit`."""
        ...

    async def size(self, cid: str, *, deadline_s: float) -> int:
        """Size in bytes of the file that `cid` names. Raises `Unserved` when nobody has it, `UsageError` when it is no file."""
        ...

    async def leaves(self, cid: str, *, deadline_s: float) -> list[str]:
        """CIDs of a file's leaves in order (one per 1 MiB in our profile). Raises `Unserved` at the deadline."""
        ...

    def read_range(self, cid: str, offset: int, length: int, *, stall_s: float) -> AsyncIterator[bytes]:
        """Bytes `offset .. offset+length` of a file. Raises `Unserved` when nothing comes for `stall_s` seconds, or too little."""
        ...

    async def drop_blocks(self, cids: Sequence[str]) -> None:
        """Forget cached, unpinned blocks, so that the disk does not hold a download twice. Missing blocks are no error."""
        ...

    async def publish(self, topic: str, data: bytes) -> None:
        """Publish one message; calls are serialised, because concurrent publishes are refused by the node."""
        ...

    def subscribe(self, topic: str) -> AsyncIterator[PubsubMessage]:
        """Messages of a topic, our own included, until the iterator is closed. Raises `Unavailable` when the node goes."""
        ...

    async def topic_peers(self, topic: str) -> list[str]: ...

    async def connect(self, multiaddr: str, *, deadline_s: float) -> None:
        """Connect to a peer directly, by a punched hole where need be, and keep the connection.

        Raises `Unserved` with the reason when it cannot be reached, or only through a relay.
        """
        ...

    async def peers(self) -> list[str]:
        """Peer ids of the peers with a direct connection."""
        ...

    async def ping(self, peer_id: str, *, deadline_s: float) -> None:
        """Ask a connected peer whether it is there. Raises `Unserved` when it does not say so by the deadline."""
        ...

    async def connections(self) -> list[Connection]:
        """Every connection, also several with one peer; at most 4096."""
        ...

    async def reachability(self) -> Reachability:
        """What the node found out, or was told, about being dialled by strangers; `unknown` where it cannot say."""
        ...

    async def known_peers(self) -> tuple[str, ...]:
        """Peers to enter the public network by at the next start: multiaddrs, the oldest acquaintance first, at most 16.

        They were dialled directly, are public, and were connected at every call of the last minute and more: ask every minute.
        """
        ...

    async def provide(self, block: bytes, *, deadline_s: float) -> str:
        """Pin a small block (<= 1 MiB) and tell the DHT that it is here; return its CID.

        Raises `Unserved` when nobody could be told by the deadline; the block stays, and telling it again is allowed. The DHT
        remembers it for up to 48 hours, and the node tells it again every 22 hours until `unprovide`.
        """
        ...

    async def unprovide(self, cid: str) -> None:
        """Forget a block of `provide`. What the DHT was told runs out by itself. An unknown CID is no error."""
        ...

    def providers(self, cid: str, *, limit: int, deadline_s: float) -> AsyncIterator[Provider]:
        """Who says to have `cid`, as the DHT names them: each peer once, never ourselves, at most `limit` (and 256).

        Ends at the deadline without an error. It is a stranger's word.
        """
        ...

    async def listen(self, protocol: str, port: int, *, report_peer_id: bool) -> None:
        """Hand incoming libp2p streams of `protocol` to 127.0.0.1:`port`. Calling it again replaces the target.

        With `report_peer_id` each connection begins with a line of its own, the peer's id in base58. It is for ceilings: any
        process of this machine can connect to the port and write it.
        """
        ...

    def dial(self, protocol: str, peer_id: str) -> AbstractAsyncContextManager[tuple[str, int]]:
        """A loopback (host, port) whose connections are streams of `protocol` to `peer_id`; closed when the context ends.

        Raises `Unserved` when the peer cannot be reached.
        """
        ...
