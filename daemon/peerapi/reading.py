"""Reading what another node's peer API answers: never more than was allowed for."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import aiohttp

from daemon.errors import Unserved


async def read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The whole body; of one that is larger the first `limit` + 1 bytes, so that whoever parses it sees that it is.

    A body comes in as many pieces as the network likes, and `response.content.read(n)` gives the first of them.
    """
    data = bytearray()
    while len(data) <= limit and (piece := await response.content.read(limit + 1 - len(data))):
        data += piece
    return bytes(data)


async def answer_to(
    request: AbstractAsyncContextManager[aiohttp.ClientResponse], limit: int, *, within_s: float
) -> bytes:
    """What a peer API answers to `request`, which has a timeout of `within_s`, read as `read_at_most` does.

    Raises `Unserved` when nothing answers in time, or no node of our swarm does.
    """
    try:
        async with request as response:
            if response.status == 404:
                raise Unserved("peer", "what answers there is no node of this swarm")
            if response.status != 200:
                raise Unserved("peer", f"its peer API answered {response.status}")
            return await read_at_most(response, limit)
    except (aiohttp.ClientError, ConnectionError) as error:
        raise Unserved("peer", "nothing answers there") from error
    except TimeoutError as error:
        raise Unserved("peer", f"nothing answered within {within_s:g} s") from error
