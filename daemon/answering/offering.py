"""What this node offers: its models as it announces them."""

from __future__ import annotations

from collections.abc import Sequence

from daemon.answering.local import LocalModel
from daemon.answering.serving import Serving
from daemon.answering.upstreams import Upstreams
from daemon.engine.interface import Provider, Served
from daemon.torrent.session import TorrentSession
from daemon.transfer.library import Library
from registry.records import Model, Offer


class Offering:
    def __init__(self, node: str, library: Library, serving: Serving, upstreams: Upstreams, torrents: TorrentSession | None) -> None:
        self._node = node
        self._library = library
        self._serving = serving
        self._upstreams = upstreams
        self._torrents = torrents

    def offers(self) -> list[Offer]:
        """Every sound model, whether it is served or only held, and those of other servers."""
        return self._offers(self._sound()) + self._upstreams.offers()

    def served(self) -> list[LocalModel]:
        """The models that answer for everybody."""
        return [one for one in self.askable() if one.offer.serving]

    def provider(self, cid: str) -> Provider | None:
        """What answers for a model that is served here, by its CID."""
        return next((one.provider for one in self.served() if one.offer.cid == cid), None)

    def askable(self) -> list[LocalModel]:
        """The models that this node's own user may ask: those that are only held are loaded then."""
        models, serving = self._sound(), self._serving
        held = [
            LocalModel(offer, serving.provider(model), serving.usable(model))
            for model, offer in zip(models, self._offers(models), strict=True)
        ]
        return held + self._upstreams.local_models()

    def _sound(self) -> list[Model]:
        return [model for model in self._library.models() if model.quarantined is None]

    def _offers(self, models: Sequence[Model]) -> list[Offer]:
        served = self._serving.served()
        return [self._offer(model, served.get(model.identity.blake3)) for model in models]

    def _offer(self, model: Model, served: Served | None) -> Offer:
        identity = model.identity
        seeders, peers = self._torrents.seeds_and_peers(identity.infohash_v2) if self._torrents is not None else (0, 0)
        return Offer(
            node=self._node,
            cid=identity.cid,
            infohash=identity.infohash,
            infohash_v2=identity.infohash_v2,
            manifest=model.manifest,
            manifest_infohash=self._library.manifest_infohash(model.manifest),
            name=model.name,
            size=identity.size,
            serving=served is not None,
            free_slots=served.free_slots if served is not None else 0,
            context_length=served.context if served is not None else 0,
            seeders=max(seeders, 1),  # this node has it whole
            peers=peers,
            tokens_per_second=served.tokens_per_second if served is not None else 0.0,
        )
