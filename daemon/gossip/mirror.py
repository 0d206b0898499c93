"""The ledger's copy of the table of peers: a moment behind, so that many beats are one transaction.

What was heard in the moment before a crash is lost. So that it cannot be said again by somebody else, nothing is believed after
a crash that was signed before the start: `floor` is the start in milliseconds, as the sequence numbers of announcements are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from daemon.ledger import LedgerThread
from registry.records import Peer
from registry.store import Ledger, StoredPage

BEHIND_S = 2.0  # how far the ledger may be behind
_OPEN = "peers.open"  # "1" while the ledger may be behind the table

Row = Callable[[str, Collection[int]], "tuple[Peer, list[StoredPage]] | None"]


class Mirror:
    """`row` gives a node and those of its pages as they are now, None when it is not known any more."""

    def __init__(self, ledger: LedgerThread, row: Row) -> None:
        self.floor = 0
        self._ledger = ledger
        self._row = row
        self._unwritten: dict[str, set[int]] = {}  # nodes, and their pages
        self._behind = asyncio.Event()
        self._opened = False

    async def open(self, now: int) -> tuple[list[Peer], list[StoredPage]]:
        """What the ledger has; `now` in unix seconds."""
        if await self._ledger.call(Ledger.get_meta, _OPEN) == "1":
            self.floor = now * 1000
        await self._ledger.call(Ledger.set_meta, _OPEN, "1")
        self._opened = True
        return await self._ledger.call(Ledger.peers), await self._ledger.call(Ledger.pages)

    async def close(self) -> None:
        """Idempotent."""
        if self._opened:
            self._opened = False
            await self.write()
            await self._ledger.call(Ledger.set_meta, _OPEN, "0")

    def note(self, node: str, page: int | None = None) -> None:
        """A node has said something or has left the table; the same of its page."""
        pages = self._unwritten.setdefault(node, set())
        if page is not None:
            pages.add(page)
        self._behind.set()

    async def write(self) -> None:
        """Bring the ledger up to date, in one transaction."""
        self._behind.clear()
        unwritten, self._unwritten = self._unwritten, {}
        if not unwritten:
            return
        rows = {node: self._row(node, pages) for node, pages in unwritten.items()}
        known = [row for row in rows.values() if row is not None]
        peers = [peer for peer, _ in known]
        pages = [page for _, those in known for page in those]
        gone = [node for node, row in rows.items() if row is None]
        noted = {(node, number) for node, numbers in unwritten.items() for number in numbers}
        dropped = noted - {(page.node, page.page) for page in pages}
        try:
            await self._ledger.call(
                Ledger.save_peers, peers, pages, gone=gone, dropped=dropped
            )
        except BaseException:
            for node, numbers in unwritten.items():
                self._unwritten.setdefault(node, set()).update(numbers)
            self._behind.set()
            raise

    async def write_forever(self) -> None:
        """Bring the ledger up to date whenever it is behind, every `BEHIND_S` at most."""
        while True:
            await self._behind.wait()
            await asyncio.sleep(BEHIND_S)
            await self.write()
