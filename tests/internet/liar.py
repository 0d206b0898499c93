"""Run on a host: a node of the BitTorrent DHT that names whoever it was told to under every key, and web servers that are no help.

`python liar.py` reads one JSON document from its standard input: `addresses` (our own, one DHT node on port 6881 of each), `key`
(hex; the nodes claim to be next to it), `lies` ([address, port] pairs), and lists of ports: `silent` (nobody answers there),
`endless` (1 GB of an answer), `redirect` (to `location`). Prints a line when all is open, then runs until it is killed.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from typing import Any

from daemon.torrent.bencode import decode, encode

_GIGABYTE = 1 << 30
_VALUES = 110  # endpoints in one answer: more would not fit a datagram on Ethernet


class Node(asyncio.DatagramProtocol):
    """BEP 5, as far as it takes to be believed."""

    def __init__(self, key: bytes, address: str, lies: list[tuple[str, int]]) -> None:
        self._id = key[:19] + random.randbytes(1)
        self._self = self._id + socket.inet_aton(address) + (6881).to_bytes(2, "big")
        self._lies = [socket.inet_aton(host) + port.to_bytes(2, "big") for host, port in lies]

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, source: Any) -> None:
        try:
            said: Any = decode(data)
            transaction, query = said[b"t"], said.get(b"q")
        except Exception:
            return
        if query is None:
            return
        answer: dict[bytes, Any] = {b"id": self._id}
        if query in (b"find_node", b"get_peers"):
            answer[b"nodes"] = self._self
        if query == b"get_peers":
            answer[b"token"] = b"lies"
            answer[b"values"] = random.sample(self._lies, min(_VALUES, len(self._lies)))
        self._transport.sendto(encode({b"t": transaction, b"y": b"r", b"r": answer}), source)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {_GIGABYTE}\r\n\r\n"
        writer.write(head.encode())
        for _ in range(_GIGABYTE >> 16):
            writer.write(bytes(1 << 16))
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def main() -> None:
    told = json.load(sys.stdin)
    loop = asyncio.get_running_loop()
    lies = [(str(host), int(port)) for host, port in told["lies"]]
    for address in told["addresses"]:
        node = Node(bytes.fromhex(told["key"]), address, lies)
        await loop.create_datagram_endpoint(lambda node=node: node, local_addr=(address, 6881))

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            where = told["location"]
            writer.write(f"HTTP/1.1 307 Away\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    kinds = {"silent": silent, "endless": endless, "redirect": redirect}
    servers = [
        await asyncio.start_server(serve, told["addresses"][0], port)
        for kind, serve in kinds.items()
        for port in told[kind]
    ]
    print(f"{len(servers)} servers", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
