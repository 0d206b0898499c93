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
        """Connect to a peer and keep the connection. Raises `Unserved` with the reason when it cannot be reached."""
        ...

    async def peers(self) -> list[str]:
        """Peer ids of the connected peers."""
        ...

    async def listen(self, protocol: str, port: int) -> None:
        """Hand incoming libp2p streams of `protocol` to 127.0.0.1:`port`. Calling it again replaces the target.

        Each stream begins with a line that holds the peer id of whoever opened it.
        """
        ...

    def dial(self, protocol: str, peer_id: str) -> AbstractAsyncContextManager[tuple[str, int]]:
        """A loopback (host, port) whose connections are streams of `protocol` to `peer_id`; closed when the context ends.

        Raises `Unserved` when the peer cannot be reached.
        """
        ...
