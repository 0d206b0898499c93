"""The shape of the ledger, one function per step. A step and the note that it was taken commit together; none is ever changed."""

from __future__ import annotations

from sqlite_utils import Database, Migrations

ledger = Migrations("swarmctl")


@ledger()
def m001_tables(db: Database) -> None:
    db.table("models").create(
        {
            "blake3": str, "size": int, "sha256": str, "cid": str, "infohash": str, "infohash_v2": str, "name": str, "facts": str,
            "added": str, "origin": str, "manifest": str, "torrent": str, "signed_by": str, "source": str, "quarantined": str,
        },
        pk="blake3",
    )  # fmt: skip
    db.table("files").create({"blake3": str, "inode": str, "size": int, "mtime_ns": int}, pk="blake3")
    db.table("peers").create(
        {"node": str, "peer_id": str, "address": str, "sequence": int, "expires": int, "seal_keys": str}, pk="node"
    )  # fmt: skip
    db.table("offers").create(
        {
            "node": str, "cid": str, "page": int, "expires": int, "infohash": str, "infohash_v2": str, "manifest": str, "name": str,
            "size": int, "serving": int, "free_slots": int, "context_length": int, "seeders": int, "peers": int, "tokens_per_second": float,
        },
        pk=("node", "cid"),
    )  # fmt: skip
    db.table("transfers").create(
        {"id": str, "kind": str, "ref": str, "state": str, "started": str, "finished": str, "error": str}, pk="id"
    )  # fmt: skip
    db.table("trusted_keys").create({"key": str, "state": str, "name": str}, pk="key")
    db.table("pins").create({"name": str, "key": str}, pk="name")
    db.table("meta").create({"key": str, "value": str}, pk="key")
    db.table("peers").create_index(["expires"])
    db.table("offers").create_index(["expires"])


@ledger()
def m002_relays(db: Database) -> None:
    db.table("peers").add_column("relay", int, not_null_default=0)


@ledger()
def m003_pages(db: Database) -> None:
    """Pages are kept as they were signed; what was announced in the old form is announced anew."""
    db.table("offers").drop()
    db.table("peers").add_column("revisions", str, not_null_default="[]")
    db.table("pages").create(
        {"node": str, "page": int, "revision": int, "expires": int, "envelope": bytes}, pk=("node", "page")
    )
