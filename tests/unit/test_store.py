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
from registry.records import Address, GgufFacts, Identity, Model, Offer, Peer, SealKey
from registry.store import MAX_TRANSFERS, KeyRow, Ledger, TransferRow
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


def peer(node: str, *, sequence: int = 1, expires: int = 1000) -> Peer:
    return Peer(node, "12D3", Address(node, ("/ip4/x",), (), ("http://h",)), sequence, expires, (SealKey(3, "ee" * 32, 99),))


def offer(node: str, cid: str, **more: Any) -> Offer:
    return Offer(node, cid, None, "dd" * 32, None, "name", 5, **{"serving": True, "tokens_per_second": 1.5, **more})


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


def cids(ledger: Ledger, now: int = 0) -> list[str]:
    return [offer.cid for offer in ledger.offers(now)]


def test_everything_survives_a_restart(ledger: Ledger, path: Path) -> None:
    ledger.save_model(MODEL)
    ledger.save_peer(peer("a"), 0, [offer("a", "x"), offer("a", "y", serving=False)])
    ledger.save_transfer(TransferRow("1", "pull", "#abc2def", "fetching", "2026-11-21T12:00:00Z"))
    ledger.set_key("k", "trusted", "me")
    ledger.pin("name", "k")
    ledger.set_meta("sequence", "7")
    again = reopened(ledger, path)
    assert again.models() == [MODEL]
    assert again.peers() == [peer("a")]
    assert again.offers(0) == [offer("a", "x"), offer("a", "y", serving=False)]
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
    node = Peer("n", None, address, sequence, 9, tuple(data.draw(st.lists(strategies.seal_keys, max_size=2))))
    offers = data.draw(st.lists(strategies.offers("n"), max_size=3, unique_by=lambda offer: offer.cid))
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.db")
    try:
        ledger.save_model(model)
        ledger.save_peer(node, 0, offers)
        assert (ledger.models(), ledger.peers(), ledger.offers(0)) == ([model], [node], offers)
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


def test_a_page_takes_the_place_of_what_it_said_before(ledger: Ledger) -> None:
    ledger.save_peer(peer("a"), 0, [offer("a", "1"), offer("a", "2")], pages=2)
    ledger.save_peer(peer("a", sequence=2), 1, [offer("a", "3")], pages=2)
    ledger.save_peer(peer("b"), 0, [offer("b", "1")])
    assert sorted(cids(ledger)) == ["1", "1", "2", "3"]
    ledger.save_peer(peer("a", sequence=3), 0, [offer("a", "2"), offer("a", "3")], pages=2)
    assert [o.cid for o in ledger.offers(0) if o.node == "a"] == ["2", "3"]
    ledger.save_peer(peer("a", sequence=4), 0, [offer("a", "2")], pages=1)
    assert [o.cid for o in ledger.offers(0) if o.node == "a"] == ["2"]
    assert [p.sequence for p in ledger.peers()] == [4, 1]


def test_a_page_that_is_gone_takes_its_offers_along(ledger: Ledger) -> None:
    ledger.save_peer(peer("a"), 1, [offer("a", "old")], pages=2)
    ledger.save_peer(peer("a", sequence=2), 0, [offer("a", "new")], pages=1)
    assert cids(ledger) == ["new"]


def test_expired_offers_and_peers_go(ledger: Ledger) -> None:
    ledger.save_peer(peer("a", expires=100), 0, [offer("a", "1")])
    ledger.save_peer(peer("b", expires=200), 0, [offer("b", "2")])
    assert cids(ledger, now=99) == ["1", "2"] and cids(ledger, now=100) == ["2"]
    ledger.forget_peers(200)
    assert [p.node for p in ledger.peers()] == ["b"] and cids(ledger) == ["2"]


def test_the_tables_that_strangers_fill_are_bounded(path: Path) -> None:
    ledger = Ledger(path, max_peers=3, max_offers=4)
    ledger.set_key("friend", "trusted", "")
    ledger.set_key("foe", "blocked", "")
    ledger.save_peer(peer("friend", expires=1), 0, [offer("friend", "x")])
    ledger.save_peer(peer("foe", expires=2), 0, [offer("foe", "x")])
    for i in range(20):
        ledger.save_peer(peer(f"sybil-{i:02}", expires=10 + i), 0, [offer(f"sybil-{i:02}", "x")])
    assert [p.node for p in ledger.peers()] == ["friend", "sybil-18", "sybil-19"]
    assert {o.node for o in ledger.offers(0)} == {"friend", "sybil-18", "sybil-19"}
    for page in range(3):
        ledger.save_peer(peer("friend", sequence=page + 2), page, [offer("friend", f"{page}{i}") for i in range(3)])
    assert [o.cid for o in ledger.offers(0) if o.node == "friend"] == ["00", "01", "02", "10"]
    ledger.close()


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
