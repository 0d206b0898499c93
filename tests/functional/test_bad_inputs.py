"""What people, peers and machines do wrong, on real nodes and from outside: the error of the contract, and a store as it was before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.functional import forgery
from tests.functional.forgery import Forger
from tests.functional.nodes import Failed, Node, nodes, until
from tests.functional.test_transfers import interrupt
from tests.unit.gguf_files import tiny_gguf

MIB = 1 << 20
SIZE = 4 * MIB + 123
LARGE = 16 * MIB + 123  # at 2 MiB/s: eight seconds
NO_IPFS = ("--ipfs-enabled", "false")
NOWHERE = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"  # a CID that nobody here announces


def store(node: Node) -> set[str]:
    """Everything that lies in a node's store, half-made things too."""
    folders = [node.home / "models", node.home / "torrents"]
    return {str(path.relative_to(node.home)) for folder in folders for path in folder.rglob("*")}


def checked(failed: Failed, code: int, says: str = "") -> Failed:
    """A failure is one line, `error: WHAT: WHY; NEXT STEP`; all else on stderr is progress."""
    assert failed.code == code, failed
    assert says in failed.error
    assert re.fullmatch(r"error: .+: .+; .+", failed.error), failed.error
    assert [line for line in failed.stderr.splitlines() if not line.startswith("{")] == [failed.error]
    return failed


def refuses(node: Node, code: int, *words: str, says: str = "") -> Failed:
    """The failure of a command that leaves nothing behind."""
    before = store(node)
    failed = checked(node.fails(*words), code, says)
    assert store(node) == before
    return failed


def no_tracebacks(folder: Path) -> None:
    for log in [*folder.glob("*.log"), *folder.glob("*/logs/*.log")]:
        assert "Traceback" not in log.read_text(errors="replace"), log


@pytest.fixture
def node(tmp_path: Path, kubo_binary: Path) -> Iterator[Callable[[str], Node]]:
    yield from nodes(tmp_path, kubo_binary)
    no_tracebacks(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, kubo_binary: Path) -> Iterator[tuple[Node, Node]]:
    """A has models, B pulls and has little of everything. Both know each other, without IPFS."""
    folder = tmp_path_factory.mktemp("shared")
    for make in nodes(folder, kubo_binary):
        a = make("a").up(*NO_IPFS)
        b = make("b").up(*NO_IPFS, "--transfer-give-up", "4", "--engine-memory", "1MiB")
        b.join(a)
        yield a, b
    no_tracebacks(folder)


@pytest.fixture
def a(shared: tuple[Node, Node]) -> Node:
    return shared[0]


@pytest.fixture
def b(shared: tuple[Node, Node]) -> Node:
    return shared[1]


@pytest.fixture
def liar() -> Iterator[Forger]:
    with forgery.forger() as made:
        yield made


# -- what is typed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ref",
    [
        "", "#abc", "#abc1890", "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzd!", "ipfs://not-a-cid", NOWHERE + "/../x",
        "magnet:?", "magnet:?xt=urn:btih:xyz", "magnet:?dn=only+a+name", "magnet:?xt=urn:btmh:1220" + "g" * 64, "a\\..\\b",
        "https://a\\@b/model.gguf", "hf:../..", "sha256:../../x", "two\nlines", "x" * 5000,
    ],
    ids=lambda ref: ref[:12] or "empty",
)  # fmt: skip
def test_a_reference_that_does_not_parse(b: Node, ref: str) -> None:
    refuses(b, 2, "pull", ref)


def test_a_reference_that_nothing_answers_to(b: Node) -> None:
    refuses(b, 3, "pull", "#abcdefg", says="no node that this one knows announces it")
    refuses(b, 3, "ask", "hello", "#abcdefg")
    refuses(b, 3, "rm", "#abcdefg")
    refuses(b, 3, "pull", "../../no/such/../file\u0001\u202e.gguf")
    refuses(b, 7, "pull", NOWHERE, says="IPFS is switched off")


def test_a_code_of_two_models(b: Node, liar: Forger, tmp_path: Path) -> None:
    made = forgery.unheard_of(tmp_path, 1).identity
    other = replace(made, cid=NOWHERE)
    first, second = forgery.alike(made, "00" * 5), forgery.alike(replace(other, blake3="0" * 64), "00" * 5)
    liar.announces(b, liar.offer(first, "The first"), liar.offer(second, "The second"))
    for words in (("pull", "#aaaaaaa"), ("ask", "hello", "#aaaaaaa")):
        failed = refuses(b, 3, *words, says="means")
        # Each is listed by a code that tells it from the other.
        told = re.findall(r"\baaaaaaa[a-z2-7]+\b", failed.error)
        assert len(set(told)) == 2, failed.error
        for code in told:
            assert "means" not in b.fails("ask", "hello", "#" + code).error


# -- what is no model -----------------------------------------------------------------------------------------------------


def impostor(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "cut short":
        os.truncate(tiny_gguf(path, MIB), MIB - 1)
    elif kind == "link to nothing":
        path.symlink_to(folder / "nothing")
    elif kind != "missing":
        path.write_bytes(
            {
                "web page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
                "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n",
                "pickle": b"\x80\x02}q\x00.",
                "empty": b"",
                "magic alone": b"GGUF",
            }[kind]
        )
    return path


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("web page", 2), ("LFS pointer", 2), ("pickle", 2), ("empty", 2), ("magic alone", 2), ("cut short", 2), ("folder", 2), ("pipe", 2),
        ("missing", 3), ("link to nothing", 3),
    ],
)  # fmt: skip
def test_a_file_that_is_no_gguf(b: Node, tmp_path: Path, kind: str, code: int) -> None:
    path = impostor(tmp_path, kind)
    refuses(b, code, "publish", str(path))
    refuses(b, code, "pull", str(path))


# -- signatures -----------------------------------------------------------------------------------------------------------

FORGERIES: dict[str, Callable[[bytes, Ed25519PrivateKey], bytes]] = {
    "wrong signature": lambda signed, key: forgery.with_wrong_signature(signed),
    "other words": lambda signed, key: forgery.with_other_words(signed),
    "stripped": lambda signed, key: forgery.without_signature(signed),
    "another type": forgery.of_another_type,
    "type swapped": lambda signed, key: forgery.changed(signed, payloadType="application/json"),
    "another key's": lambda signed, key: forgery.signed_by_another_name(signed),
    "no envelope": lambda signed, key: b"{}",
    "no JSON": lambda signed, key: signed[:-1],
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_manifest_that_does_not_verify(b: Node, liar: Forger, tmp_path: Path, kind: str) -> None:
    made = forgery.unheard_of(tmp_path, 2)
    signed = liar.manifest(made.identity, name="Forged", torrent=made.torrent)
    liar.announces(b, liar.offer(made.identity, "Forged", FORGERIES[kind](signed, liar.key)))
    refuses(b, 4, "pull", "Forged", says="its manifest does not verify")


def test_a_manifest_of_other_bytes_than_its_cid(b: Node, liar: Forger, tmp_path: Path) -> None:
    made = forgery.unheard_of(tmp_path, 3)
    wanted, given = (liar.manifest(made.identity, name=name) for name in ("Wanted", "Given"))
    offer = liar.offer(made.identity, "Wanted", wanted)
    liar.objects[str(offer.manifest)] = given
    liar.announces(b, offer)
    refuses(b, 4, "pull", "Wanted", says="could not be checked")


def test_a_manifest_of_another_model(b: Node, liar: Forger, tmp_path: Path) -> None:
    made, other = forgery.unheard_of(tmp_path, 4), forgery.unheard_of(tmp_path, 5)
    liar.announces(b, liar.offer(made.identity, "This", liar.manifest(other.identity, name="That")))
    refuses(b, 4, "pull", "This", says="speaks of another CID")


def test_a_torrent_that_is_not_the_manifests(b: Node, liar: Forger, tmp_path: Path) -> None:
    made, other = forgery.unheard_of(tmp_path, 6), forgery.unheard_of(tmp_path, 7)
    for torrent, says in ((other.torrent, "its torrent is of other bytes than promised"), (b"d4:infoi1ee", "its torrent cannot be used")):
        liar.announces(b, liar.offer(made.identity, "Torn", liar.manifest(made.identity, name="Torn", torrent=torrent)))
        refuses(b, 4, "pull", "Torn", says=says)


def test_bytes_that_are_not_what_the_manifest_promises(a: Node, b: Node, liar: Forger, tmp_path: Path) -> None:
    """The torrent is right and A seeds it; only the digests that the torrent does not know are lies."""
    path = tiny_gguf(tmp_path / "seeded.gguf", SIZE, seed=8)
    made, other = forgery.identified(path), forgery.unheard_of(tmp_path, 9)
    a.run("publish", str(path))
    port = a.run("status")["bittorrent"]["port"]
    identity = replace(made.identity, sha256=other.identity.sha256, cid=other.identity.cid)
    signed = liar.manifest(identity, name="A lie", torrent=made.torrent)
    offer = replace(liar.offer(identity, "A lie", signed), infohash=None, infohash_v2=None)
    liar.announces(b, offer, bittorrent=(f"127.0.0.1:{port}",))
    refuses(b, 4, "pull", "A lie", says="not what the signed manifest promises")


def test_a_liar_beside_an_honest_node(a: Node, node: Callable[[str], Node], liar: Forger, tmp_path: Path) -> None:
    """It is heard first, gives its own infohash and a manifest without a signature for A's CID: A's word still counts."""
    model = a.run("publish", str(tiny_gguf(tmp_path / "Honest.gguf", SIZE, seed=20)))
    made, other = forgery.identified(tmp_path / "Honest.gguf"), forgery.unheard_of(tmp_path, 21)
    lie = replace(made.identity, infohash=other.identity.infohash, infohash_v2=other.identity.infohash_v2)
    puller = node("puller").up(*NO_IPFS)
    liar.announces(puller, liar.offer(lie, "A lie", forgery.without_signature(liar.manifest(lie, name="A lie"))))
    puller.join(a)
    assert puller.run("pull", model["cid"])["signed_by"] == a.status["node"]


# -- trust ----------------------------------------------------------------------------------------------------------------


def test_a_blocked_publisher_and_a_changed_key(a: Node, b: Node, liar: Forger, tmp_path: Path) -> None:
    known = a.run("publish", str(tiny_gguf(tmp_path / "Known.gguf", SIZE, seed=10)))
    later = a.run("publish", str(tiny_gguf(tmp_path / "Later.gguf", SIZE, seed=11)))
    until(lambda: {"Known", "Later"} <= {model["name"] for model in b.run("models")}, "the announcement")
    b.run("pull", known["code"])
    made = forgery.unheard_of(tmp_path, 12)
    liar.announces(b, liar.offer(made.identity, "Known", liar.manifest(made.identity, name="Known", torrent=made.torrent)))
    refuses(b, 8, "pull", made.identity.cid, says="another key signed this name before")
    b.run("trust", "block", a.status["node"])
    try:
        refuses(b, 8, "pull", later["code"], says="blocked")
        refuses(b, 8, "serve", known["code"], says="blocked")
    finally:
        b.run("trust", "remove", a.status["node"])
    assert b.run("pull", later["code"])["signed_by"] == a.status["node"]
    for model in (known, later):
        b.run("rm", model["cid"])


# -- damage on the way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(), NO_IPFS], ids=["ipfs and bittorrent", "bittorrent"])
def test_a_corrupted_block(node: Callable[[str], Node], tmp_path: Path, settings: tuple[str, ...]) -> None:
    original = tiny_gguf(tmp_path / "original.gguf", SIZE)
    right = original.read_bytes()
    (tmp_path / "copy.gguf").write_bytes(right)  # A's store may hold a link to its original
    a = node("a").up(*settings)
    b = node("b").up(*settings, "--transfer-give-up", "4", "--transfer-stall", "1")
    b.join(a)
    model = a.run("publish", str(original))
    blob = a.home / "models" / f"{model['blake3']}.gguf"
    changed = blob.stat().st_mtime_ns
    with blob.open("r+b") as file:
        file.seek(5 * MIB // 2)
        file.write(bytes([right[5 * MIB // 2] ^ 1]))
    os.utime(blob, ns=(changed, changed))  # as a disk loses a bit: A would withdraw a file that somebody changed
    failed = b.fails("pull", model["code"])
    assert checked(failed, failed.code).code in (4, 5)
    assert b.blobs() == b.run("ls") == []
    for kept in (b.home / "models" / ".partial").glob("*/*"):  # what is there to go on from is right, or not there yet
        data = kept.read_bytes()
        for at in range(0, len(data), MIB):
            assert data[at : at + MIB] in (right[at : at + MIB], bytes(len(data[at : at + MIB])))
    c = node("c").up(*settings)
    c.run("publish", str(tmp_path / "copy.gguf"))
    b.join(c)
    until(lambda: b.run("models")[0]["nodes"] == 2, "C's announcement")
    pulled = b.run("pull", model["cid"])
    assert (b.home / "models" / f"{model['blake3']}.gguf").read_bytes() == right
    assert pulled["sources"]["disk"] >= MIB  # what A gave rightly was not fetched again


def test_a_cid_of_something_else(node: Callable[[str], Node], kubo_binary: Path, tmp_path: Path) -> None:
    """What A's Kubo gives is what the CID names, and no model: a small page, a large file, a folder, an unsigned manifest."""
    a = node("a").up("--torrent-enabled", "false")
    b = node("b").up("--torrent-enabled", "false", "--transfer-give-up", "4")
    b.join(a)

    def added(path: Path) -> str:
        command = [str(kubo_binary), "add", "-Q", "-r", str(path)]
        environment = {**os.environ, "IPFS_PATH": str(a.home / "ipfs")}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    large = tmp_path / "large"
    large.write_bytes(b"<html>" + os.urandom(3 * MIB))
    refuses(b, 4, "pull", added(impostor(tmp_path, "web page")), says="not a GGUF")
    refuses(b, 4, "pull", added(large), says="not a GGUF")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"GGUF" + os.urandom(3 * MIB))
    refuses(b, 4, "pull", added(damaged), says="GGUF")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(large, folder)
    refuses(b, 2, "pull", added(folder), says="give the CID of one file")
    with forgery.forger() as liar:
        stripped = tmp_path / "stripped.json"
        stripped.write_bytes(forgery.without_signature(liar.manifest(forgery.unheard_of(tmp_path, 13).identity, name="x")))
    refuses(b, 4, "pull", added(stripped), says="does not verify")


# -- room -----------------------------------------------------------------------------------------------------------------


class Tmpfs:
    """A node whose store is a small file system of its own, which only its daemon sees."""

    def __init__(self, node: Node) -> None:
        (node.home / "models").mkdir(parents=True)
        mount = f"mount -t tmpfs -o size={LARGE + 72 * MIB} none '{node.home / 'models'}' && exec \"$@\""
        self.within = [*UNSHARE, "sh", "-c", mount, "sh"]
        self._node = node

    @property
    def models(self) -> Path:
        assert self._node.daemon is not None
        return Path(f"/proc/{self._node.daemon.pid}/root{self._node.home}/models")

    def full(self) -> None:
        """Up to the last byte: written, because a file system may promise more than it has."""
        with (self.models / "ballast").open("wb", buffering=0) as ballast:
            for block in (bytes(MIB), bytes(4096)):
                with contextlib.suppress(OSError):
                    while True:
                        ballast.write(block)

    def free(self) -> None:
        (self.models / "ballast").unlink()


class Limit:
    """A node whose files may not grow beyond what `RLIMIT_FSIZE` says: for whoever may not mount."""

    def __init__(self, node: Node) -> None:
        self.within: list[str] = []
        self._node = node
        self.models = node.home / "models"

    def full(self) -> None:
        assert self._node.daemon is not None
        self._unlimited = resource.prlimit(self._node.daemon.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self._node.daemon.pid, resource.RLIMIT_FSIZE, (MIB, self._unlimited[1]))

    def free(self) -> None:
        assert self._node.daemon is not None
        resource.prlimit(self._node.daemon.pid, resource.RLIMIT_FSIZE, self._unlimited)


def unshare() -> list[str]:
    """How a mount that nobody else sees can be made here; empty where it cannot."""
    for words in (["unshare", "-m"], ["unshare", "-rm"]):
        try:
            tried = subprocess.run([*words, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, timeout=20)
        except OSError:
            continue
        if tried.returncode == 0:
            return words
    return []


UNSHARE = unshare()


NO_MOUNT = pytest.mark.skipif(not UNSHARE, reason="nobody may mount here; Limit is the same test with RLIMIT_FSIZE")


@pytest.mark.parametrize("kind", [pytest.param(Tmpfs, marks=NO_MOUNT), Limit])
def test_a_full_disk_in_a_pull(a: Node, node: Callable[[str], Node], tmp_path: Path, kind: Any) -> None:
    path = tiny_gguf(tmp_path / "large.gguf", LARGE, seed=14)
    model = a.run("publish", str(path))
    puller = node("puller")
    disk = kind(puller)
    puller.up(*NO_IPFS, "--transfer-download-rate", "2MiB", within=disk.within)
    puller.join(a)
    pull = interrupt(puller, model["code"], disk.full)
    stdout, stderr = pull.communicate(timeout=60)
    assert (pull.returncode, json.loads(stdout)["error"]["code"]) == (6, 6), stderr
    assert "Traceback" not in stderr
    assert "the disk is full" in stderr.splitlines()[-1]
    assert list(disk.models.glob("*.gguf")) == puller.run("ls") == []
    disk.free()
    assert puller.run("pull", model["code"])["sources"]["disk"] >= MIB  # no restart, and what had come was kept
    (blob,) = disk.models.glob("*.gguf")
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == model["sha256"]
    a.run("rm", model["cid"])


def test_more_than_the_disk_holds(b: Node, liar: Forger) -> None:
    free = shutil.disk_usage(b.home).free
    identity, torrent = forgery.huge(2 * free)
    liar.announces(b, liar.offer(identity, "Huge", liar.manifest(identity, name="Huge", torrent=torrent)))
    refuses(b, 6, "pull", "Huge", says="are free")


def test_more_than_the_memory_holds(a: Node, b: Node, tmp_path: Path) -> None:
    model = b.run("publish", str(tiny_gguf(tmp_path / "heavy.gguf", SIZE, seed=15)))
    refuses(b, 6, "serve", model["code"], says="of memory")
    assert b.run("status")["serving"] == []
    b.run("rm", model["cid"])


# -- Kubo -----------------------------------------------------------------------------------------------------------------


Lame = tuple[dict[str, str], list[str]]  # the daemon's environment, and a command that runs it


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def no_kubo(folder: Path, real: Path) -> Lame:
    return {"SWARMCTL_IPFS_BINARY": str(folder / "nowhere")}, []


def none_anywhere(folder: Path, real: Path) -> Lame:
    """Not on PATH, not in the cache folder, and not in the virtual environment: the daemon gets one of its own."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    base = Path(sys.executable).resolve()
    python.symlink_to(base)
    (folder / "venv" / "pyvenv.cfg").write_text(f"home = {base.parent}\n")
    environment = {
        "SWARMCTL_IPFS_BINARY": "", "PATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder),
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry.endswith("site-packages")),
    }  # fmt: skip
    return environment, ["/bin/sh", "-c", f'shift; exec "{python}" "$@"', "sh"]


def one_that_ends(folder: Path, real: Path) -> Lame:
    words = 'case "$1" in version) echo 0.43.0;; *) echo "Error: no luck today" >&2; exit 3;; esac'
    return {"SWARMCTL_IPFS_BINARY": str(script(folder / "ends", words))}, []


def one_that_is_old(folder: Path, real: Path) -> Lame:
    return {"SWARMCTL_IPFS_BINARY": str(script(folder / "old", "echo 0.42.9"))}, []


def one_that_hangs(folder: Path, real: Path) -> Lame:
    words = f'case "$1" in version) echo 0.43.0;; init) exec "{real}" "$@";; *) exec sleep 600;; esac'
    return {"SWARMCTL_IPFS_BINARY": str(script(folder / "hangs", words))}, []


@pytest.mark.parametrize(
    ("kind", "state", "reason"),
    [
        (no_kubo, "down", "is no Kubo"),
        (none_anywhere, "down", "not installed"),
        (one_that_ends, "down", "no luck today"),
        (one_that_is_old, "down", "is no Kubo of version 0.43 or newer"),
        (one_that_hangs, "starting", ""),
    ],
)
def test_without_a_kubo_that_works(
    a: Node, kubo_binary: Path, tmp_path: Path, kind: Callable[[Path, Path], Lame], state: str, reason: str
) -> None:
    path = tiny_gguf(tmp_path / "model.gguf", SIZE, seed=16)
    code = a.run("publish", str(path))["code"]
    environment, within = kind(tmp_path, kubo_binary)
    lame = Node(tmp_path / "lame", kubo_binary, environment)
    try:
        lame.up(within=within)
        ipfs = until(lambda: (now := lame.run("status")["ipfs"])["state"] == state and now, "the state of IPFS")
        assert reason in (ipfs["reason"] or "")
        refuses(lame, 7, "pull", NOWHERE, says="IPFS is not running")
        lame.join(a)
        assert lame.run("pull", code)["sources"]["bittorrent"] == SIZE
        child = lame.run("status")["ipfs"]["pid"]
    finally:
        lame.stop()
    assert lame.daemon is not None and lame.daemon.returncode == 0
    assert child is None or not Path(f"/proc/{child}").exists()
    no_tracebacks(tmp_path)


# -- this machine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["api-port", "swarm-port"])
def test_a_port_in_use(node: Callable[[str], Node], setting: str) -> None:
    fresh = node("fresh")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        checked_start(fresh, fresh.fails("up", *NO_IPFS, f"--{setting}", port), 7, port)


def test_a_bittorrent_port_in_use_is_replaced(node: Callable[[str], Node]) -> None:
    """Its number means nothing to anybody: others learn it from the announcements."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status = node("n").up(*NO_IPFS, "--torrent-port", str(port)).status
    assert status["bittorrent"]["port"] not in (0, port)
    assert f"bt=127.0.0.1:{status['bittorrent']['port']}" in status["addresses"][0]


def checked_start(fresh: Node, failed: Failed, code: int, says: str = "") -> None:
    """A daemon that does not start says why, and is gone."""
    checked(failed, code, says)
    assert not (fresh.home / "daemon.json").exists()
    assert fresh.fails("status").code == 7


def test_a_second_daemon_and_a_wrong_token(a: Node, kubo_binary: Path) -> None:
    second = a.start("daemon")
    _, stderr = second.communicate(timeout=60)
    assert second.returncode == 7
    assert re.fullmatch(r"error: daemon: another one runs on this data folder; .+\n", stderr)
    stranger = Node(a.home, kubo_binary, {"SWARMCTL_TOKEN": "not the token"})
    for words in (("status",), ("ls",), ("pull", "#abcdefg"), ("down",)):
        refuses(stranger, 2, *words, says="token")
    assert a.run("status")["pid"] == a.status["pid"]


@pytest.mark.parametrize(
    "text",
    ["garbage", "[api]\nport = inf", "network = 5", "[swarm]\njoin = ['nobody']"],
    ids=lambda text: text.replace("\n", " "),
)
def test_a_config_that_is_wrong(tmp_path: Path, kubo_binary: Path, text: str) -> None:
    fresh = Node(tmp_path / "fresh", kubo_binary)
    fresh.home.mkdir()
    (fresh.home / "config.toml").write_text(text)
    flags = [*NO_IPFS, *(() if "network" in text else ("--network", "loopback"))]
    started = subprocess.run(
        [sys.executable, "-m", "daemon.main", "--home", str(fresh.home), *flags],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    checked(Failed(("daemon",), started.returncode, started.stderr), 2)
    assert store(fresh) == set()


def test_settings_from_elsewhere_that_are_wrong(tmp_path: Path, kubo_binary: Path) -> None:
    home = tmp_path / "fresh"
    checked(Node(home, kubo_binary, {"SWARMCTL_FOO": "1"}).fails("up", *NO_IPFS), 2, "SWARMCTL_FOO")
    checked(Node(home, kubo_binary).fails("up", *NO_IPFS, "--no-such-setting", "1"), 2, "--no-such-setting")
    no_tracebacks(tmp_path)


@pytest.mark.parametrize("name", ["node.key", "token", "models", "torrents", "ledger.db", "logs"])
def test_a_data_folder_that_cannot_be_used(tmp_path: Path, kubo_binary: Path, name: str) -> None:
    """A folder where a file is meant and the other way round: nobody can read that, not even root."""
    fresh = Node(tmp_path / "fresh", kubo_binary)
    fresh.home.mkdir()
    if name in ("models", "torrents", "logs"):
        (fresh.home / name).write_text("in the way")
    else:
        (fresh.home / name).mkdir()
    checked_start(fresh, fresh.fails("up", *NO_IPFS), 7)
    no_tracebacks(tmp_path)


def test_a_key_that_is_none(tmp_path: Path, kubo_binary: Path) -> None:
    fresh = Node(tmp_path / "fresh", kubo_binary)
    fresh.home.mkdir()
    (fresh.home / "node.key").write_text("-----BEGIN PRIVATE KEY-----\nnot one\n-----END PRIVATE KEY-----\n")
    checked_start(fresh, fresh.fails("up", *NO_IPFS), 7, "node.key")
    assert "not one" in (fresh.home / "node.key").read_text()  # it may be mended; nobody writes over it


def test_what_a_bad_night_leaves_behind(node: Callable[[str], Node], tmp_path: Path) -> None:
    """Killed, with a ledger that is garbage, one record of zero bytes and a daemon.json that speaks of nobody."""
    n = node("n").up(*NO_IPFS)
    hurt, sound = (
        n.run("publish", str(tiny_gguf(tmp_path / f"{name}.gguf", SIZE, seed=seed))) for seed, name in ((17, "Hurt"), (18, "Sound"))
    )
    before = {model["name"]: model for model in n.run("ls")}
    assert n.daemon is not None
    n.daemon.send_signal(signal.SIGKILL)
    n.daemon.wait()
    checked(n.fails("status"), 7, "not running")
    (n.home / "daemon.json").unlink()
    garbage = b"this is no database" * 500
    for path in n.home.glob("ledger.db-*"):
        path.unlink()
    (n.home / "ledger.db").write_bytes(garbage)
    (n.home / "models" / f"{hurt['blake3']}.json").write_bytes(b"")
    (n.home / "models" / ".partial" / "x").write_bytes(b"")
    n.up(*NO_IPFS)
    aside = [path.read_bytes() for path in n.home.glob("ledger.db.corrupt-*")]
    assert garbage in aside
    after = until(lambda: len(found := n.run("ls")) == 2 and {model["cid"]: model for model in found}, "both models")
    assert after[sound["cid"]] == before["Sound"]
    # What its record said is lost, so nobody has signed it any more; its bytes are what they were.
    assert (after[hurt["cid"]]["signed_by"], after[hurt["cid"]]["blake3"]) == (None, hurt["blake3"])
    assert [model["state"] for model in n.run("fsck")] == ["ready", "ready"]
