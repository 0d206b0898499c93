from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from registry import migrations
from registry.records import Address, GgufFacts, Identity, Model, Peer, SealKey
from registry.store import MAX_TRANSFERS, KeyRow, Ledger, StoredPage, TransferRow
from tests.unit import strategies

MODEL = Model(
    identity=Identity(12345, "aa" * 32, "bb" * 32, "bafy", "cc" * 20, "dd" * 32),
    name="SmolLM2",
    facts=GgufFacts("llama", "SmolLM2", "Q4_1", 134515008, 8192, None, "apache-2.0"),
    added="2026-11-21T12:00:00Z",
    origin="published",
    manifest="bafkrei",
    file_stamp=(2**64 - 1, 12345, 1_800_000_000_123_456_789),
)


def peer(node: str, *, sequence: int = 1, expires: int = 1000, revisions: tuple[int, ...] = (1,)) -> Peer:
    address = Address(node, ("/ip4/x",), (), ("http://h",))
    return Peer(node, "12D3", address, sequence, expires, (SealKey(3, "ee" * 32, 99),), True, revisions)


def page(node: str, number: int, revision: int) -> StoredPage:
    return StoredPage(node, number, revision, 1000, b"%d %d" % (number, revision))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ledger = Ledger(path)
    yield ledger
    ledger.close()


def reopened(ledger: Ledger, path: Path) -> Ledger:
    ledger.close()
    return Ledger(path)


def test_everything_survives_a_restart(ledger: Ledger, path: Path) -> None:
    ledger.save_model(MODEL)
    ledger.save_peers([peer("a")], [page("a", 0, 1)])
    ledger.save_transfer(TransferRow("1", "pull", "#abc2def", "fetching", "2026-11-21T12:00:00Z"))
    ledger.set_key("k", "trusted", "me")
    ledger.pin("name", "k")
    ledger.set_meta("sequence", "7")
    again = reopened(ledger, path)
    assert again.models() == [MODEL]
    assert again.peers() == [peer("a")]
    assert again.pages() == [page("a", 0, 1)]
    assert again.transfers() == [TransferRow("1", "pull", "#abc2def", "fetching", "2026-11-21T12:00:00Z")]
    assert again.keys() == [KeyRow("k", "trusted", "me")]
    assert again.pins() == {"name": "k"}
    assert again.get_meta("sequence") == "7" and again.get_meta("other") is None
    assert again.moved_aside is None
    again.close()
    again.close()


@settings(max_examples=25)  # each makes a database
@given(st.data())
def test_records_round_trip(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    said = data.draw(strategies.manifests)
    model = Model(said.identity, said.name, said.facts, said.created, "pulled", source=said.source, torrent=said.torrent)
    address, sequence = data.draw(strategies.addresses("n")), data.draw(st.integers(1, (1 << 53) - 1))
    keys = tuple(data.draw(st.lists(strategies.seal_keys, max_size=2)))
    node = Peer("n", None, address, sequence, 9, keys, data.draw(st.booleans()), (sequence, 1))
    stored = StoredPage("n", 0, sequence, 9, data.draw(st.binary(max_size=99)))
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.db")
    try:
        ledger.save_model(model)
        ledger.save_peers([node], [stored])
        assert (ledger.models(), ledger.peers(), ledger.pages()) == ([model], [node], [stored])
    finally:
        ledger.close()


def test_only_the_owner_may_read_it(path: Path, ledger: Ledger) -> None:
    ledger.save_model(MODEL)
    files = list(path.parent.iterdir())
    assert path in files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    path.chmod(0o644)
    reopened(ledger, path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_models_are_replaced_and_removed(ledger: Ledger) -> None:
    other = replace(MODEL, identity=replace(MODEL.identity, blake3="ee" * 32), added="2026-11-20T00:00:00Z")
    ledger.save_model(MODEL)
    ledger.save_model(replace(MODEL, name="new", quarantined="its bytes changed"))
    ledger.save_model(other)
    assert ledger.models() == [other, replace(MODEL, name="new", quarantined="its bytes changed")]
    ledger.remove_model(MODEL.identity.blake3)
    ledger.remove_model("unknown")
    assert ledger.models() == [other]
    ledger.replace_models([MODEL])
    assert ledger.models() == [MODEL]
    ledger.replace_models([])
    assert ledger.models() == []


def test_the_mirror_of_the_peers_follows(ledger: Ledger) -> None:
    ledger.save_peers([peer("a", revisions=(1, 2)), peer("b")], [page("a", 0, 1), page("a", 1, 2)])
    assert [p.node for p in ledger.peers()] == ["a", "b"]
    # A newer revision takes the place of the older one, a page that is not named any more goes.
    ledger.save_peers([peer("a", sequence=3, revisions=(3,))], [page("a", 0, 3)])
    assert ledger.pages() == [page("a", 0, 3)]
    assert [p.sequence for p in ledger.peers()] == [3, 1]
    ledger.save_peers([], [page("nobody", 0, 1)], gone=["a", "unknown"])
    assert ledger.pages() == [] and [p.node for p in ledger.peers()] == ["b"]


def test_peers_of_long_ago_go_with_their_pages(ledger: Ledger) -> None:
    ledger.save_peers([peer("a", expires=100), peer("b", expires=200)], [page("a", 0, 1), page("b", 0, 1)])
    ledger.forget_peers(200)
    assert [p.node for p in ledger.peers()] == ["b"] and ledger.pages() == [page("b", 0, 1)]


def test_ended_transfers_are_forgotten_in_time(ledger: Ledger) -> None:
    running = TransferRow("running", "pull", "x", "fetching", "2020-01-01T00:00:00Z")
    ledger.save_transfer(running)
    for i in range(MAX_TRANSFERS + 5):
        time = f"2026-11-21T{i // 60:02}:{i % 60:02}:00Z"
        ledger.save_transfer(TransferRow(f"t{i:04}", "pull", "x", "done", time, time))
    kept = [row.id for row in ledger.transfers()]
    assert kept[:2] == ["running", "t0005"] and len(kept) == MAX_TRANSFERS + 1
    ledger.save_transfer(replace(running, state="failed", finished="2026-11-22T00:00:00Z", error="WHAT: WHY"))
    assert ledger.transfers()[0].error == "WHAT: WHY"


def test_trust_changes(ledger: Ledger) -> None:
    ledger.set_key("k", "trusted", "a")
    ledger.set_key("k", "blocked", "b")
    assert ledger.keys() == [KeyRow("k", "blocked", "b")]
    ledger.remove_key("k")
    ledger.remove_key("k")
    assert ledger.keys() == []
    ledger.pin("n", "one")
    ledger.pin("n", "two")
    assert ledger.pins() == {"n": "two"}


def overwritten(path: Path) -> None:
    path.write_bytes(b"this is no database, but as long as one" * 50)


def torn(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # The first table's root page, its header kept: only a check of the content finds it.
    data[4096 + 8 : 4096 * 4] = b"\xa5" * (4096 * 3 - 8)
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: 4096 * 2 + 100])


@pytest.mark.parametrize("damage", [overwritten, torn, cut])
def test_a_corrupt_database_is_moved_aside(path: Path, damage: Any) -> None:
    ledger = Ledger(path)
    ledger.save_model(MODEL)
    ledger.close()
    damage(path)
    damaged = path.read_bytes()
    path.with_name("ledger.db-wal").write_bytes(b"stale")
    ledger = Ledger(path)
    assert ledger.moved_aside == path.with_name("ledger.db.corrupt-1")
    assert ledger.moved_aside.read_bytes() == damaged
    assert ledger.models() == []
    ledger.save_model(MODEL)
    ledger.close()
    damage(path)
    again = Ledger(path)
    assert again.moved_aside == path.with_name("ledger.db.corrupt-2")
    again.close()


def test_what_is_not_corrupt_is_not_moved(path: Path) -> None:
    path.mkdir()
    with pytest.raises(OSError):
        Ledger(path)
    assert path.is_dir()
    path.rmdir()
    path.write_bytes(b"")
    ledger = Ledger(path)
    assert ledger.moved_aside is None
    ledger.close()


def test_a_locked_database_is_not_moved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger(path).close()
    monkeypatch.setattr("registry.store._BUSY_S", 0.01)
    holder = sqlite3.connect(path)
    holder.execute("pragma locking_mode = exclusive")
    holder.execute("begin exclusive")
    try:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            Ledger(path)
    finally:
        holder.close()
    assert [file.name for file in path.parent.iterdir() if "corrupt" in file.name] == []


def test_a_full_disk_leaves_what_was_there(ledger: Ledger, path: Path) -> None:
    ledger.save_model(MODEL)
    database = ledger._db
    pages = database.execute("pragma page_count").fetchone()[0]
    database.execute(f"pragma max_page_count = {pages + 1}").fetchone()
    many = [replace(MODEL, identity=replace(MODEL.identity, blake3=f"{i:064x}"), name="n" * 100) for i in range(500)]
    with pytest.raises(sqlite3.OperationalError, match="full"):
        ledger.replace_models(many)
    assert ledger.models() == [MODEL]
    database.execute("pragma max_page_count = 100000").fetchone()
    ledger.replace_models(many)
    assert len(ledger.models()) == 500
    again = reopened(ledger, path)
    assert again.moved_aside is None and len(again.models()) == 500
    again.close()


def test_a_migration_that_is_cut_off_leaves_nothing(path: Path) -> None:
    connection = sqlite3.connect(path)
    seen = []

    def refuse_the_last_table(action: int, argument: str | None, *_: str | None) -> int:
        seen.append(argument)
        return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_CREATE_TABLE and argument == "meta" else sqlite3.SQLITE_OK

    connection.set_authorizer(refuse_the_last_table)
    database = Database(connection)
    with pytest.raises(sqlite3.DatabaseError):
        migrations.ledger.apply(database)
    assert "models" in seen
    assert database.table_names() == [migrations.ledger.migrations_table]
    database.close()
    ledger = Ledger(path)
    ledger.save_model(MODEL)
    assert ledger.models() == [MODEL] and ledger.moved_aside is None
    ledger.close()
