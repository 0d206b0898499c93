"""Publish and pull between real nodes: over IPFS, over BitTorrent, from one to the other in the middle, and over crashes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional.asking import call
from tests.functional.engines import alive
from tests.functional.nodes import Node, nodes, until
from tests.unit.gguf_files import tiny_gguf

MIB = 1 << 20
SIZE = 64 * MIB + 12345  # no multiple of a leaf or a piece; much more than a source has in flight
SLOW = "8MiB"  # eight seconds for all of it: a test that is kept waiting still finds the transfer under way


@pytest.fixture
def node(tmp_path: Path, kubo_binary: Path) -> Iterator[Callable[[str], Node]]:
    yield from nodes(tmp_path, kubo_binary)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "tiny.gguf", SIZE)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blob(at: Node, model: dict[str, Any]) -> Path:
    return at.home / "models" / f"{model['blake3']}.gguf"


def disk_usage(folder: Path) -> int:
    """Bytes that a folder takes, each inode once."""
    seen = {status.st_ino: status.st_blocks * 512 for status in (path.lstat() for path in folder.rglob("*") if path.is_file())}
    return sum(seen.values())


def interrupt(puller: Node, ref: str, act: Callable[[], None]) -> subprocess.Popen[str]:
    """Start a pull and do something when a quarter of it is there, which leaves most of the time for doing it."""
    pull = puller.start("pull", ref, "--json")
    assert pull.stderr is not None
    for line in pull.stderr:
        progress = json.loads(line) if line.startswith("{") else {}
        if progress.get("size") and progress["received"] > progress["size"] / 4:
            act()
            return pull
    raise AssertionError(f"the pull was over before a quarter of it came: {pull.stdout.read() if pull.stdout else ''}")


def finished(pull: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, stderr = pull.communicate(timeout=60)
    assert pull.returncode == 0, stderr
    document: dict[str, Any] = json.loads(stdout)
    return document


def test_publish_then_pull_over_ipfs(node: Callable[[str], Node], original: Path) -> None:
    a, b = node("a").up(), node("b").up("--torrent-enabled", "false")
    b.join(a)
    model = a.run("publish", str(original))
    pulled = b.run("pull", "#" + model["code"])
    assert pulled["sources"]["ipfs"] == SIZE == pulled["received"] == pulled["size"]
    for field in ("name", "size", "code", "cid", "infohash", "infohash_v2", "magnet", "manifest", "blake3", "sha256", "signed_by"):
        assert pulled[field] == model[field]
    assert sha256(blob(b, pulled)) == model["sha256"] == sha256(original)
    assert [row["cid"] for row in b.run("ls")] == [model["cid"]]
    assert b.run("pull", model["cid"])["sources"] == {"ipfs": 0, "bittorrent": 0, "https": 0, "disk": SIZE}  # here already
    # One copy on disk: the blob, and an IPFS repository that only refers to it.
    assert disk_usage(b.home) < SIZE + 8 * MIB
    # What B pulled it also gives: C knows only B, and A is gone.
    a.stop()
    c = node("c").up("--torrent-enabled", "false")
    c.join(b)
    assert c.run("pull", model["cid"])["signed_by"] == model["signed_by"]


def test_pull_with_no_kubo_at_all(node: Callable[[str], Node], original: Path) -> None:
    a, b = node("a").up("--ipfs-enabled", "false"), node("b").up("--ipfs-enabled", "false")
    b.join(a)
    model = a.run("publish", str(original))
    pulled = b.run("pull", model["code"])
    assert pulled["sources"] == {"ipfs": 0, "bittorrent": SIZE, "https": 0, "disk": 0}
    assert pulled["signed_by"] == model["signed_by"]
    assert pulled["cid"] == model["cid"]
    assert sha256(blob(b, pulled)) == model["sha256"]


def test_pull_by_magnet_manifest_and_path(node: Callable[[str], Node], original: Path) -> None:
    a = node("a").up()
    model = a.run("publish", str(original))
    by_magnet, by_manifest, by_path = node("m").up(), node("n").up(), node("p").up()
    for puller in (by_magnet, by_manifest):
        puller.join(a)
    assert by_magnet.run("pull", model["magnet"])["signed_by"] == model["signed_by"]
    assert by_manifest.run("pull", "ipfs://" + model["manifest"])["signed_by"] == model["signed_by"]
    taken = by_path.run("pull", str(original))
    assert taken["cid"] == model["cid"]
    assert taken["sources"]["disk"] == SIZE
    assert taken["signed_by"] is None


def test_a_bare_cid_is_accepted_as_unsigned_and_says_so(node: Callable[[str], Node], original: Path) -> None:
    a, b = node("a").up(), node("b").up()
    a.run("pull", str(original))  # there without a signature
    b.join(a)
    cid = a.run("ls")[0]["cid"]
    pull = b.start("pull", cid)
    _, stderr = pull.communicate(timeout=60)
    assert pull.returncode == 0, stderr
    assert "unsigned" in stderr
    assert b.run("ls")[0]["signed_by"] is None


def test_an_unsigned_model_is_verified_when_its_manifest_is_heard_of(node: Callable[[str], Node], original: Path) -> None:
    a, b = node("a").up("--ipfs-enabled", "false"), node("b").up("--ipfs-enabled", "false")
    model = a.run("publish", str(original))
    assert b.run("pull", str(original))["signed_by"] is None
    b.join(a)
    until(lambda: b.run("ls")[0]["signed_by"] == a.status["node"], "the signature of what is here")
    assert b.run("ls")[0]["magnet"] == model["magnet"]
    b.stop()
    b.up("--ipfs-enabled", "false")
    assert b.run("ls")[0]["signed_by"] == a.status["node"]


def test_kubo_killed_in_the_middle_and_bittorrent_finishes(node: Callable[[str], Node], original: Path) -> None:
    a, b = node("a").up(), node("b").up("--transfer-download-rate", SLOW)
    b.join(a)
    model = a.run("publish", str(original))
    kubo = b.run("status")["ipfs"]["pid"]
    pulled = finished(interrupt(b, model["code"], lambda: os.kill(kubo, signal.SIGKILL)))
    assert pulled["sources"]["ipfs"] > 0
    assert pulled["sources"]["bittorrent"] > 0
    assert pulled["sources"]["ipfs"] + pulled["sources"]["bittorrent"] == SIZE  # nothing verified was fetched again
    assert sha256(blob(b, pulled)) == model["sha256"]
    # The keeper brings Kubo back, and then the model is pinned as if nothing had been.
    until(lambda: b.run("status")["ipfs"]["state"] == "ready", "Kubo's return")
    assert b.run("status")["ipfs"]["pid"] != kubo


def test_kubo_killed_in_the_middle_without_bittorrent(node: Callable[[str], Node], original: Path) -> None:
    a, b = node("a").up(), node("b").up("--torrent-enabled", "false", "--transfer-download-rate", SLOW)
    b.join(a)
    model = a.run("publish", str(original))
    kubo = b.run("status")["ipfs"]["pid"]
    pulled = finished(interrupt(b, model["code"], lambda: os.kill(kubo, signal.SIGKILL)))
    assert pulled["sources"]["disk"] == pulled["sources"]["bittorrent"] == 0
    assert pulled["sources"]["ipfs"] + pulled["sources"]["https"] == SIZE  # nothing verified was fetched again
    assert sha256(blob(b, pulled)) == model["sha256"]


@pytest.mark.parametrize("settings", [(), ("--ipfs-enabled", "false")], ids=["ipfs", "bittorrent"])
def test_kill_9_of_the_daemon_in_the_middle_then_resume(node: Callable[[str], Node], original: Path, settings: tuple[str, ...]) -> None:
    a = node("a").up()
    b = node("b").up("--transfer-download-rate", SLOW, *settings)
    b.join(a)
    model = a.run("publish", str(original))
    kubo = b.status["ipfs"]["pid"]
    pull = interrupt(b, model["code"], b.kill)
    pull.communicate(timeout=60)
    assert pull.returncode == 7
    assert b.blobs() == []
    if kubo is not None:
        until(lambda: not alive(kubo), "the end of the orphaned Kubo", 10)
    # As slow as before: it goes on by itself, and must not be done before this asks how.
    b.up("--transfer-download-rate", SLOW, *settings)
    pulled = b.run("pull", model["code"])
    assert sha256(blob(b, pulled)) == model["sha256"]
    # The daemon goes on by itself when it starts, so the command may have come when all was there already.
    resumed = call(b, "GET", "/api/transfers")[0]
    assert SIZE > resumed["sources"]["disk"] > SIZE / 5  # what had come was kept
    assert sum(resumed["sources"].values()) == SIZE


def test_interrupting_a_pull_keeps_what_came(node: Callable[[str], Node], original: Path) -> None:
    a, b = node("a").up(), node("b").up("--transfer-download-rate", SLOW)
    b.join(a)
    code = a.run("publish", str(original))["code"]
    pull = b.start("pull", code, "--json")
    interrupted = interrupt(b, code, lambda: None)
    interrupted.send_signal(signal.SIGINT)
    interrupted.communicate(timeout=30)
    assert interrupted.returncode == 130
    pull.communicate(timeout=30)  # the same transfer, watched by two: cancelled is cancelled
    assert pull.returncode != 0
    assert b.blobs() == []
    assert b.run("pull", code)["sources"]["disk"] > SIZE / 5


def test_two_publishers_one_identity(node: Callable[[str], Node], original: Path, tmp_path: Path) -> None:
    other = tmp_path / "another name.gguf"
    other.write_bytes(original.read_bytes())
    first = node("a").up().run("publish", str(original))
    second = node("b").up().run("publish", str(other), "--name", "Something else")
    for field in ("cid", "infohash", "infohash_v2", "code", "blake3", "sha256", "size"):
        assert first[field] == second[field]
    assert first["signed_by"] != second["signed_by"]
    assert first["manifest"] != second["manifest"]


def test_the_cid_is_the_one_that_kubo_gives(node: Callable[[str], Node], original: Path, kubo_binary: Path, tmp_path: Path) -> None:
    model = node("a").up("--ipfs-enabled", "false").run("publish", str(original))
    environment = {**os.environ, "IPFS_PATH": str(tmp_path / "repo")}
    subprocess.run([kubo_binary, "init", "--profile=test,unixfs-v1-2025"], env=environment, check=True, capture_output=True)
    added = subprocess.run([kubo_binary, "add", "-Q", "--only-hash", original], env=environment, check=True, capture_output=True, text=True)
    assert model["cid"] == added.stdout.strip()


def test_the_store_survives_without_its_ledger(node: Callable[[str], Node], original: Path) -> None:
    a = node("a").up()
    a.run("publish", str(original))
    before = a.run("ls")
    a.stop()
    for path in a.home.glob("ledger.db*"):
        path.unlink()
    assert a.up().run("ls") == before


def test_publishing_leaves_the_original_alone_and_takes_no_second_copy(node: Callable[[str], Node], original: Path) -> None:
    before = (original.stat().st_mode, original.stat().st_mtime_ns, sha256(original))
    a = node("a").up()
    a.run("publish", str(original))
    listed = a.run("ls")
    again = a.run("publish", str(original))
    assert [{name: again[name] for name in listed[0]}] == listed == a.run("ls")  # publishing again changes nothing
    a.run("rm", a.run("ls")[0]["code"])
    assert a.run("ls") == []
    assert a.blobs() == []
    assert (original.stat().st_mode, original.stat().st_mtime_ns, sha256(original)) == before


def test_an_original_that_is_edited_in_place_is_withdrawn_at_once(node: Callable[[str], Node], original: Path) -> None:
    a = node("a").up("--ipfs-enabled", "false")
    model = a.run("publish", str(original))
    if blob(a, model).stat().st_ino != original.stat().st_ino:
        pytest.skip("this filesystem clones files: an edit of the original is none of the copy")
    with original.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"edited")
    until(lambda: a.run("ls")[0]["state"] == "quarantined", "the quarantine")
    assert a.run("models") == []
    assert a.run("status")["bittorrent"]["torrents"] == 0


def test_what_is_removed_while_ipfs_is_away_is_unpinned_when_it_is_back(
    node: Callable[[str], Node], original: Path, kubo_binary: Path
) -> None:
    a = node("a").up()
    kept = a.run("publish", str(tiny_gguf(original.with_name("kept.gguf"), MIB, seed=3)))
    model = a.run("publish", str(original))
    environment = {**os.environ, "IPFS_PATH": str(a.home / "ipfs")}

    def pins() -> str:
        listed = subprocess.run([kubo_binary, "pin", "ls", "--type=recursive"], env=environment, capture_output=True, text=True)
        return listed.stdout

    assert model["cid"] in pins()
    os.kill(a.run("status")["ipfs"]["pid"], signal.SIGKILL)
    until(lambda: a.run("status")["ipfs"]["state"] != "ready", "the end of Kubo")
    a.run("rm", model["cid"])
    until(lambda: a.run("status")["ipfs"]["state"] == "ready", "Kubo's return")
    until(lambda: kept["cid"] in pins() and model["cid"] not in pins() and model["manifest"] not in pins(), "the end of the pin")
    assert kept["manifest"] in pins()
