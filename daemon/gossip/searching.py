"""One search on the DHTs: who is named there is met, a few at a time, for all who wait for the same."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterable, Set
from typing import Any
from urllib.parse import urlsplit

from daemon.buckets import counted_as
from daemon.errors import SwarmError
from registry.records import Address

_log = logging.getLogger(__name__)

MAX_TRIED = 512  # addresses of one search
POOL = 4096  # addresses that wait for their turn
AT_ONCE = 16
_HEARD_S = 0.25  # between two looks at whether it was heard of otherwise


class SharedSearch:
    """One search and those who wait for it, each until it finds what it is after itself."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.on_over: Callable[[], None] = lambda: None  # nobody can join any more
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._over = False

    async def wait(self, found: Callable[[], bool]) -> None:
        """Until `found()` or the end. The last who leaves takes the search with him."""
        mine = asyncio.get_running_loop().create_future()
        self._waiting[mine] = found
        try:
            await mine
        finally:
            del self._waiting[mine]
            if not self._waiting:
                await self._end()

    def is_over(self) -> bool:
        """Let go whoever has found it; whether nobody is left."""
        for waiter, found in self._waiting.items():
            if not waiter.done():
                _ask(found, waiter)
        self._over = all(waiter.done() for waiter in self._waiting)
        if self._over:
            self.on_over()
        return self._over

    def ended(self, task: asyncio.Task[None]) -> None:
        """The search has come to its end, whichever."""
        self.on_over()
        error = None if task.cancelled() else task.exception()
        for waiter in self._waiting:
            if waiter.done():
                continue
            if error is not None:
                waiter.set_exception(error)
            else:
                waiter.set_result(None)

    async def _end(self) -> None:
        self.on_over()
        assert self.task is not None
        if not self._over:
            self.task.cancel()
        await asyncio.wait({self.task})


def _ask(found: Callable[[], bool], waiter: asyncio.Future[None]) -> None:
    """Let go whoever has found it. What its question fails with is its own affair, and nobody else's."""
    try:
        if found():
            waiter.set_result(None)
    except Exception as error:  # raised where it waits
        waiter.set_exception(error)


class Pool:
    """Addresses to be tried, each once. Whose turn it is, chance decides: between the networks that name them, then between the
    hosts, then between the addresses of one host. So nobody is kept from being tried by the many names of somebody else.

    Holds `POOL` at most: where it is full, the host with most of them gives one up.
    """

    def __init__(self) -> None:
        self._hosts: dict[str, dict[str, list[Address]]] = {"http": {}, "ipfs": {}}
        self._known: set[Address] = set()  # those that wait, and those that were tried
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, address: Address) -> None:
        if address in self._known:
            return
        self._known.add(address)
        hosts = self._hosts["http" if address.http else "ipfs"]
        hosts.setdefault(_host(address), []).append(address)
        self._size += 1
        if self._size > POOL:
            self._known.discard(self._take(*self._largest()))

    def draw(self) -> Address:
        """One that is tried now. Raises `IndexError` when there is none."""
        kind = random.choice([kind for kind, hosts in self._hosts.items() if hosts])
        return self._take(kind, random.choice(list(self._hosts[kind])))

    def _take(self, kind: str, host: str) -> Address:
        waiting = self._hosts[kind][host]
        address = waiting.pop(random.randrange(len(waiting)))
        if not waiting:
            del self._hosts[kind][host]
        self._size -= 1
        return address

    def _largest(self) -> tuple[str, str]:
        """Network and name of the host with most addresses; any of several."""
        sizes = [
            (len(waiting), random.random(), kind, host)
            for kind, hosts in self._hosts.items()
            for host, waiting in hosts.items()
        ]
        _, _, kind, host = max(sizes)
        return kind, host


def _host(address: Address) -> str:
    """Whose share an address counts to: an IP address, of IPv6 the /64, or a libp2p peer without any."""
    if address.http:
        return counted_as(urlsplit(address.http[0]).hostname or "")
    parts = address.ipfs[0].split("/")
    return counted_as(parts[2]) if parts[1] in ("ip4", "ip6") else address.ipfs[0]


class Crowd:
    """Those who are named, met a few at a time, each once and `MAX_TRIED` in all, until `found()`."""

    def __init__(
        self, meet: Callable[[Address], Coroutine[Any, Any, None]], found: Callable[[], bool]
    ) -> None:
        self._meet = meet
        self._found = found
        self._waiting = Pool()
        self._left = MAX_TRIED
        self._wake = asyncio.Event()

    def add(self, address: Address) -> None:
        self._waiting.add(address)
        self._wake.set()

    async def gather(self, hints: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Run `hints`, which `add`, and meet everybody; returns when something was found or all is done."""
        sources = {asyncio.create_task(hint) for hint in hints}
        meetings: set[asyncio.Task[None]] = set()
        wake = asyncio.create_task(self._wake.wait())
        try:
            while (meetings or self._can_go_on(sources)) and not self._found():
                while self._waiting and self._left and len(meetings) < AT_ONCE:
                    self._left -= 1
                    meetings.add(asyncio.create_task(self._try(self._waiting.draw())))
                if wake.done():
                    self._wake.clear()
                    wake = asyncio.create_task(self._wake.wait())
                # It may also be heard of in another way.
                done, _ = await asyncio.wait(
                    {wake, *sources, *meetings},
                    timeout=_HEARD_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                sources, meetings = _without(sources, done), _without(meetings, done)
        finally:
            tasks = [wake, *sources, *meetings]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _can_go_on(self, sources: Set[asyncio.Task[None]]) -> bool:
        """Whether there is somebody to meet, or somebody may yet be named."""
        return bool(self._left and (sources or self._waiting))

    async def _try(self, address: Address) -> None:
        try:
            await self._meet(address)
        except SwarmError as error:
            _log.debug("who was named could not be met: %s", error)


def _without(
    tasks: Set[asyncio.Task[None]], done: Set[asyncio.Task[Any]]
) -> set[asyncio.Task[None]]:
    for task in tasks & done:
        task.result()
    return set(tasks - done)
