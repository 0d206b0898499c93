"""Small objects by their CID: manifests and .torrents. Any node may give them, because the CID checks the bytes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import aiohttp

from daemon.errors import SwarmError, Unserved, VerificationError
from daemon.ipfs.interface import IpfsNode
from registry.cid import UnixfsHasher
from registry.records import Address

log = logging.getLogger(__name__)

MANIFEST_LIMIT = 64 << 10  # bytes
TORRENT_LIMIT = 32 << 20
_DEADLINE_S = 15.0
_HOLDERS = 8  # doors asked for one object


def object_cid(data: bytes) -> str:
    hasher = UnixfsHasher()
    hasher.update(data)
    return hasher.finish()


class Objects:
    def __init__(self, ipfs: Callable[[], IpfsNode | None], session: aiohttp.ClientSession) -> None:
        self._ipfs = ipfs
        self._session = session

    async def get(self, cid: str, holders: Sequence[Address], *, limit: int, deadline_s: float = _DEADLINE_S) -> bytes:
        """The bytes that `cid` names, from IPFS and the holders' doors at once. Raises `Unserved` when nobody gives them."""
        asks: list[Coroutine[Any, Any, bytes]] = []
        node = self._ipfs()
        if node is not None:
            asks.append(node.read_bytes(cid, limit=limit, deadline_s=deadline_s))
        urls = [url for holder in holders for url in holder.http][:_HOLDERS]
        asks += [self._from_door(url, cid, limit) for url in urls]
        tasks = [asyncio.create_task(ask) for ask in asks]
        try:
            async with asyncio.timeout(deadline_s):
                for first in asyncio.as_completed(tasks):
                    try:
                        data = await first
                    except (SwarmError, aiohttp.ClientError, TimeoutError) as error:
                        log.debug("%s was not to be had there: %s", cid, error)
                        continue
                    if object_cid(data) == cid:
                        return data
                    log.warning("somebody gave other bytes for %s", cid)
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise Unserved(cid, "nobody gave it", "join a node that has it and try again")

    async def _from_door(self, url: str, cid: str, limit: int) -> bytes:
        async with self._session.get(f"{url}/swarm/1/object/{cid}", allow_redirects=False) as response:
            if response.status != 200:
                raise Unserved(cid, f"a node answered {response.status}")
            data = await response.content.read(limit + 1)
            while len(data) <= limit and (more := await response.content.read(limit + 1 - len(data))):
                data += more
            if len(data) > limit:
                raise VerificationError(cid, "the object is too large")
            return data
