"""R27: clients that let a node wait. Each on the API alone, with limits that a test can wait for, and once all on a node."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from pathlib import Path

import pytest

from daemon.api.limits import Limits
from tests.functional.api_server import TOKEN, World, running
from tests.functional.asking import completion, free_slots, workers
from tests.functional.bad_http import CHAT, SLOTS, serving
from tests.functional.nodes import until

SLOW = 0.3  # seconds


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes."""
    found = b""
    async with asyncio.timeout(30):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                found += data
    return found


@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nHost: HOST\r\n\r\n"], ids=["a new connection", "after an answer"])
@pytest.mark.parametrize("drip", [b"", b"GET /healthz HTTP/1.1\r\nHost: HOST\r\nX: " + b"x" * 10_000], ids=["nothing", "byte by byte"])
async def test_r27_a_header_that_does_not_come_is_given_up(before: bytes, drip: bytes) -> None:
    async with running(World(), Limits(header_s=SLOW)) as url:
        host = url.removeprefix("http://").encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))

        async def send() -> None:
            writer.write(before.replace(b"HOST", host))
            for byte in drip.replace(b"HOST", host):
                await asyncio.sleep(0.02)
                writer.write(bytes([byte]))

        sending = asyncio.create_task(send())
        found = await closed(reader)
        assert (b'"ok"' in found) == bool(before)
        sending.cancel()
        writer.close()


async def test_r27_a_body_that_does_not_come_is_given_up() -> None:
    async with running(World(), Limits(body_s=SLOW)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        head = f"POST /api/trust HTTP/1.1\r\nHost: {url[7:]}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in await closed(reader)
        writer.close()


async def test_r27_a_reader_that_stops_reading_is_cut_off() -> None:
    world = World()
    body = json.dumps({"messages": [{"role": "user", "content": "flood"}], "stream": True}).encode()
    async with running(world, Limits(unread_s=SLOW)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), limit=1024)
        head = f"POST /api/swarm/relay/chat HTTP/1.1\r\nHost: {url[7:]}\r\nAuthorization: Bearer {TOKEN}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await reader.readline()
        async with asyncio.timeout(30):
            await world.answers.closed.wait()
        writer.close()


async def test_r27_more_connections_than_there_is_room_for() -> None:
    async with running(World(), Limits(connections=3)) as url:
        host, port = url.removeprefix("http://"), int(url.rpartition(":")[2])
        hello = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()

        async def answered() -> asyncio.StreamWriter | None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(hello)
            try:
                assert b" 200 " in await reader.readline()
            except (ConnectionError, AssertionError):
                writer.close()
                return None
            return writer

        taken = [await answered() for _ in range(5)]
        assert [writer is not None for writer in taken] == [True, True, True, False, False]
        assert taken[0] is not None
        taken[0].close()
        async with asyncio.timeout(30):
            while (again := await answered()) is None:
                await asyncio.sleep(0.02)
        for writer in (again, *taken[1:3]):
            assert writer is not None
            writer.close()


def test_r27_slow_clients_of_a_node_lose_their_connections(tmp_path: Path, kubo_binary: Path, model_file: Path) -> None:
    """All at once, against the 10 s of a node. The answer that nobody reads repeats itself until the context of 8192 is full."""
    with serving(tmp_path, kubo_binary, model_file) as server, contextlib.ExitStack() as stack:
        server.serve()
        (worker,) = workers(server.node)
        unread = stack.enter_context(server.connect(receive=4096))
        endless = json.dumps(completion(server.code, frequency_penalty=-2)).encode()
        unread.sendall(server.head(CHAT, f"Content-Length: {len(endless)}") + endless)
        until(lambda: free_slots(server.node) == SLOTS - 1, "the answer")
        beginnings = {
            "nothing": b"",
            "half a header": server.head(CHAT)[:-2],
            "half a body": server.head(CHAT, "Content-Length: 100") + b'{"model":',
            "half a chunk": server.head(CHAT, "Transfer-Encoding: chunked") + b"10\r\n{",
        }
        slow = {name: stack.enter_context(server.connect()) for name in beginnings}
        for name, data in beginnings.items():
            slow[name].sendall(data)
        server.answers()
        assert {name: to_the_end(connection)[9:12] for name, connection in slow.items()} == {
            "nothing": b"", "half a header": b"", "half a body": b"408", "half a chunk": b"408",
        }  # fmt: skip
        until(lambda: free_slots(server.node) == SLOTS, "the end of the answer that nobody reads")
        busy = worker.cpu_times().user
        answer = to_the_end(unread)
        assert b"data: " in answer and b"[DONE]" not in answer and b'"length"' not in answer
        assert worker.is_running() and worker.cpu_times().user - busy < 1
        server.answers()


def to_the_end(connection: socket.socket) -> bytes:
    """What there is to read until the other side ends it."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            found += data
    return found
