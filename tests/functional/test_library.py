"""The models on a real disk: what a crash, an edit or two tasks at once leave behind. No network is needed."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from daemon.errors import BackendError, NotFound, Refused, VerificationError
from daemon.ledger import LedgerThread
from daemon.torrent.session import TorrentSession
from daemon.transfer import manifests
from daemon.transfer import store as store_module
from daemon.transfer.identify import Identified, digest, identify
from daemon.transfer.library import Arrival, Library
from daemon.transfer.objects import object_cid
from daemon.transfer.seeding import Seeding
from daemon.transfer.sources import LeafSink
from daemon.transfer.store import Record, Store, stamp_of
from daemon.trust import TrustBook
from daemon.waiting import Stopped
from registry.cid import LEAF_SIZE, leaf_cid
from registry.records import GgufFacts, Model
from tests.unit.gguf_files import tiny_gguf

MIB = 1 << 20
OWN, OTHER = "ed25519:" + "aa" * 32, "ed25519:" + "bb" * 32
FACTS = GgufFacts("llama", "tiny", "F32", 1, 8, None, None)


@dataclass
class Place:
    """One data folder, opened as the daemon opens it."""

    store: Store
    library: Library
    trust: TrustBook
    torrents: TorrentSession
    strays: list[str]


@asynccontextmanager
async def opened(home: Path) -> AsyncIterator[Place]:
    home.mkdir(exist_ok=True)
    ledger = await LedgerThread.open(home / "ledger.db")
    torrents = TorrentSession("loopback", 0)
    await torrents.start()
    try:
        trust = TrustBook(ledger, OWN)
        await trust.open()
        store = Store(home)
        await asyncio.to_thread(store.open)
        seeding = Seeding(store, torrents, lambda: None, False)
        library = Library(store, ledger, trust, seeding, lambda: None)
        strays = await library.open()
        await seeding.seed_all(library.records())
        yield Place(store, library, trust, torrents, strays)
    finally:
        await torrents.close()
        await ledger.close()


async def adopting(place: Place, path: Path) -> Arrival:
    return partial(place.store.adopt, path, await asyncio.to_thread(stamp_of, path))


async def entered(place: Place, path: Path, name: str = "tiny") -> Model:
    identified = await identify(path)
    record = Record(place.library.describe(identified, name, FACTS, "published"))
    model, _ = await place.library.enter(identified, record, await adopting(place, path))
    return model


async def unfinished(place: Place, key: str, data: bytes) -> Path:
    """The file of a download that was broken off."""
    file = await asyncio.to_thread(place.store.partial, key) / "model.gguf"
    file.write_bytes(data)
    return file


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "tiny.gguf", MIB)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "ledger" not in path.name}


# -- crashes ------------------------------------------------------------------------------------------------------------


async def test_a_crash_before_the_file_is_in_its_place_leaves_no_model(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file comes last: killed before, there is no file of which nothing is known and that would come back unsigned."""

    class Killed(BaseException):
        pass

    def killed(path: Path) -> None:
        raise Killed

    async with opened(tmp_path / "home") as place:
        monkeypatch.setattr(Path, "replace", lambda path, target: killed(path) if target.suffix == ".gguf" else os.replace(path, target))
        with pytest.raises(Killed):
            await entered(place, original)
        monkeypatch.undo()
    async with opened(tmp_path / "home") as place:
        assert (place.library.models(), place.strays) == ([], [])
        assert (await entered(place, original)).name == "tiny"


async def test_a_crash_in_a_removal_does_not_bring_the_model_back(tmp_path: Path, original: Path) -> None:
    async with opened(tmp_path / "home") as place:
        model = await entered(place, original)
        place.library.path(model).unlink()  # all that a removal had time for
    async with opened(tmp_path / "home") as place:
        assert (place.library.models(), place.strays) == ([], [])


async def test_what_was_half_made_or_forgotten_is_cleaned_up(tmp_path: Path, original: Path) -> None:
    async with opened(tmp_path / "home") as place:
        model = await entered(place, original)
        kept = names(tmp_path / "home")
        (place.store.models / ".new-abc").write_bytes(b"half a record")
        (place.store.partials / ".new-def").mkdir()
        (place.store.partials / ".new-def" / "model.gguf").write_bytes(b"half a copy")
        for key, age in (("fresh", 0), ("old", store_module._PARTIAL_S + 60)):
            file = await unfinished(place, key, b"half a download")
            for path in (file, file.parent):
                os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    async with opened(tmp_path / "home") as place:
        assert names(tmp_path / "home") == kept | {"models/.partial/fresh/model.gguf"}
        assert place.library.models() == [model]


@pytest.mark.parametrize("damage", [b"", b"no torrent at all", None])
async def test_a_damaged_torrent_keeps_no_daemon_from_starting_and_is_made_again(
    tmp_path: Path, original: Path, damage: bytes | None
) -> None:
    async with opened(tmp_path / "home") as place:
        model = await entered(place, original)
        torrent = place.store.torrents / f"{model.identity.blake3}.torrent"
        before = torrent.read_bytes()
        torrent.unlink() if damage is None else torrent.write_bytes(damage)
    async with opened(tmp_path / "home") as place:
        assert place.strays == [model.identity.blake3]
        assert place.library.models() == [model]
        await place.library.identify_again(model.identity.blake3)
        assert torrent.read_bytes() == before
        assert place.library.models() == [model]
        assert place.torrents.status()["torrents"] == 1


# -- at the same time ---------------------------------------------------------------------------------------------------


async def test_what_a_pull_brings_changes_nothing_of_what_was_published_meanwhile(tmp_path: Path, original: Path) -> None:
    async with opened(tmp_path / "home") as place:
        published = await entered(place, original, name="Mine")
        inode = place.library.path(published).stat().st_ino
        partial_file = await unfinished(place, "x", original.read_bytes())
        identified = await identify(partial_file)
        pulled = Record(place.library.describe(identified, "Another name", FACTS, "pulled"))
        model, _ = await place.library.enter(identified, pulled, partial(place.store.accept, partial_file))
        assert model == published == place.library.models()[0]
        assert place.library.path(model).stat().st_ino == inode


async def test_a_model_enters_while_the_same_is_being_downloaded(tmp_path: Path, original: Path) -> None:
    async with opened(tmp_path / "home") as place:
        identified = await identify(original)
        download = await place.torrents.download(identified.torrent, tmp_path, "download.gguf")
        record = Record(place.library.describe(identified, "tiny", FACTS, "published"))
        adopt = await adopting(place, original)
        model, notes = await place.library.enter(identified, record, adopt)
        assert "not on BitTorrent yet" in notes[0]
        await download.close()
        # The download's end, which finds it here, seeds it.
        pulled = Record(place.library.describe(identified, "tiny", FACTS, "pulled"))
        assert await place.library.enter(identified, pulled, adopt) == (model, [])
        assert place.torrents.status()["torrents"] == 1


async def test_a_file_that_changes_between_reading_and_entering_does_not_enter(tmp_path: Path, original: Path) -> None:
    async with opened(tmp_path / "home") as place:
        identified, adopt, changed = await identify(original), await adopting(place, original), original.stat().st_mtime_ns
        with original.open("r+b") as file:
            file.seek(MIB // 2)
            file.write(b"another byte")
        os.utime(original, ns=(0, changed + 1))
        with pytest.raises(VerificationError, match="changed while it was read"):
            record = Record(place.library.describe(identified, "tiny", FACTS, "published"))
            await place.library.enter(identified, record, adopt)
        assert place.library.models() == []
        assert not any(name.endswith(".gguf") for name in names(tmp_path / "home"))


async def test_a_model_that_is_removed_while_it_is_checked(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path / "home") as place:
        model = await entered(place, original)
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow(path: Path) -> Identified:
            identified = await identify(path)
            begun.set()
            await go_on.wait()
            return identified

        monkeypatch.setattr("daemon.transfer.library.identify", slow)
        check = asyncio.create_task(place.library.check(model))
        await begun.wait()
        await place.library.remove(model)
        go_on.set()
        with pytest.raises(NotFound):
            await check
        assert [name for name in names(tmp_path / "home") if model.identity.blake3 in name] == []


# -- edits --------------------------------------------------------------------------------------------------------------


async def test_an_edit_in_place_is_noticed_while_the_daemon_runs(tmp_path: Path, original: Path) -> None:
    async with opened(tmp_path / "home") as place:
        model = await entered(place, original)
        await place.library.notice_changes()
        assert place.library.models() == [model]
        assert place.torrents.status()["torrents"] == 1
        with place.library.path(model).open("r+b") as file:  # what editing a hard-linked original does
            file.seek(MIB // 2)
            before = file.read(1)
            file.seek(MIB // 2)
            file.write(bytes([before[0] ^ 1]))
        os.utime(place.library.path(model), ns=(0, model.file_stamp[2] + 1))
        await place.library.notice_changes()
        (changed,) = place.library.models()
        assert changed.quarantined
        assert not place.library.sound(model.identity.blake3)
        assert place.torrents.status()["torrents"] == 0
        with pytest.raises(Refused):
            place.library.usable(changed)
        assert (await place.library.check(changed)).quarantined == "its bytes changed on disk"


async def test_a_touch_is_forgiven_once_the_bytes_were_hashed(tmp_path: Path, original: Path) -> None:
    async with opened(tmp_path / "home") as place:
        model = await entered(place, original)
        os.utime(place.library.path(model), ns=(0, model.file_stamp[2] + 1))
        assert (await place.library.check(model)).quarantined is None  # before anybody noticed
        await place.library.notice_changes()
        os.utime(place.library.path(model), ns=(0, model.file_stamp[2] + 2))
        await place.library.notice_changes()
        (noticed,) = place.library.models()
        assert noticed.quarantined
        assert (await place.library.check(noticed)).quarantined is None
        await place.library.notice_changes()
        assert place.library.models()[0].quarantined is None
        assert place.torrents.status()["torrents"] == 1


# -- names --------------------------------------------------------------------------------------------------------------


async def test_leaving_the_signature_out_is_no_way_to_a_publishers_name(tmp_path: Path, original: Path) -> None:
    async with opened(tmp_path / "home") as place:
        await place.trust.remember(OTHER, "Qwen")
        identified = await identify(original)
        assert place.library.unsigned_name(identified, None, "", "Qwen", "\u200b", "tiny", "other") == "tiny"
        assert place.library.unsigned_name(identified, "Qwen") == identified.identity.blake3[:12]


# -- cancelled in the middle --------------------------------------------------------------------------------------------


async def test_a_copy_that_is_cancelled_leaves_nothing(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_clone", lambda *_: False)
    monkeypatch.setattr(store_module, "_link", lambda *_: False)
    stop = threading.Event()
    stop.set()
    async with opened(tmp_path / "home") as place:
        record = Record(place.library.describe(await identify(original), "tiny", FACTS, "published"))
        with pytest.raises(Stopped):
            await asyncio.to_thread(await adopting(place, original), record, b"", stop)
        assert [name for name in names(tmp_path / "home") if name.startswith("models")] == []


async def test_the_digest_alone(tmp_path: Path, original: Path) -> None:
    assert await digest(original) == (await identify(original)).identity.blake3
    task = asyncio.create_task(digest(original))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_leaf_sink_keeps_what_is_right_and_never_writes_elsewhere(tmp_path: Path) -> None:
    data = [bytes([place]) * LEAF_SIZE for place in (1, 2)] + [b"end"]
    path = tmp_path / "model.gguf"
    path.write_bytes(data[0] + b"x" * LEAF_SIZE)
    sink = LeafSink(path, 2 * LEAF_SIZE + 3, [leaf_cid(leaf) for leaf in data])
    await sink.check()
    assert sink.missing() == [1, 2]
    assert not await sink.put(1, data[2])
    assert await sink.put(1, data[1])
    path.unlink()  # the pull is over; a write that comes late must fail, and make nothing
    with pytest.raises(BackendError):
        await sink.put(2, data[2])
    assert not path.exists()


# -- manifests on BitTorrent --------------------------------------------------------------------------------------------


async def signed(place: Place, path: Path, name: str) -> Model:
    identified = await identify(path)
    text = f'{{"of": "{name}"}}'
    model = replace(
        place.library.describe(identified, name, FACTS, "published"),
        manifest=object_cid(text.encode()),
        signed_by=OWN,
    )
    arrive = await adopting(place, path)
    entered, _ = await place.library.enter(identified, Record(model, text), arrive)
    return entered


def seeded(place: Place, name: str) -> bool:
    return place.torrents.known(manifests.torrent_of(f'{{"of": "{name}"}}').infohash) is not None


async def test_a_manifest_is_seeded_beside_its_model_until_that_is_gone(tmp_path: Path, original: Path) -> None:
    home = tmp_path / "home"
    async with opened(home) as place:
        first = await signed(place, original, "one")
        assert seeded(place, "one") and place.torrents.status()["torrents"] == 1
        infohash = manifests.torrent_of('{"of": "one"}').infohash
        assert place.library.manifest_infohash(first.manifest) == infohash
        assert place.library.manifest_infohash(None) is None
        second = await signed(place, original, "two")  # published again: the old words are gone
        assert seeded(place, "two") and not seeded(place, "one")
        assert sorted(home.glob("torrents/*.json")) == [home / "torrents" / f"{second.manifest}.json"]
    (home / "torrents" / f"{second.manifest}.json").unlink()
    (home / "torrents" / "of nothing.json").write_text("left over")
    async with opened(home) as place:
        assert seeded(place, "two")
        assert sorted(home.glob("torrents/*.json")) == [home / "torrents" / f"{second.manifest}.json"]
        await place.library.remove(second)
        assert not seeded(place, "two") and not list((home / "torrents").glob("*.json"))
