"""The BitTorrent session: the only file that knows libtorrent.

libtorrent's type stubs disagree with its code, so what goes in and out is `Any`; every value that leaves this file is a plain one.
Three traps decide its shape. Alerts die at the next `pop_alerts`, so they are read at once, on the loop, when libtorrent
writes to a socket. Two nodes that both say "upload only" part at once (`close_redundant_connections`), so that setting is
off while metadata or a download is wanted. A seed without `upload_mode` would write into the user's file when it is damaged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import libtorrent as lt

from daemon.config import Network
from daemon.errors import Unavailable, VerificationError
from daemon.home import write_private
from daemon.torrent import metainfo, network
from daemon.torrent.announcing import Announcing
from daemon.torrent.dht import Dht
from daemon.torrent.download import Download, disk_error
from daemon.torrent.entry import CHECKING, Seed, Swarm, Torrent, resolve
from daemon.torrent.magnets import Magnets
from daemon.torrent.port_mapping import PortMapping
from daemon.torrent.small import SmallObjects

log = logging.getLogger(__name__)

_CLOSE_S = 0.7  # for libtorrent to let go of its torrents, before the session is dropped with what is left
_LISTEN_S = 5.0
_STATUS_S = 0.5
_LIMITS: Any = {"max_pieces": 1 << 20, "max_decode_depth": metainfo.MAX_DEPTH, "max_decode_tokens": metainfo.MAX_TOKENS}


class TorrentSession:
    """All torrents of this node. `port` is the TCP port that peers connect to. Rates are bytes per second, 0 is no limit.

    `dht_bootstrap` is (host, port) of DHT nodes to begin with, `dht_state` the file in which good ones are remembered.
    `nearby` are the private networks that this machine is in: a `public` session speaks to no other private address.
    `overrides` are libtorrent settings that win over those of `network`: several `public` nodes on one address, as tests
    have them, need other ones.
    """

    def __init__(
        self,
        network: Network,
        port: int,
        *,
        download_rate: int = 0,
        upload_rate: int = 0,
        dht_bootstrap: Sequence[tuple[str, int]] = (),
        dht_state: Path | None = None,
        nearby: Sequence[str] = (),
        overrides: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._network: Network = network
        self.dht = Dht(enabled=network == "public", bootstrap=dht_bootstrap, state=dht_state)
        self.ports = PortMapping(enabled=network == "public")
        self._announcing = Announcing()
        self._magnets = Magnets(self)
        self._small = SmallObjects(self)
        self._nearby = nearby
        self._overrides = overrides
        self._wanted_port = port
        self._rates = {"download_rate": download_rate, "upload_rate": upload_rate}
        self._session: Any = None
        self._port = 0
        self._torrents: dict[str, Torrent] = {}  # by v1 and by v2 infohash
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._listening: asyncio.Future[None] | None = None
        self._closing = False
        self._handlers = {getattr(lt, name): getattr(self, f"_on_{name}") for name in _ALERTS}

    @property
    def port(self) -> int:
        return self._port

    # -- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen. Raises `Unavailable` when that is not possible; a port in use is replaced by another one, see `port`."""
        loop = asyncio.get_running_loop()
        reader, writer = self._sockets = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._listening = loop.create_future()
        try:
            self._session = await asyncio.to_thread(self._make)
            loop.add_reader(reader.fileno(), self._on_alerts, reader)
            self._session.set_alert_fd(writer.fileno())
            async with asyncio.timeout(_LISTEN_S):
                await self._listening
        except TimeoutError as error:
            await self.close()
            raise Unavailable("BitTorrent", f"cannot listen on port {self._wanted_port}", "set torrent.port to another one") from error
        except BaseException:
            await self.close()
            raise
        self._port = int(self._session.listen_port())
        if self._wanted_port not in (0, self._port):
            log.warning("BitTorrent port %d is in use; listening on %d", self._wanted_port, self._port)
        self.dht.attach(self._session)
        self.ports.attach(self._session)
        self._poll()

    def _make(self) -> Any:
        category = lt.alert_category
        settings: Any = network.settings(self._network, self._wanted_port, **self._rates)
        mask = category.error | category.status | category.storage | category.piece_progress
        if self.dht.enabled:
            mask |= category.dht_operation | category.port_mapping
        settings["alert_mask"] = int(mask)
        params = self.dht.params()
        params.settings = settings | dict(self._overrides)
        session = lt.session(params)
        allowed = lt.ip_filter()
        for first, last, may in network.rules(self._network, self._nearby):
            allowed.add_rule(first, last, 0 if may else 1)
        session.set_ip_filter(allowed)
        # libtorrent exempts local peers from rate limits by leaving them out of the global class. Here they are in both:
        # in the global one for its limits, in the local one because it need not wait to be unchoked.
        classes = lt.ip_filter()
        everyone = 1 << int(session.global_peer_class_id)
        for first, last in network.everywhere():
            classes.add_rule(first, last, everyone)
        for first, last in network.local():
            classes.add_rule(first, last, everyone | 1 << int(session.local_peer_class_id))
        session.set_peer_class_filter(classes)
        return session

    async def close(self) -> None:
        """Leave all swarms and let go of all files, in about a second at most. Who still waits for a download gets
        `Unavailable`. Idempotent."""
        if self._closing:
            return
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        torrents = list(dict.fromkeys(self._torrents.values()))
        try:
            await self._close_dht()
            for torrent in torrents:
                torrent.fail(Unavailable("BitTorrent", "the session is closing"))
            if leaving := [self._start_removal(torrent) for torrent in torrents]:
                await asyncio.wait(leaving, timeout=_CLOSE_S)
        finally:
            dropped = asyncio.ensure_future(self._drop())
            try:
                await asyncio.shield(dropped)
            except asyncio.CancelledError:
                await dropped
                raise

    async def _close_dht(self) -> None:
        try:
            await self.dht.close()
        except Unavailable as error:  # the nodes cannot be remembered; the next start looks for new ones
            log.warning("%s", error)

    async def _drop(self) -> None:
        self.ports.close()
        last, self._session = [self._session], None
        for torrent in self._torrents.values():
            torrent.gone()
        self._torrents.clear()
        await asyncio.to_thread(last.clear)  # the destructor waits for the disk threads
        # Only now: libtorrent would write its wake-ups into whatever gets the number of a closed socket.
        if self._sockets is not None:
            asyncio.get_running_loop().remove_reader(self._sockets[0].fileno())
            for end in self._sockets:
                end.close()

    # -- torrents ---------------------------------------------------------------------------------------------------

    async def seed(self, torrent: bytes, path: Path, *, is_model: bool = True) -> Seed:
        """Give a complete file to whoever asks, from where it is. It is never written to, even when it is damaged.

        Seeding a file again changes nothing; from another path it moves there. Raises `VerificationError` when the torrent
        is malformed or the file has another size, `Unavailable` when it is not there or the session is not running.
        Only models count in `status`.
        """
        facts = await asyncio.to_thread(metainfo.parse, torrent)
        try:
            path, size = await asyncio.to_thread(_look_at, path)
        except OSError as error:
            raise disk_error(error.errno or 0, os.strerror(error.errno or 0)) from error
        if size != facts.size:
            raise VerificationError(path.name, f"has {size} bytes where its torrent says {facts.size}", "swarmctl fsck tells what changed")
        known = self._torrents.get(facts.infohash_v2)
        if known is not None and known.seed is not None and known.removed is None:
            if known.seed.path == path:
                return known.seed
            await self.remove(known)
        entry = Torrent(self, facts, torrent)
        entry.is_model = is_model
        entry.seed = Seed(facts.infohash, facts.infohash_v2, path)
        self.add(entry, self._params(torrent, path), lt.torrent_flags.seed_mode | lt.torrent_flags.upload_mode)
        return entry.seed

    async def seed_bytes(self, name: str, data: bytes, folder: Path) -> Seed:
        """Give a small object, such as a manifest, to whoever asks: `data` is kept as `folder/name`, and its torrent is
        `metainfo.small_torrent(name, data)`. Idempotent. Raises what that and `seed` raise, and `Unavailable` when
        the file cannot be written.
        """
        made = metainfo.small_torrent(name, data)
        path = folder / name
        await asyncio.to_thread(_keep, path, data)
        return await self.seed(made.torrent, path, is_model=False)

    async def fetch_small(
        self, infohash: str, peers: Sequence[tuple[str, int]] = (), *, limit: int, deadline_s: float
    ) -> bytes:
        """The bytes of the small object with this v1 infohash, from `peers` (IP, port) and whoever discovery finds.

        At most `limit` bytes in one file, or it is refused before any of it is asked for. The caller checks what it is.
        Calls for one infohash share one fetch, under the limit of the first. Raises `Unserved` at the deadline, and
        at once where there is no discovery and no peer; `VerificationError` when it is too large or no single file;
        `NoSpace` and `Unavailable`.
        """
        return await self._small.fetch(infohash, peers, limit=limit, deadline_s=deadline_s)

    async def forget(self, infohash_v2: str) -> None:
        """Stop seeding; the file stays. Returns when libtorrent has let go of it. An unknown torrent is no error."""
        known = self._torrents.get(infohash_v2)
        if known is not None and known.seed is not None:
            await self.remove(known)

    async def download(self, torrent: bytes, folder: Path, filename: str, *, on_progress: Callable[[int], None] | None = None) -> Download:
        """Begin to write `folder/filename`, with what lies there already after it has been hashed again.

        `on_progress` gets the bytes verified so far, on the loop. Raises `VerificationError` for a malformed torrent,
        `NoSpace` and `Unavailable`; also `Unavailable` while the same torrent is seeded or downloaded.
        """
        facts = await asyncio.to_thread(metainfo.parse, torrent)
        try:
            path = await asyncio.to_thread(_cut, folder / filename, facts.size)
        except OSError as error:
            raise disk_error(error.errno or 0, os.strerror(error.errno or 0)) from error
        entry = Torrent(self, facts, torrent)
        entry.listener = download = Download(facts, entry, on_progress)
        self.add(entry, self._params(torrent, path), CHECKING)
        return download

    async def metadata(
        self, infohash: str | None, infohash_v2: str | None, peers: Sequence[tuple[str, int]], deadline_s: float
    ) -> bytes:
        """The whole .torrent with its piece layers, from `peers` and whoever discovery finds. No payload is asked for.

        Raises `Unserved` at the deadline, and at once where there is no discovery and no peer; `VerificationError` when
        the torrent is not one that `metainfo.parse` accepts. libtorrent 2.1.1 cannot check the last piece hash of files
        with 512 n + 1 pieces (n > 0) and takes who sends it for a liar, so for those this ends in `Unserved` too.
        """
        return await self._magnets.metadata(infohash, infohash_v2, peers, deadline_s)

    def seeds_and_peers(self, infohash_v2: str) -> tuple[int, int]:
        """(seeders, peers) known of a torrent, peers with seeders, this node not counted; zeros for an unknown one."""
        known = self._torrents.get(infohash_v2)
        return (known.swarm.known_seeds, known.swarm.known_peers) if known is not None else (0, 0)

    def status(self) -> dict[str, Any]:
        """`torrents` of models, connected `peers`, `download_rate` and `upload_rate` (payload, bytes per second) of all
        torrents, `dht` (see `Dht.status`); up to half a second old."""
        torrents = list(dict.fromkeys(self._torrents.values()))
        swarms = [torrent.swarm for torrent in torrents]
        return {
            "torrents": sum(torrent.is_model for torrent in torrents),
            "dht": self.dht.status(),
            "peers": sum(swarm.peers for swarm in swarms),
            "download_rate": sum(swarm.download_rate for swarm in swarms),
            "upload_rate": sum(swarm.upload_rate for swarm in swarms),
        }

    def meet(self, infohash: str, peers: Sequence[tuple[str, int]]) -> None:
        """Connect to `peers` (IP, port) for the torrent with this infohash, v1 or v2; an unknown one is no error.

        For who wants a torrent from this node and cannot dial it: two homes that dial each other at the same time
        get through routers that keep the port. Enough for a download and for a small object; not for `metadata` of more
        than one piece, since libtorrent 2.1.1 asks no peer that dialled it for piece layers.
        """
        torrent = self._torrents.get(infohash)
        if torrent is not None and torrent.handle is not None and torrent.removed is None:
            torrent.connect(peers)

    @property
    def can_discover(self) -> bool:
        """Whether peers may be found that nobody named, by LSD or DHT."""
        return self._network != "loopback"

    def known(self, infohash: str) -> Torrent | None:
        """The torrent with this infohash, v1 or v2."""
        return self._torrents.get(infohash)

    # -- adding and removing ----------------------------------------------------------------------------------------

    def _params(self, torrent: bytes, path: Path) -> Any:
        try:
            params = lt.load_torrent_buffer(torrent, _LIMITS)
        except RuntimeError as error:
            raise VerificationError("torrent", str(error), "get it from another source") from error
        params.save_path = str(path.parent)
        params.renamed_files = {0: str(path)}
        return params

    def add(self, entry: Torrent, params: Any, flags: int, hashes: Iterable[str] = ()) -> None:
        if self._session is None or self._closing:
            raise Unavailable("BitTorrent", "it is not running", "swarmctl status tells why")
        names = (entry.facts.infohash, entry.facts.infohash_v2) if entry.facts else tuple(hashes)
        if any(name in self._torrents for name in names):
            raise Unavailable("torrent", "it is in use already", "wait until the other transfer of it is done")
        params.flags = lt.torrent_flags.update_subscribe | lt.torrent_flags.apply_ip_filter | flags
        self._torrents.update(dict.fromkeys(names, entry))
        # Before it is added: the first peer may shake hands at once, and parts if it is told "upload only".
        self._stay_connected()
        try:
            entry.handle = self._session.add_torrent(params)
            self.announce_soon(entry)
        except RuntimeError as error:
            self._forget(entry)
            raise VerificationError("torrent", str(error), "get it from another source") from error

    def _forget(self, entry: Torrent) -> None:
        for name in [name for name, other in self._torrents.items() if other is entry]:
            del self._torrents[name]
        self._announcing.forget(entry)
        self._stay_connected()

    async def remove(self, torrent: Torrent) -> None:
        if self._session is not None:
            await asyncio.wait([self._start_removal(torrent)])

    def _start_removal(self, entry: Torrent) -> asyncio.Future[None]:
        if entry.removed is None:
            entry.removed = asyncio.get_running_loop().create_future()
            if entry in self._torrents.values():
                self._session.remove_torrent(entry.handle, lt.session.delete_files if entry.delete_files else 0)
            else:
                entry.gone()
        return entry.removed

    def _stay_connected(self) -> None:
        """Seeds part from seeds to save connections; a node that wants metadata or a download stays with all of them."""
        wanting = any(entry.seed is None and entry.removed is None for entry in self._torrents.values())
        self._session.apply_settings({"close_redundant_connections": not wanting})

    # -- alerts -----------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        loop = asyncio.get_running_loop()
        if self._torrents:
            self._session.post_torrent_updates(0)
        self.dht.poll()
        for torrent in self._announcing.due(self._torrents.values(), self.dht.nodes > 0, loop.time()):
            torrent.handle.force_dht_announce()
        self._timer = loop.call_later(_STATUS_S, self._poll)

    def announce_soon(self, torrent: Torrent) -> None:
        """Tell the DHT of `torrent` with the next look at it, if there is a DHT."""
        if self.dht.enabled:
            self._announcing.soon(torrent)

    def _on_alerts(self, reader: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while reader.recv(4096):
                pass
        if self._session is None:
            return
        for alert in self._session.pop_alerts():
            if handler := self._handlers.get(type(alert)):
                handler(alert)

    def _entry(self, hashes: Any) -> Torrent | None:
        return self._torrents.get(str(hashes.v2)) or self._torrents.get(str(hashes.v1))

    def _on_listen_succeeded_alert(self, alert: Any) -> None:
        if alert.socket_type != lt.socket_type_t.tcp:
            return
        resolve(self._listening, None)
        self.ports.renew()  # there may be another router on this address

    def _on_torrent_checked_alert(self, alert: Any) -> None:
        entry = self._entry(alert.handle.info_hashes())
        if entry is not None and entry.listener is not None:
            entry.listener.on_checked(list(alert.handle.status(lt.torrent_handle.query_pieces).pieces))

    def _on_piece_finished_alert(self, alert: Any) -> None:
        entry = self._entry(alert.handle.info_hashes())
        if entry is not None and entry.listener is not None:
            entry.listener.on_piece(int(alert.piece_index))

    def _on_hash_failed_alert(self, alert: Any) -> None:
        entry = self._entry(alert.handle.info_hashes())
        if entry is not None and entry.listener is not None:
            entry.listener.on_bad_piece(int(alert.piece_index))
        elif entry is not None and entry.seed is not None:
            log.warning("%s is damaged: piece %d has another hash; swarmctl fsck tells more", entry.seed.path.name, int(alert.piece_index))

    def _on_torrent_finished_alert(self, alert: Any) -> None:
        entry = self._entry(alert.handle.info_hashes())
        if entry is not None and entry.listener is not None:
            entry.listener.on_finished()
        elif entry is not None:
            resolve(entry.finished, None)

    def _on_read_piece_alert(self, alert: Any) -> None:
        entry = self._entry(alert.handle.info_hashes())
        if entry is None:
            return
        index = int(alert.piece)
        waiting = entry.reads.get(index)
        if alert.error.value():
            entry.fail(Unavailable("torrent", f"what came cannot be read: {alert.error.message()}"))
        else:
            resolve(waiting, bytes(alert.buffer))

    def _on_cache_flushed_alert(self, alert: Any) -> None:
        entry = self._entry(alert.handle.info_hashes())
        if entry is not None and entry.listener is not None:
            entry.listener.on_flushed()

    def _on_file_error_alert(self, alert: Any) -> None:
        entry = self._entry(alert.handle.info_hashes())
        if entry is None:
            return
        system = alert.error.category().name() in ("system", "generic")
        error = disk_error(alert.error.value() if system else 0, alert.error.message())
        if entry.seed is not None:
            log.warning("%s cannot be seeded: %s", entry.seed.path.name, alert.error.message())
        entry.fail(error)

    _on_torrent_error_alert = _on_file_error_alert

    def _on_metadata_received_alert(self, alert: Any) -> None:
        entry = self._entry(alert.handle.info_hashes())
        if entry is not None:
            resolve(entry.with_metadata, None)

    def _on_save_resume_data_alert(self, alert: Any) -> None:
        entry = self._entry(alert.handle.info_hashes())
        if entry is not None:
            try:
                whole: Any = lt.write_torrent_file(alert.params)
                torrent = bytes(lt.bencode(whole))
            except RuntimeError:
                torrent = None  # that is how libtorrent says that piece layers are missing
            resolve(entry.resume_data, torrent)

    def _on_save_resume_data_failed_alert(self, alert: Any) -> None:
        entry = self._entry(alert.handle.info_hashes())
        if entry is not None:
            resolve(entry.resume_data, None)

    def _on_torrent_removed_alert(self, alert: Any) -> None:
        entry = self._entry(alert.info_hashes)
        if entry is not None and not entry.delete_files:
            self._forget(entry)
            entry.gone()

    def _on_torrent_deleted_alert(self, alert: Any) -> None:
        entry = self._entry(alert.info_hashes)
        if entry is not None and entry.removed is not None:
            self._forget(entry)
            entry.gone()

    _on_torrent_delete_failed_alert = _on_torrent_deleted_alert  # nothing had been written, or somebody was quicker

    def _on_dht_get_peers_reply_alert(self, alert: Any) -> None:
        peers = [(str(host), int(port)) for host, port in alert.peers()]
        self.dht.on_reply(bytes.fromhex(str(alert.info_hash)), peers)

    def _on_dht_stats_alert(self, alert: Any) -> None:
        self.dht.on_lookups([str(request["type"]) for request in alert.active_requests])

    def _on_session_stats_alert(self, alert: Any) -> None:
        self.dht.on_nodes(int(alert.values["dht.dht_nodes"]))

    def _on_external_ip_alert(self, alert: Any) -> None:
        self.dht.on_external_address(str(alert.external_address))

    def _on_portmap_alert(self, alert: Any) -> None:
        self.ports.on_mapped(int(alert.mapping), str(alert.map_transport), int(alert.external_port))

    def _on_portmap_error_alert(self, alert: Any) -> None:
        self.ports.on_failed(int(alert.mapping), str(alert.map_transport), str(alert.error.message()))

    def _on_state_update_alert(self, alert: Any) -> None:
        for status in alert.status:
            entry = self._entry(status.info_hashes)
            if entry is not None:
                entry.swarm = Swarm(
                    peers=int(status.num_peers), seeds=int(status.num_seeds), known_peers=int(status.list_peers),
                    known_seeds=int(status.list_seeds), download_rate=int(status.download_payload_rate),
                    upload_rate=int(status.upload_payload_rate),
                )  # fmt: skip

    def _on_alerts_dropped_alert(self, alert: Any) -> None:
        # Nobody can tell any more what happened to which piece; a check of the files can.
        for entry in dict.fromkeys(self._torrents.values()):
            entry.fail(
                Unavailable("BitTorrent", "this machine could not keep up with its events", "pull it again: it goes on where it was")
            )


_ALERTS = [name.removeprefix("_on_") for name in vars(TorrentSession) if name.startswith("_on_") and name.endswith("_alert")]


def _look_at(path: Path) -> tuple[Path, int]:
    """Absolute, because libtorrent takes a relative path as one below the folder it saves to; and the size in bytes."""
    path = path.absolute()
    return path, path.stat().st_size


def _cut(path: Path, size: int) -> Path:
    """What an earlier try wrote is at most `size` bytes long; libtorrent would leave more in place."""
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)
    return path.absolute()


def _keep(path: Path, data: bytes) -> None:
    """Have `data` in `path`, written whole or not at all. Raises `Unavailable`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.read_bytes() == data:
            return
    except OSError as error:
        raise disk_error(error.errno or 0, os.strerror(error.errno or 0)) from error
    write_private(path, data)
