"""Publish and pull of a 1 GiB file beside `ipfs add --nocopy`, `ipfs get` and plain libtorrent, in turn, in one run.

Prints medians and ratios; asserts only that the right bytes arrived. `SWARMCTL_BENCH_MIB` and `SWARMCTL_BENCH_RUNS` change its size.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from daemon.ipfs.kubo import KuboProcess
from tests.functional.nodes import Node, nodes
from tests.unit.gguf_files import tiny_gguf

SIZE = int(os.environ.get("SWARMCTL_BENCH_MIB", "1024")) << 20
RUNS = int(os.environ.get("SWARMCTL_BENCH_RUNS", "3"))

LIBTORRENT = """
import sys, time, libtorrent as lt
role, torrent, folder, port = sys.argv[1:]
session = lt.session({"listen_interfaces": f"127.0.0.1:{0 if role == 'get' else port}", "enable_dht": False, "enable_lsd": False,
    "enable_upnp": False, "enable_natpmp": False, "enable_outgoing_utp": False, "enable_incoming_utp": False})
params = lt.load_torrent_file(torrent)
params.save_path = folder
if role == "seed":
    params.flags |= lt.torrent_flags.seed_mode
handle = session.add_torrent(params)
if role == "seed":
    print(session.listen_port(), flush=True)
    sys.stdin.read()
else:
    handle.connect_peer(("127.0.0.1", int(port)))
    while not handle.status().is_seeding:
        time.sleep(0.01)
"""


class Clock:
    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def time(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[what].append(time.monotonic() - began)

    def median(self, what: str) -> float:
        return statistics.median(self.seconds[what])


@contextlib.asynccontextmanager
async def plain_kubo(binary: Path, folder: Path) -> AsyncIterator[Callable[..., str]]:
    """A Kubo without anything of ours around it but its configuration; yields its command line."""
    process = KuboProcess(binary, folder / "ipfs", network="loopback", port=0, max_connections=96, log=folder / "kubo.log")
    await process.start()

    def ipfs(*words: str) -> str:
        return subprocess.run([binary, "--api", process.api, *words], check=True, capture_output=True, text=True).stdout.strip()

    try:
        yield ipfs
    finally:
        await process.stop()


@pytest.fixture
def make_node(tmp_path: Path, kubo_binary: Path) -> Iterator[Callable[[str], Node]]:
    yield from nodes(tmp_path, kubo_binary)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.timeout(1800)
async def test_publish_and_pull(tmp_path: Path, kubo_binary: Path, make_node: Callable[[str], Node], blockbuster: object) -> None:
    original = tiny_gguf(tmp_path / "original.gguf", SIZE)
    wanted, clock = digest(original), Clock()
    for turn in range(RUNS):
        folder = tmp_path / f"turn{turn}"
        folder.mkdir()
        await with_ipfs(clock, kubo_binary, folder, original, wanted)
        blob, torrent = with_swarmctl(clock, make_node, turn, original, wanted)
        with_libtorrent(clock, folder, blob, torrent, wanted)
        shutil.rmtree(folder)
    report(clock)


async def with_ipfs(clock: Clock, binary: Path, folder: Path, original: Path, wanted: str) -> None:
    async with plain_kubo(binary, folder / "one") as one, plain_kubo(binary, folder / "two") as two:
        inside = folder / "one" / original.name
        os.link(original, inside)
        with clock.time("ipfs add --nocopy"):
            cid = one(
                "add", "-Q", "--nocopy", "--cid-version=1", "--raw-leaves", "--chunker=size-1048576", "--max-file-links=1024", str(inside)
            )
        address = next(line for line in one("id", "-f", "<addrs>").splitlines() if line.startswith("/ip4/127.0.0.1/tcp/"))
        two("swarm", "connect", address)
        with clock.time("ipfs get"):
            two("get", "-o", str(folder / "got"), cid)
        assert digest(folder / "got") == wanted


def with_swarmctl(clock: Clock, make_node: Callable[[str], Node], turn: int, original: Path, wanted: str) -> tuple[Path, Path]:
    a, b, c = (make_node(f"{letter}{turn}") for letter in "abc")
    a.up()
    b.up("--torrent-enabled", "false")
    c.up("--ipfs-enabled", "false")
    with clock.time("swarmctl publish"):
        model = a.run("publish", str(original), timeout=300)
    for node, what in ((b, "swarmctl pull (IPFS)"), (c, "swarmctl pull (BitTorrent)")):
        node.join(a)
        with clock.time(what):
            node.run("pull", model["code"], timeout=300)
        assert digest(node.home / "models" / f"{model['blake3']}.gguf") == wanted
        node.stop()
        shutil.rmtree(node.home)
    a.stop()
    return a.home / "models" / f"{model['blake3']}.gguf", a.home / "torrents" / f"{model['blake3']}.torrent"


def with_libtorrent(clock: Clock, folder: Path, blob: Path, torrent: Path, wanted: str) -> None:
    def command(role: str, where: Path, port: str) -> list[str]:
        return [sys.executable, "-c", LIBTORRENT, role, str(torrent), str(where), port]

    (folder / "lt").mkdir()
    seed = subprocess.Popen(command("seed", blob.parent, "0"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert seed.stdin is not None and seed.stdout is not None
    port = seed.stdout.readline().strip()
    with clock.time("libtorrent"):
        subprocess.run(command("get", folder / "lt", port), check=True, timeout=300)
    seed.communicate()
    assert digest(folder / "lt" / blob.name) == wanted


def report(clock: Clock) -> None:
    print(f"\n{SIZE >> 20} MiB, median of {RUNS}")
    for what in clock.seconds:
        print(f"  {what:<28} {clock.median(what):6.2f} s  {SIZE / 2**20 / clock.median(what):7.0f} MiB/s")
    for ours, theirs in (
        ("swarmctl publish", "ipfs add --nocopy"),
        ("swarmctl pull (IPFS)", "ipfs get"),
        ("swarmctl pull (BitTorrent)", "libtorrent"),
    ):
        print(f"  {ours} / {theirs}: {clock.median(ours) / clock.median(theirs):.2f} of its time")
