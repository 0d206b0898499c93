"""Run on a host: nodes of the BitTorrent DHT that name whoever they are told to under one key, and web servers that are no help.

`python liar.py JSON` is told in one document:

    addresses   our own; one DHT node on port 6881 of each
    key         in hex; the nodes claim to be next to it
    honest      addresses of nodes that they name, too: else they would be the whole DHT
    lies        [address, port] pairs
    silent, endless, redirect   ports: nobody answers, 1 GB of an answer, all are sent to `location`

It prints a line when all is open, and runs until it is killed.
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

    def __init__(self, key: bytes, address: str, honest: list[str], lies: list[tuple[str, int]]) -> None:
        self._key = key
        self._id = key[:19] + random.randbytes(1)
        self._nodes = [_compact(self._id, address, 6881)]
        self._honest = honest
        self._lies = [_compact(b"", host, port) for host, port in lies]

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        for address in self._honest:
            ping = {b"t": b"id", b"y": b"q", b"q": b"ping", b"a": {b"id": self._id}}
            transport.sendto(encode(ping), (address, 6881))

    def datagram_received(self, data: bytes, source: Any) -> None:
        said: Any = decode(data, max_depth=8, max_tokens=200)[0]
        transaction, query = said[b"t"], said.get(b"q")
        if query is None:
            self._nodes.append(_compact(said[b"r"][b"id"], *source))
            return
        answer: dict[bytes, Any] = {b"id": self._id}
        if query in (b"find_node", b"get_peers"):
            answer[b"nodes"] = b"".join(self._nodes)
        if query == b"get_peers" and said[b"a"][b"info_hash"] == self._key:
            answer[b"token"] = b"lies"
            answer[b"values"] = random.sample(self._lies, min(_VALUES, len(self._lies)))
        self._transport.sendto(encode({b"t": transaction, b"y": b"r", b"r": answer}), source)


def _compact(node: bytes, address: str, port: int) -> bytes:
    return node + socket.inet_aton(address) + port.to_bytes(2, "big")


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


async def main(told: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    lies = [(str(host), int(port)) for host, port in told["lies"]]
    for address in told["addresses"]:
        node = Node(bytes.fromhex(told["key"]), address, told["honest"], lies)
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
    asyncio.run(main(json.loads(sys.argv[1])))
