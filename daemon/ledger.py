"""The one thread that owns the SQLite ledger: calls run one after another, in the order in which they were made."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from daemon.errors import BackendError, NoSpace, Unavailable
from registry.store import Ledger

P = ParamSpec("P")
T = TypeVar("T")


class LedgerThread:
    """`await ledger.call(Ledger.save_model, model)` from any task of the loop. Use as `await LedgerThread.open(path)`."""

    def __init__(self, executor: ThreadPoolExecutor, ledger: Ledger) -> None:
        self._executor = executor
        self._ledger = ledger
        self._closed = False

    @classmethod
    async def open(cls, path: Path) -> LedgerThread:
        """Open (or make) the database at `path`. Raises `BackendError`, `NoSpace` when the disk is full."""
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        try:
            ledger = await asyncio.get_running_loop().run_in_executor(executor, _translated, Ledger, path)
        except BaseException:
            executor.shutdown(wait=False)
            raise
        return cls(executor, ledger)

    async def call(self, method: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `method(ledger, ...)` on the thread. Raises `BackendError` for what SQLite reports, `Unavailable` once closed."""
        if self._closed:
            raise Unavailable("ledger", "it is closed", "start the daemon again")
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: _translated(method, self._ledger, *args, **kwargs)
        )

    async def close(self) -> None:
        """Finish what was asked before, then close the database. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, _translated, self._ledger.close)
        finally:
            self._executor.shutdown(wait=False)


def _translated(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    try:
        return function(*args, **kwargs)
    except sqlite3.Error as error:
        # The primary result code is the low byte of the extended one.
        if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF == sqlite3.SQLITE_FULL:
            raise NoSpace("ledger", "the disk is full", "free some space and try again") from error
        raise BackendError("ledger", f"the database failed: {error}", "see the log; the ledger can be rebuilt from the store") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("ledger", "the disk is full", "free some space and try again") from error
        raise BackendError("ledger", f"the database failed: {error.strerror}", "check the data folder") from error
