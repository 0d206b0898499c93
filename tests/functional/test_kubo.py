"""The life of our own Kubo child, on the real binary."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from daemon.errors import Unavailable, UsageError
from daemon.ipfs.node import KuboNode
from daemon.ipfs.rpc import Rpc
from tests.functional.kubos import make_process, running, until

DAEMON = """
import asyncio, sys
from pathlib import Path
from daemon.ipfs.kubo import KuboProcess
async def main():
    home = Path(sys.argv[2])
    kubo = KuboProcess(Path(sys.argv[1]), home / "ipfs", network="loopback", port=0, max_connections=32, log=home / "logs" / "kubo.log")
    await kubo.start()
    print(kubo.pid, flush=True)
    await kubo.wait()
asyncio.run(main())
"""


async def test_starts_answers_and_stops(kubo_binary: Path, tmp_path: Path) -> None:
    home = tmp_path / "Capitals, spaces & 100%"  # a URL would change them, and the RPC's socket lies there
    process = make_process(kubo_binary, home)
    assert process.pid is None
    await process.stop()  # nothing to stop is no error
    await process.start()
    async with Rpc(process.api) as rpc:
        node = KuboNode(rpc, repo=home / "ipfs")
        identity = await node.identity()
        assert all(address.startswith("/ip4/127.0.0.1/tcp/") for address in identity.addresses)
        assert (await node.version()).startswith("0.4")
        await process.stop()
        await process.stop()
        assert await process.wait() == 0
        with pytest.raises(Unavailable):
            await node.version()
        with pytest.raises(Unavailable):
            await node.drop_blocks(["bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"])


async def test_only_we_may_reach_the_rpc_and_nothing_listens_but_libp2p(kubo_binary: Path, tmp_path: Path) -> None:
    async with running(kubo_binary, tmp_path) as kubo:
        assert (tmp_path / "ipfs").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "ipfs" / "config").stat().st_mode & 0o777 == 0o600
        assert kubo.process.pid is not None
        listening = [c.laddr for c in psutil.Process(kubo.process.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert [address.ip for address in listening] == ["127.0.0.1"]


async def test_identity_survives_a_kill_and_its_stale_files(kubo_binary: Path, tmp_path: Path) -> None:
    async with running(kubo_binary, tmp_path) as first:
        identity = await first.node.identity()
        assert first.process.pid is not None
        os.kill(first.process.pid, signal.SIGKILL)
        assert await first.process.wait() == -signal.SIGKILL
        assert (tmp_path / "ipfs" / "rpc.sock").exists()
    async with running(kubo_binary, tmp_path) as second:
        assert (await second.node.identity()).peer_id == identity.peer_id


async def test_half_made_repository_is_made_anew(kubo_binary: Path, tmp_path: Path) -> None:
    (tmp_path / "ipfs.new").mkdir()
    (tmp_path / "ipfs.new" / "config").write_text("{")
    async with running(kubo_binary, tmp_path) as kubo:
        assert (await kubo.node.identity()).peer_id


async def test_dies_with_the_daemon_and_the_next_one_starts_at_once(kubo_binary: Path, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", DAEMON, str(kubo_binary), str(tmp_path)], stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        child = int(await asyncio.to_thread(daemon.stdout.readline))
        assert psutil.pid_exists(child)
        daemon.kill()
        async with running(kubo_binary, tmp_path) as kubo:
            assert (await kubo.node.identity()).peer_id
        await until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


async def test_another_process_on_the_repository_is_named(kubo_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.ipfs.kubo._LOCK_WAIT_S", 0.3)
    async with running(kubo_binary, tmp_path) as kubo:
        with pytest.raises(Unavailable, match="another process uses its repository"):
            await make_process(kubo_binary, tmp_path).start()
        assert await kubo.node.version()  # and the first is none the worse


@pytest.mark.parametrize(
    ("script", "mode", "why"),
    [
        (None, 0, "No such file"),
        ("#!/bin/sh\nexit 0\n", 0o600, "Permission denied"),
        ("#!/bin/sh\necho Error: out of luck >&2\necho bye\nexit 3\n", 0o700, "out of luck"),
        ("#!/bin/sh\nexit 3\n", 0o700, "exit code 3"),
    ],
)
async def test_binary_that_cannot_make_a_repository(tmp_path: Path, script: str | None, mode: int, why: str) -> None:
    binary = tmp_path / "kubo"
    if script is not None:
        binary.write_text(script)
        binary.chmod(mode)
    process = make_process(binary, tmp_path)
    with pytest.raises(Unavailable, match=why):
        await process.start()
    assert not (tmp_path / "ipfs").exists()


async def test_binary_that_ends_while_starting_says_why(kubo_binary: Path, tmp_path: Path) -> None:
    async with running(kubo_binary, tmp_path):
        pass
    binary = tmp_path / "kubo"
    binary.write_text("#!/bin/sh\necho Error: the stars are wrong\nexit 1\n")
    binary.chmod(0o700)
    process = make_process(binary, tmp_path)
    with pytest.raises(Unavailable, match="ended while starting: the stars are wrong"):
        await process.start()
    assert await process.wait() == 1


async def test_damaged_config_is_named(kubo_binary: Path, tmp_path: Path) -> None:
    (tmp_path / "ipfs").mkdir()
    (tmp_path / "ipfs" / "config").write_text("{")
    with pytest.raises(Unavailable, match="damaged"):
        await make_process(kubo_binary, tmp_path).start()


async def test_a_home_with_a_very_long_path(kubo_binary: Path, tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30)
    home.mkdir()
    async with running(kubo_binary, home) as kubo:
        assert not kubo.process.api.startswith(f"/unix{home}")
        assert (await kubo.node.identity()).peer_id
        path = kubo.write("file", b"x" * 3_000_000)
        assert await kubo.node.broken_references(await kubo.node.add_in_place(path)) == []
    socket = Path(kubo.process.api.removeprefix("/unix"))
    socket.unlink(missing_ok=True)
    socket.parent.rmdir()


async def test_connection_limit_must_make_sense(kubo_binary: Path, tmp_path: Path) -> None:
    process = make_process(kubo_binary, tmp_path)
    process._max_connections = 1
    with pytest.raises(UsageError, match="max_connections"):
        await process.start()
