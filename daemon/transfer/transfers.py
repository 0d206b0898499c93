"""Pulls and publishes that are under way or ended: one task each, watched by whoever likes, continued after a restart."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from daemon.errors import Bug, NotFound, SwarmError
from daemon.ledger import LedgerThread
from registry.records import Model
from registry.store import Ledger, TransferRow

log = logging.getLogger(__name__)

State = Literal["resolving", "fetching", "verifying", "storing", "done", "failed", "cancelled"]
FINAL: frozenset[str] = frozenset({"done", "failed", "cancelled"})
_TICK_S = 0.25
_BEGINNING_S = 30.0
_RATE_WINDOW_S = 3.0
_KEPT = 200  # ended transfers that are remembered


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(slots=True)
class Transfer:
    """One pull or publish. The worker writes it, everybody else reads."""

    id: str
    kind: Literal["pull", "publish"]
    ref: str
    state: State = "resolving"
    name: str = ""
    size: int | None = None  # bytes
    received: int = 0  # bytes that are here and verified
    sources: dict[str, int] = field(default_factory=lambda: {"ipfs": 0, "bittorrent": 0, "https": 0, "disk": 0})
    peers: int = 0
    notes: list[str] = field(default_factory=list)
    error: SwarmError | None = None
    model: Model | None = None
    started: str = field(default_factory=utc_now)
    finished: str | None = None
    began: float = field(default_factory=time.monotonic)
    _marks: deque[tuple[float, int]] = field(default_factory=deque, repr=False)

    @property
    def rate(self) -> float:
        """Bytes per second over the last few seconds."""
        if len(self._marks) < 2 or self.state in FINAL:
            return 0.0
        (t0, b0), (t1, b1) = self._marks[0], self._marks[-1]
        return max(0.0, (b1 - b0) / (t1 - t0)) if t1 > t0 else 0.0

    def mark(self, now: float) -> None:
        self._marks.append((now, self.received))
        while now - self._marks[0][0] > _RATE_WINDOW_S:
            self._marks.popleft()

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


Work = Callable[[Transfer], Awaitable[Model]]


class Transfers:
    def __init__(self, ledger: LedgerThread) -> None:
        self._ledger = ledger
        self._transfers: dict[str, Transfer] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closing = False

    async def open(self, resume: Callable[[str], Transfer]) -> None:
        """Go on with the pulls that a stop or a crash has interrupted. `resume(ref)` starts one."""
        for row in await self._ledger.call(Ledger.transfers):
            if row.state in FINAL:
                continue
            ended = TransferRow(row.id, row.kind, row.ref, "cancelled", row.started, utc_now(), None)
            await self._ledger.call(Ledger.save_transfer, ended)
            if row.kind == "pull":
                try:
                    resume(row.ref)
                except SwarmError as error:
                    log.warning("the pull of %s cannot go on: %s", row.ref, error)

    @property
    def beginning(self) -> bool:
        """Whether a pull has just begun: the first bytes are waited for, what comes later is only carried on."""
        now = time.monotonic()
        return any(
            one.kind == "pull" and one.state not in FINAL and now - one.began < _BEGINNING_S
            for one in self._transfers.values()
        )

    def start(self, kind: Literal["pull", "publish"], ref: str, work: Work) -> Transfer:
        """Begin, or join the pull that does the same already. Two publishes of a file may give it different names."""
        for running in self._transfers.values():
            if running.kind == kind == "pull" and running.ref == ref and running.state not in FINAL:
                return running
        transfer = Transfer(id=secrets.token_hex(8), kind=kind, ref=ref)
        self._transfers[transfer.id] = transfer
        self._tasks[transfer.id] = asyncio.create_task(self._run(transfer, work), name=f"{kind} {transfer.id}")
        self._forget_old()
        return transfer

    def all(self) -> list[Transfer]:
        return list(self._transfers.values())

    def get(self, transfer_id: str) -> Transfer:
        try:
            return self._transfers[transfer_id]
        except KeyError:
            raise NotFound(transfer_id, "no such transfer", "GET /api/transfers lists them") from None

    async def cancel(self, transfer_id: str) -> Transfer:
        """Stop a transfer; what it has is kept for the next try."""
        transfer = self.get(transfer_id)
        task = self._tasks.get(transfer_id)
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task])
        return transfer

    async def watch(self, transfer_id: str) -> AsyncIterator[Transfer]:
        """The transfer, again and again while it changes, and a last time when it has ended."""
        transfer = self.get(transfer_id)
        task = self._tasks.get(transfer_id)
        while task is not None and not task.done():
            yield transfer
            await asyncio.wait([task], timeout=_TICK_S)
        yield transfer

    async def close(self) -> None:
        """Stop everything; unfinished pulls stay unfinished in the ledger and go on at the next start."""
        self._closing = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(self, transfer: Transfer, work: Work) -> None:
        ticker = asyncio.create_task(_tick(transfer))
        try:
            await self._save(transfer)
            transfer.model = await work(transfer)
            transfer.state = "done"
        except asyncio.CancelledError:
            if not self._closing:
                transfer.state = "cancelled"
        except SwarmError as error:
            transfer.error, transfer.state = error, "failed"
        except Exception:  # a bug must end this transfer visibly, not the daemon
            log.exception("the transfer of %s failed", transfer.ref)
            transfer.error, transfer.state = Bug("transfer", "an unexpected error", "see logs/daemon.log"), "failed"
        finally:
            ticker.cancel()
            transfer.finished = utc_now()
        if not self._closing:
            try:
                await self._save(transfer)
            except SwarmError as error:  # it ended as it ended; only the memory of it is lost
                log.warning("the end of the transfer of %s was not written down: %s", transfer.ref, error)

    async def _save(self, transfer: Transfer) -> None:
        error = transfer.error.message if transfer.error is not None else None
        row = TransferRow(transfer.id, transfer.kind, transfer.ref, transfer.state, transfer.started, transfer.finished, error)
        await self._ledger.call(Ledger.save_transfer, row)

    def _forget_old(self) -> None:
        ended = [transfer.id for transfer in self._transfers.values() if transfer.state in FINAL]
        for transfer_id in ended[: max(0, len(ended) - _KEPT)]:
            del self._transfers[transfer_id], self._tasks[transfer_id]


async def _tick(transfer: Transfer) -> None:
    while True:
        transfer.mark(time.monotonic())
        await asyncio.sleep(_TICK_S)
