"""Host names to addresses, and nobody waits for it: not the caller, not the process that ends.

`loop.getaddrinfo` uses the executor, whose threads the end of the process waits for: half a minute
where no resolver answers. Here each look-up has a thread of its own that nobody waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Sequence

MAX_ADDRESSES = 16  # of one name

Found = Callable[[str, Sequence[tuple[str, int]]], None]


def look_up(host: str, port: int, found: Found) -> None:
    """Call `found(host, addresses)` on this loop once the resolver has answered or failed.

    `addresses` are (IP, `port`), none where it failed. It is not called when the loop has ended by then.
    """
    loop = asyncio.get_running_loop()

    def work() -> None:
        addresses = _resolve(host, port)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
            loop.call_soon_threadsafe(found, host, addresses)

    threading.Thread(target=work, name=f"look up {host}", daemon=True).start()


def _resolve(host: str, port: int) -> list[tuple[str, int]]:
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return []
    addresses = [(str(address[0]), port) for *_, address in answers]
    return list(dict.fromkeys(addresses))[:MAX_ADDRESSES]
