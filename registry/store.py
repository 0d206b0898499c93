"""The ledger: what this node knows, in one SQLite file that it can lose.

Its truth about models is the store on disk, which can tell everything here again; peers come back by themselves. One thread
owns a `Ledger`. Every method is one transaction: it happens whole or, with a full disk or a kill, not at all. What is known of
other nodes mirrors the table of peers (daemon/gossip/peers.py), whose bounds are its bounds. Rows become records, and records
rows, in this file only.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from sqlite_utils import Database

from registry import migrations
from registry.records import Address, GgufFacts, Identity, Model, Peer, SealKey
from registry.trust import KeyState

MAX_TRANSFERS = 500  # ended ones that are remembered
_BUSY_S = 5.0
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TransferRow:
    """What outlives the daemon of a pull or a publish; times are ISO 8601 in UTC."""

    id: str
    kind: str
    ref: str
    state: str
    started: str
    finished: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StoredPage:
    """A page of another node in its envelope; it lived until `expires` (unix seconds) when it was written down."""

    node: str
    page: int
    revision: int
    expires: int
    envelope: bytes


@dataclass(frozen=True, slots=True)
class KeyRow:
    """The operator's word about a key (`ed25519:<hex>`); `name` is what the operator calls it."""

    key: str
    state: KeyState
    name: str


class Ledger:
    """The database at `path`, made when it is missing, readable by its owner only.

    A file that is no sound database is moved aside, never deleted: `moved_aside` then says where it went. Raises
    `sqlite3.Error` and `OSError` as they come (a locked file, a full disk, no permission).
    """

    def __init__(self, path: Path) -> None:
        self.moved_aside: Path | None = None
        try:
            self._db = _open(path)
        except sqlite3.DatabaseError as error:
            if not _is_corrupt(error):
                raise
            self.moved_aside = _move_aside(path)
            self._db = _open(path)

    def close(self) -> None:
        """Idempotent."""
        self._db.close()

    # -- models -----------------------------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        """All models, the oldest first."""
        rows = self._db.query(
            "select models.*, inode, files.size as file_size, mtime_ns from models join files using (blake3) order by added, blake3"
        )
        return [_model(row) for row in rows]

    def save_model(self, model: Model) -> None:
        """Insert, or replace the one with the same blake3."""
        with self._db.atomic():
            self._write_model(model)

    def remove_model(self, blake3: str) -> None:
        """Unknown models are no error."""
        with self._db.atomic():
            for table in ("models", "files"):
                self._db.table(table).delete_where("blake3 = ?", [blake3])

    def replace_models(self, models: Iterable[Model]) -> None:
        """Make `models` all there are, as after reading the store anew."""
        with self._db.atomic():
            for table in ("models", "files"):
                self._db.table(table).delete_where()
            for model in models:
                self._write_model(model)

    def _write_model(self, model: Model) -> None:
        inode, size, mtime_ns = model.file_stamp
        self._db.table("models").insert(_model_row(model), replace=True)
        self._db.table("files").insert(
            # Inode numbers may need all of 64 bits, one more than SQLite has.
            {"blake3": model.identity.blake3, "inode": str(inode), "size": size, "mtime_ns": mtime_ns},
            replace=True,
        )

    # -- peers and pages --------------------------------------------------------------------------------------------

    def peers(self) -> list[Peer]:
        """All peers, expired ones included: their sequence numbers keep replays out."""
        return [_peer(row) for row in self._db.table("peers").rows_where(order_by="node")]

    def save_peers(
        self,
        peers: Iterable[Peer],
        pages: Iterable[StoredPage],
        *,
        gone: Iterable[str] = (),
        dropped: Iterable[tuple[str, int]] = (),
    ) -> None:
        """Mirror the table of peers: these words and pages are new, those nodes and pages (node, page) have left it.

        Pages of a node whose newest word names fewer pages go; so do pages of nodes that are not known.
        """
        with self._db.atomic():
            for node in gone:
                self._db.table("peers").delete_where("node = ?", [node])
            for node, page in dropped:
                self._db.table("pages").delete_where("node = ? and page = ?", [node, page])
            for peer in peers:
                self._db.table("peers").insert(_peer_row(peer), replace=True)
                self._db.table("pages").delete_where("node = ? and page >= ?", [peer.node, len(peer.revisions)])
            self._db.table("pages").insert_all((asdict(page) for page in pages), replace=True)
            self._db.table("pages").delete_where("node not in (select node from peers)")

    def forget_peers(self, expired_before: int) -> None:
        """Drop peers, with their pages, that expired before that time (unix seconds)."""
        with self._db.atomic():
            self._db.table("peers").delete_where("expires < ?", [expired_before])
            self._db.table("pages").delete_where("node not in (select node from peers)")

    def pages(self) -> list[StoredPage]:
        """The pages of all peers, in order."""
        return [StoredPage(**row) for row in self._db.table("pages").rows_where(order_by="node, page")]

    # -- transfers --------------------------------------------------------------------------------------------------

    def transfers(self) -> list[TransferRow]:
        """The transfers, the oldest first."""
        return [TransferRow(**row) for row in self._db.table("transfers").rows_where(order_by="started, id")]

    def save_transfer(self, transfer: TransferRow) -> None:
        """Insert or replace; beyond `MAX_TRANSFERS` the ones that ended first are forgotten."""
        with self._db.atomic():
            table = self._db.table("transfers")
            table.insert(asdict(transfer), replace=True)
            table.delete_where(
                "id in (select id from transfers where finished is not null order by finished desc, id limit -1 offset ?)", [MAX_TRANSFERS]
            )

    # -- trust ------------------------------------------------------------------------------------------------------

    def keys(self) -> list[KeyRow]:
        return [KeyRow(**row) for row in self._db.table("trusted_keys").rows_where(order_by="key")]

    def set_key(self, key: str, state: KeyState, name: str) -> None:
        self._db.table("trusted_keys").insert({"key": key, "state": state, "name": name}, replace=True)

    def remove_key(self, key: str) -> None:
        """Unknown keys are no error."""
        self._db.table("trusted_keys").delete_where("key = ?", [key])

    def pins(self) -> dict[str, str]:
        """The key that each name is pinned to."""
        return {row["name"]: row["key"] for row in self._db.table("pins").rows}

    def pin(self, name: str, key: str) -> None:
        """Pin `name` to `key`, in the place of any other; whether that may be is decided before."""
        self._db.table("pins").insert({"name": name, "key": key}, replace=True)

    # -- meta -------------------------------------------------------------------------------------------------------

    def get_meta(self, key: str) -> str | None:
        for row in self._db.table("meta").rows_where("key = ?", [key]):
            return cast(str, row["value"])
        return None

    def set_meta(self, key: str, value: str) -> None:
        self._db.table("meta").insert({"key": key, "value": value}, replace=True)


# -- the file -----------------------------------------------------------------------------------------------------------


def _open(path: Path) -> Database:
    """A sound database of today's shape. Raises `sqlite3.DatabaseError` with SQLITE_CORRUPT or SQLITE_NOTADB when it is neither."""
    # SQLite gives the -wal and -shm files the mode of the database.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    os.chmod(path, 0o600)
    db = Database(sqlite3.connect(path, timeout=_BUSY_S), execute_plugins=False)
    try:
        db.enable_wal()
        # At NORMAL a kill loses nothing; a power cut may lose the last moments, never the file.
        db.execute("pragma synchronous = normal")
        # integrity_check reads every index entry: too slow for each start.
        if db.execute("pragma quick_check(1)").fetchone()[0] != "ok":
            raise _Unsound
        migrations.ledger.apply(db)
    except BaseException:
        db.close()
        raise
    return db


class _Unsound(sqlite3.DatabaseError):
    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


def _is_corrupt(error: sqlite3.DatabaseError) -> bool:
    # The primary result code is the low byte of the extended one.
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _CORRUPT


def _move_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        # Left behind, they would be taken for the new database's.
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


# -- rows and records -----------------------------------------------------------------------------------------------------


def _model_row(model: Model) -> Row:
    return {
        **asdict(model.identity),
        "name": model.name,
        "facts": json.dumps(asdict(model.facts)),
        "added": model.added,
        "origin": model.origin,
        "manifest": model.manifest,
        "torrent": model.torrent,
        "signed_by": model.signed_by,
        "source": model.source,
        "quarantined": model.quarantined,
    }


def _model(row: Row) -> Model:
    return Model(
        identity=Identity(**{field: row[field] for field in Identity.__dataclass_fields__}),
        name=row["name"],
        facts=GgufFacts(**json.loads(row["facts"])),
        added=row["added"],
        origin=row["origin"],
        manifest=row["manifest"],
        torrent=row["torrent"],
        signed_by=row["signed_by"],
        source=row["source"],
        file_stamp=(int(row["inode"]), row["file_size"], row["mtime_ns"]),
        quarantined=row["quarantined"],
    )


def _peer_row(peer: Peer) -> Row:
    address = peer.address
    return {
        "node": peer.node,
        "peer_id": peer.peer_id,
        "address": json.dumps(asdict(address)),
        "sequence": peer.sequence,
        "expires": peer.expires,
        "seal_keys": json.dumps([(key.key_id, key.public, key.expires) for key in peer.seal_keys]),
        "relay": int(peer.relay),
        "revisions": json.dumps(peer.revisions),
    }


def _peer(row: Row) -> Peer:
    address = json.loads(row["address"])
    return Peer(
        node=row["node"],
        peer_id=row["peer_id"],
        address=Address(address.pop("node"), **{field: tuple(values) for field, values in address.items()}),
        sequence=row["sequence"],
        expires=row["expires"],
        seal_keys=tuple(SealKey(*key) for key in json.loads(row["seal_keys"])),
        relay=bool(row["relay"]),
        revisions=tuple(json.loads(row["revisions"])),
    )
