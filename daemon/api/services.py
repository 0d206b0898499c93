"""What the API is given: the daemon's services by what it asks of them, and nothing of how they work."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from daemon.config import Config
from daemon.engine.interface import Delta, EmbeddingRequest, Embeddings, Request, Served, ServeOptions
from daemon.errors import SwarmError
from registry.records import Address, Announcement, Model, Offer, Peer, Trust


class Transfer(Protocol):
    """A pull or a publish as of now; the states done, failed and cancelled are final. `sources` maps a source to bytes."""

    @property
    def id(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def ref(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int | None: ...
    @property
    def received(self) -> int: ...
    @property
    def sources(self) -> Mapping[str, int]: ...
    @property
    def rate(self) -> float: ...
    @property
    def peers(self) -> int: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def error(self) -> SwarmError | None: ...
    @property
    def model(self) -> Model | None: ...
    @property
    def started(self) -> str: ...
    @property
    def finished(self) -> str | None: ...


class Library(Protocol):
    def models(self) -> Sequence[Model]: ...
    def find(self, text: str, /) -> Model: ...
    def path(self, model: Model, /) -> Path: ...
    def trust(self, model: Model, /) -> Trust: ...
    def manifest_infohash(self, cid: str | None, /) -> str | None:
        """The v1 infohash of the torrent of a manifest that is here, by the manifest's CID."""
        ...

    async def remove(self, model: Model, /) -> None: ...
    async def check(self, model: Model, /) -> Model: ...


class Pull(Protocol):
    def __call__(self, ref: str, /) -> Transfer:
        """Begin a pull, or join the one of the same `ref` that is under way. Raises `UsageError` for what is no ref."""
        ...


class Publish(Protocol):
    def __call__(self, path: Path, /, *, name: str | None, license: str | None, source: str | None) -> Transfer:
        """Begin to publish the file at the absolute `path`."""
        ...


class Transfers(Protocol):
    def all(self) -> Sequence[Transfer]: ...
    def get(self, transfer_id: str, /) -> Transfer: ...
    async def cancel(self, transfer_id: str, /) -> Transfer: ...
    def watch(self, transfer_id: str, /) -> AsyncIterator[Transfer]:
        """The transfer as it is, then again and again as it changes, its final state last. Leaving the iterator changes nothing."""
        ...


class Serving(Protocol):
    async def serve(self, model: Model, options: ServeOptions, /) -> Served: ...
    async def stop(self, model: Model, /) -> bool: ...
    def served(self) -> Mapping[str, Served]: ...


class Upstream(Protocol):
    """A model of another server that this node answers for."""

    @property
    def offer(self) -> Offer: ...
    @property
    def slots(self) -> int: ...
    @property
    def free_slots(self) -> int: ...


class Upstreams(Protocol):
    async def serve(self, url: str, model: str, key: str | None, slots: int | None, /) -> Upstream: ...
    async def stop(self, served: Any, /) -> None: ...
    def find(self, text: str, /) -> Upstream | None: ...
    def served(self) -> Sequence[Upstream]: ...


class PeerTable(Protocol):
    def offers(self) -> Sequence[Offer]: ...
    def peers(self) -> Sequence[Peer]: ...
    def peer(self, node: str, /) -> Peer | None: ...
    def heard(self, node: str, /) -> float | None:
        """When a node was heard last (unix seconds); None when it was not since the start."""
        ...


class Gossip(Protocol):
    async def join(self, address: Address, /) -> Peer: ...
    async def receive(self, envelope: bytes, /) -> Announcement: ...


class Answered(Protocol):
    """Who answered, as which model, and through whom."""

    @property
    def answered_by(self) -> str: ...
    @property
    def code(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def via(self) -> str | None:
        """The node key of the relay that carries the answer; None without one."""
        ...


class Answer(Answered, Protocol):
    """An answer that has begun to come. Closing `deltas` cancels it where it is made."""

    @property
    def deltas(self) -> AsyncIterator[Delta]: ...


class Embedded(Answered, Protocol):
    @property
    def embeddings(self) -> Embeddings: ...


class Answers(Protocol):
    async def open(self, model: str | None, request: Request, /, *, via: str = ...) -> Answer:
        """Choose who answers and begin.

        `model` is a code, CID or name; None: the routing rule chooses. `via` is `auto`, `never`
        (no relay) or the node key of the relay through which the answer must come.
        """
        ...

    async def embed(self, model: str | None, request: EmbeddingRequest, /) -> Embedded: ...


class KeyEntry(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def name(self) -> str: ...


class TrustBook(Protocol):
    def entries(self) -> Sequence[KeyEntry]: ...
    async def set(self, key: str, state: str, name: str = "", /) -> KeyEntry: ...
    async def remove(self, key: str, /) -> KeyEntry: ...


@dataclass(frozen=True)
class Services:
    """Everything that a route may touch.

    `status` gives `GET /api/status` whole; `stop` asks the daemon to end and returns. `reached_via`
    is the relay through which a node was reached last, None when it was none.
    """

    config: Config
    library: Library
    pull: Pull
    publish: Publish
    transfers: Transfers
    serving: Serving
    upstreams: Upstreams
    peers: PeerTable
    reached_via: Callable[[str], str | None]
    own_offers: Callable[[], Sequence[Offer]]
    gossip: Gossip
    answers: Answers
    trust: TrustBook
    status: Callable[[], Awaitable[dict[str, Any]]]
    stop: Callable[[], None]


SERVICES = web.AppKey("services", Services)


def services(request: web.Request) -> Services:
    return request.app[SERVICES]
