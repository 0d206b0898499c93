"""When the DHT is told of which torrent. Pure: no libtorrent, no clock.

libtorrent announces a torrent every 15 minutes, and a new one soon; but whatever it did while the
DHT had no nodes went nowhere, and a peer that announced itself a second after we asked is not found
for 15 minutes. So each torrent is announced once the DHT is ready, and those that want something
and have no peer ask again every `ASK_AGAIN_S`.
"""

from __future__ import annotations

from collections.abc import Iterable

from daemon.torrent.entry import Torrent

ASK_AGAIN_S = 5.0
AT_ONCE = 2  # lookups begun per call of `due`, so that a thousand seeds are no burst


class Announcing:
    def __init__(self) -> None:
        self._waiting: dict[Torrent, None] = {}
        self._was_ready = False

    def soon(self, torrent: Torrent) -> None:
        self._waiting[torrent] = None

    def forget(self, torrent: Torrent) -> None:
        self._waiting.pop(torrent, None)

    def due(self, torrents: Iterable[Torrent], ready: bool, now: float) -> list[Torrent]:
        """Whom to announce now, those that want something first. `now` is in seconds."""
        all_of_them = list(dict.fromkeys(torrents))
        if ready and not self._was_ready:
            self._waiting = dict.fromkeys(all_of_them)
        self._was_ready = ready
        if not ready:
            return []
        for torrent in all_of_them:
            if (
                torrent.seed is None
                and not torrent.peers
                and now - torrent.announced_at >= ASK_AGAIN_S
            ):
                self.soon(torrent)
        chosen = sorted(self._waiting, key=lambda torrent: torrent.seed is not None)[:AT_ONCE]
        for torrent in chosen:
            self.forget(torrent)
            torrent.announced_at = now
        return chosen
