"""The daemon: builds everything in order, runs until it is asked to stop, and takes everything down in reverse.

`python -m daemon.main --home DIR [--SECTION-KEY VALUE ...]`. It ends with an exit code of the error tree (daemon/errors.py);
the last line on stderr is then `error: WHAT: WHY; NEXT STEP`. Nobody imports this file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp

from daemon import config as settings
from daemon import network
from daemon.answering.answers import Answers
from daemon.answering.offering import Offering
from daemon.answering.serving import Serving
from daemon.answering.upstreams import Upstreams
from daemon.api.app import create_app
from daemon.api.server import open_api
from daemon.api.services import Services
from daemon.api.sessions import Sessions
from daemon.config import Config, host_port
from daemon.engine.host import EngineHost
from daemon.errors import SwarmError, UsageError
from daemon.gossip.moving import settle
from daemon.gossip.peers import PeerTable
from daemon.home import Home
from daemon.ipfs.interface import IpfsNode
from daemon.ipfs.keeper import IpfsKeeper
from daemon.ledger import LedgerThread
from daemon.membership import membership
from daemon.node.connectivity import Connectivity
from daemon.node.status import Status
from daemon.peerapi.server import PeerApi
from daemon.peerchat.seal import SealKeys
from daemon.peerchat.server import ChatServer
from daemon.relaying import pipes
from daemon.supervise import Supervisor
from daemon.torrent.session import TorrentSession
from daemon.transfer.fetch import Patience, Sources
from daemon.transfer.holders import Holders
from daemon.transfer.introductions import Introductions
from daemon.transfer.library import Library
from daemon.transfer.objects import Objects, ObjectServer
from daemon.transfer.publish import Publisher
from daemon.transfer.pull import Puller
from daemon.transfer.ranges import RangeServer
from daemon.transfer.resolve import Resolver
from daemon.transfer.resolve import parse as parse_ref
from daemon.transfer.seeding import Seeding
from daemon.transfer.sources import RateLimit
from daemon.transfer.store import Store
from daemon.transfer.transfers import Transfer, Transfers, utc_now
from daemon.transfer.vouching import Vouching
from daemon.trust import TrustBook
from registry import envelope
from registry.address import parse_address
from registry.errors import Malformed
from registry.records import Address

log = logging.getLogger("daemon")

_IPFS_WAIT_S = 2.0  # how long being ready may wait for IPFS, which may come later as well
_JOIN_WAIT_S = 20.0  # how long a join waits for IPFS to come up
_LAST_ANSWERS_S = 0.5  # how long a stop waits for answers under way
_PINS_S = 60.0  # between two looks at what IPFS has pinned
_LOOK_S = 5.0  # between two looks at the files of the models
_STOP_S = 4.5  # for the background loops, Kubo among them


def main() -> int:
    as_json = "--json" in sys.argv  # also when the line does not parse
    try:
        config = _arguments(sys.argv[1:])
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        with Home(config.home) as home:
            home.keep_network(config.network)
            asyncio.run(_Daemon(config, home, tell=_tell if as_json else None).run())
    except SwarmError as error:
        print(f"error: {error}", file=sys.stderr)
        if as_json:
            _tell(error.as_json())
        return error.exit_code
    except Exception:  # the only case with a traceback: it is ours
        traceback.print_exc()
        print("error: daemon: an unexpected error; report it with the traceback above", file=sys.stderr)
        return 1
    return 0


def _tell(document: Mapping[str, Any]) -> None:
    """The one JSON document of `swarmctl daemon --json`: the status when it is ready, or why it is not."""
    with suppress(OSError):  # that nobody reads it must not end a node
        print(json.dumps(document, indent=2), flush=True)


def _arguments(words: Sequence[str]) -> Config:
    parser = argparse.ArgumentParser("swarmctl daemon", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    for name in settings.settings():
        parser.add_argument("--" + name.replace(".", "-").replace("_", "-"), dest=name)
    try:
        known, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UsageError("daemon", str(error), "docs/settings.md lists the settings") from error
    if unknown:
        raise UsageError(unknown[0], "no such setting", "docs/settings.md lists them")
    values = {name: value for name, value in vars(known).items() if name not in ("home", "json") and value is not None}
    return settings.load(known.home.expanduser().absolute(), flags=values)


@dataclass(frozen=True, slots=True)
class _Holdings:
    """What this node has: its ledger, its trust, its models, and the networks that they are given to."""

    ledger: LedgerThread
    trust: TrustBook
    store: Store
    torrents: TorrentSession | None
    seeding: Seeding
    library: Library
    strays: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Voice:
    """How this node is with others: what it serves, whom it knows, and what it says."""

    http: aiohttp.ClientSession
    supervisor: Supervisor
    seal_keys: SealKeys
    serving: Serving
    upstreams: Upstreams
    offering: Offering
    peers: PeerTable
    answers: Answers
    connectivity: Connectivity


class _Daemon:
    """Each part goes on the stack where it is built, so that the end is the beginning reversed."""

    def __init__(self, config: Config, home: Home, tell: Callable[[Mapping[str, Any]], None] | None) -> None:
        self._config = config
        self._tell = tell
        self._home = home
        self._key = home.node_key()
        self._node = envelope.key_name(self._key)
        self._membership = membership(
            config.swarm.name, config.swarm.secret, node=self._node, clock=time.time
        )
        self._started = utc_now()
        self._join = [_address(text) for text in config.swarm.join]
        self._stop = asyncio.Event()
        self._connectivity: Connectivity | None = None
        self._chatting: Callable[[], bool] = lambda: False
        self._pulling: Callable[[], bool] = lambda: False
        self._keeper = IpfsKeeper(config, self._ipfs_ready, self._ipfs_gone, busy=self._busy)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        async with AsyncExitStack() as stack:
            has = await self._holdings(stack)
            voice = await self._voice(stack, has)
            introductions = await self._peer_api(stack, has, voice)
            transfers, puller, publisher = await self._transfers(stack, has, voice, introductions)
            await self._start(voice, has)
            status = await self._api(stack, has, voice, transfers, puller, publisher)
            log.info("ready")
            if self._tell is not None:
                self._tell(await status.read())
            await self._stop.wait()
            log.info("stopping")

    def _ipfs(self) -> IpfsNode | None:
        return self._keeper.node

    def _busy(self) -> bool:
        """Whether somebody waits for what a new start of IPFS would delay or cut."""
        return self._chatting() or self._pulling()

    async def _ipfs_ready(self, node: IpfsNode) -> None:
        if self._connectivity is not None:
            await self._connectivity.on_ipfs_ready(node)

    async def _ipfs_gone(self) -> None:
        if self._connectivity is not None:
            await self._connectivity.on_ipfs_gone()

    def _changed(self) -> None:
        if self._connectivity is not None:
            self._connectivity.changed()

    # -- the parts, in order ----------------------------------------------------------------------------------------

    async def _holdings(self, stack: AsyncExitStack) -> _Holdings:
        config = self._config
        ledger = await LedgerThread.open(config.home / "ledger.db")
        stack.push_async_callback(ledger.close)
        trust = TrustBook(ledger, self._node)
        await trust.open()
        store = Store(config.home)
        await asyncio.to_thread(store.open)
        torrents = None
        if config.torrent.enabled:
            torrents = TorrentSession(
                config.network,
                config.torrent.port,
                download_rate=config.transfer.download_rate,
                upload_rate=config.transfer.upload_rate,
                dht_bootstrap=[host_port(entry) for entry in config.torrent.dht_bootstrap],
                dht_state=config.home / "torrents" / "dht.state",
                nearby=network.own_networks(),
            )
            await torrents.start()
            stack.push_async_callback(torrents.close)
        seeding = Seeding(store, torrents, self._ipfs, config.ipfs.enabled)
        library = Library(store, ledger, trust, seeding, self._changed)
        strays = await library.open()
        await seeding.seed_all(library.records())
        return _Holdings(ledger, trust, store, torrents, seeding, library, strays)

    async def _voice(self, stack: AsyncExitStack, has: _Holdings) -> _Voice:
        config = self._config
        http = await stack.enter_async_context(
            aiohttp.ClientSession(
                auto_decompress=False, middlewares=(self._membership.middleware,)
            )
        )
        engine = EngineHost(config.engine, config.home / "logs", lambda key: serving.changed(key))
        stack.push_async_callback(engine.close)
        serving = Serving(engine, has.library, has.ledger, self._changed)
        upstreams = Upstreams(self._node, config.network, self._changed)
        stack.push_async_callback(upstreams.close)
        offering = Offering(self._node, has.library, serving, upstreams, has.torrents)
        peers = PeerTable(has.ledger, own=self._node, clock=time.time, standing=has.trust.standing)
        await settle(has.ledger, self._membership)
        await peers.open()
        stack.push_async_callback(peers.close)
        supervisor = Supervisor(close_s=_STOP_S)
        stack.push_async_callback(supervisor.close)
        seal_keys = SealKeys(self._node, time.time)
        connectivity = Connectivity(
            config,
            self._key,
            ledger=has.ledger,
            table=peers,
            keeper=self._keeper,
            torrents=has.torrents,
            supervisor=supervisor,
            http=http,
            pipes=await stack.enter_async_context(pipes.session(self._membership)),
            membership=self._membership,
            seal_keys=seal_keys,
            offers=offering.offers,
            join=self._join,
        )
        ways = connectivity.ways
        search = connectivity.rendezvous.search
        answers = Answers(
            peers, offering.askable, offering.offers, ways=ways, http=http, clock=time.time, search=search
        )
        return _Voice(http, supervisor, seal_keys, serving, upstreams, offering, peers, answers, connectivity)

    async def _peer_api(
        self, stack: AsyncExitStack, has: _Holdings, voice: _Voice
    ) -> Introductions | None:
        """Open the server for other nodes: every room that they may ask something of brings its routes."""
        config, membership, connectivity = self._config, self._membership, voice.connectivity
        ways = connectivity.ways
        chats = ChatServer(voice.seal_keys, voice.offering.provider)
        self._chatting = lambda: chats.answering > 0 or ways.answering
        objects = ObjectServer(has.library.small_object, membership)
        rate = RateLimit(config.transfer.upload_rate)
        ranges = RangeServer(has.library.shared_file, membership, rate)
        introductions: Introductions | None = None
        routes = [*connectivity.routes(), *chats.routes(), *objects.routes(), *ranges.routes()]
        if has.torrents is not None:
            introductions = Introductions(
                membership,
                ways,
                voice.http,
                has.torrents,
                network=config.network,
                outside=connectivity.endpoints.for_bittorrent,
            )
            routes += introductions.routes()
        api = PeerApi(
            routes,
            membership=membership,
            allowed=partial(network.may_come, config),
            on_direct=connectivity.came,
        )
        listening = api.listening(network.hosts(config), config.swarm.port)
        connectivity.ports = await stack.enter_async_context(listening)
        self._connectivity = connectivity
        stack.push_async_callback(connectivity.close)
        return introductions

    async def _transfers(
        self,
        stack: AsyncExitStack,
        has: _Holdings,
        voice: _Voice,
        introductions: Introductions | None,
    ) -> tuple[Transfers, Puller, Publisher]:
        config = self._config
        transfers = Transfers(has.ledger)
        self._pulling = lambda: transfers.beginning
        stack.push_async_callback(transfers.close)
        publisher = Publisher(has.store, has.library, self._key)
        objects = Objects(self._ipfs, voice.connectivity.ways, voice.http, self._membership)
        resolver = Resolver(
            objects,
            voice.peers,
            has.trust,
            self._ipfs,
            config.ipfs.enabled,
            voice.connectivity.rendezvous.search,
            has.torrents,
        )
        vouching = Vouching(has.library, resolver, has.trust.decide, time.monotonic)
        voice.supervisor.run("vouching", vouching.run, restart=True)
        patience = Patience(config.transfer.stall, config.transfer.give_up)
        sources = Sources(
            config.network,
            self._ipfs,
            config.ipfs.enabled,
            Holders(voice.connectivity.ways, voice.http, self._membership),
            RateLimit(config.transfer.download_rate),
            patience,
        )
        puller = Puller(has.store, has.library, resolver, publisher, has.torrents, sources, introductions)
        return transfers, puller, publisher

    async def _start(self, voice: _Voice, has: _Holdings) -> None:
        """Begin to speak. IPFS may be away, now or later: the node lives without it."""
        await voice.serving.open()
        await voice.connectivity.start()
        for blake3 in has.strays:
            voice.supervisor.run(f"identify {blake3[:12]}", partial(has.library.identify_again, blake3), restart=False)
        voice.supervisor.run("changes", lambda: self._keep_sound(voice, has.library), restart=True)
        if self._config.ipfs.enabled:
            voice.supervisor.run("ipfs", self._keeper.run, restart=True)
            voice.supervisor.run("pins", lambda: self._keep_pinned(has.library), restart=True)
            try:
                async with asyncio.timeout(_IPFS_WAIT_S):
                    await self._keeper.settled.wait()
            except TimeoutError:
                log.warning("IPFS is not ready yet; going on without it")

    async def _keep_pinned(self, library: Library) -> None:
        """When IPFS comes up: pin what came in while it was away. Then now and then, for what it was too busy for."""
        while True:
            try:
                async with asyncio.timeout(_PINS_S):
                    node: IpfsNode | None = await self._keeper.next_node()
            except TimeoutError:
                node = self._keeper.node
            if node is not None:
                others = self._connectivity.rendezvous.pinned if self._connectivity is not None else frozenset()
                await library.keep_pinned(node, own=not self._config.ipfs.rpc, others=others)

    async def _keep_sound(self, voice: _Voice, library: Library) -> None:
        """Whoever edits a model's file in place shall not have it served and seeded under its old name."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await library.notice_changes()
            await voice.serving.stop_unsound()

    async def _api(
        self, stack: AsyncExitStack, has: _Holdings, voice: _Voice, transfers: Transfers, puller: Puller, publisher: Publisher
    ) -> Status:
        config = self._config

        def pull(ref: str) -> Transfer:
            parse_ref(ref)
            return transfers.start("pull", ref, lambda transfer: puller.pull(transfer, ref))

        def publish(path: Path, *, name: str | None, license: str | None, source: str | None) -> Transfer:
            return transfers.start(
                "publish", str(path), lambda transfer: publisher.publish(transfer, path, name=name, license=license, source=source)
            )

        status = Status(
            config, version("swarmctl"), self._started, self._keeper, has.torrents, has.library, transfers, voice.serving,
            voice.upstreams, voice.connectivity, voice.supervisor,
        )  # fmt: skip
        services = Services(
            config=config, reached_via=voice.connectivity.ways.via,
            library=has.library, pull=pull, publish=publish, transfers=transfers, serving=voice.serving,
            upstreams=voice.upstreams, peers=voice.peers, own_offers=voice.offering.offers,
            gossip=voice.connectivity, answers=voice.answers, trust=has.trust, status=status.read, stop=self._stop.set,
        )  # fmt: skip
        app, host = create_app(services, self._home.token(), Sessions(config.api.session_timeout, time.time)), config.api.host
        port = await stack.enter_async_context(open_api(app, host, config.api.port, last_answers_s=_LAST_ANSWERS_S))
        status.api = f"http://{'[::1]' if host == '::1' else host}:{port}"
        await transfers.open(pull)
        self._home.write_daemon_json(status.api, version("swarmctl"))
        stack.callback(self._home.remove_daemon_json)
        return status


def _address(text: str) -> Address:
    try:
        return parse_address(text)
    except Malformed as error:
        raise UsageError("swarm.join", str(error), "copy an address from another node's status") from error


if __name__ == "__main__":
    sys.exit(main())
