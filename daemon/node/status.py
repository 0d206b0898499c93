"""`GET /api/status`: how the node and each of its parts are."""

from __future__ import annotations

import os
import time
from typing import Any

from daemon.answering.serving import Serving
from daemon.answering.upstreams import Upstreams
from daemon.api import views
from daemon.config import Config
from daemon.errors import SwarmError
from daemon.ipfs.keeper import IpfsKeeper
from daemon.node.connectivity import Connectivity
from daemon.supervise import Supervisor
from daemon.torrent.session import TorrentSession
from daemon.transfer.library import Library
from daemon.transfer.transfers import FINAL, Transfers
from registry import codes
from registry.address import format_address


class Status:
    def __init__(
        self,
        config: Config,
        version: str,
        started: str,
        keeper: IpfsKeeper,
        torrents: TorrentSession | None,
        library: Library,
        transfers: Transfers,
        serving: Serving,
        upstreams: Upstreams,
        connectivity: Connectivity,
        supervisor: Supervisor,
    ) -> None:
        self._config = config
        self._version = version
        self._started = started
        self._keeper = keeper
        self._torrents = torrents
        self._library = library
        self._transfers = transfers
        self._serving = serving
        self._upstreams = upstreams
        self._connectivity = connectivity
        self._supervisor = supervisor
        self.api = ""  # known once the API listens

    async def read(self) -> dict[str, Any]:
        address = self._connectivity.endpoints.for_people()
        ipfs = await self._ipfs()
        keys = self._serving.served().keys()
        served = [model.identity for model in self._library.models() if model.identity.blake3 in keys]
        serving = [codes.code_of_infohash_v2(identity.infohash_v2) for identity in served] + [one.code for one in self._upstreams.served()]
        engine = self._engine()
        restarting = any(model["state"] == "restarting" for model in engine)
        troubles = {name: loop.error for name, loop in self._supervisor.state().items() if loop.state != "running"}
        return {
            "state": "degraded" if ipfs["state"] == "down" or troubles or restarting else "ready",
            "node": address.node,
            "peer_id": ipfs.pop("peer_id"),
            "addresses": [format_address(address)],
            "api": self.api,
            **self._connectivity.standing(),
            "network": self._config.network,
            "version": self._version,
            "pid": os.getpid(),
            "started": self._started,
            "home": str(self._config.home),
            "ipfs": ipfs,
            "bittorrent": self._bittorrent(),
            "models": len(self._library.models()),
            "engine": engine,
            "serving": [codes.short(code) for code in serving],
            "transfers": sum(transfer.state not in FINAL for transfer in self._transfers.all()),
            "troubles": troubles,
        }  # fmt: skip

    def _engine(self) -> list[dict[str, Any]]:
        now = time.time()
        return [
            {
                "code": codes.short(codes.code_of_infohash_v2(model.identity.infohash_v2)),
                "name": model.name,
                "state": state.state,
                "pid": state.pid,
                "context": state.context,
                "slots": state.slots,
                "free_slots": state.free_slots,
                "memory": state.memory,
                "tokens_per_second": state.tokens_per_second,
                "restarts": state.restarts,
                "reason": state.reason,
                "expires": None if state.expires is None else views.iso(int(now + state.expires)),
            }
            for model, state in self._serving.engine()
        ]

    async def _ipfs(self) -> dict[str, Any]:
        keeper = self._keeper
        found: dict[str, Any] = {
            "enabled": self._config.ipfs.enabled, "state": keeper.state, "version": keeper.version or None, "pid": keeper.pid,
            "peers": 0, "reason": keeper.reason or None, "peer_id": None,
        }  # fmt: skip
        node = keeper.node
        if node is not None:
            try:
                found["peer_id"] = (await node.identity()).peer_id
                found["peers"] = len(await node.peers())
            except SwarmError as error:  # it went away just now; the keeper will say so in a moment
                found["reason"] = error.why
        return found

    def _bittorrent(self) -> dict[str, Any]:
        if self._torrents is None:
            dht = {"enabled": False, "nodes": 0, "state": "off"}
            return {
                "enabled": False, "state": "off", "port": None, "torrents": 0, "peers": 0,
                "download_rate": 0, "upload_rate": 0, "dht": dht,
            }  # fmt: skip
        return {"enabled": True, "state": "ready", "port": self._torrents.port, **self._torrents.status()}
