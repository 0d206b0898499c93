"""Reading what another node's peer API answers: never more than was allowed for."""

from __future__ import annotations

import aiohttp


async def read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The whole body; of one that is larger the first `limit` + 1 bytes, so that whoever parses it sees that it is.

    A body comes in as many pieces as the network likes, and `response.content.read(n)` gives the first of them.
    """
    data = bytearray()
    while len(data) <= limit and (piece := await response.content.read(limit + 1 - len(data))):
        data += piece
    return bytes(data)
