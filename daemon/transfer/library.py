"""The models of this node: which there are, what each is called, and whether its bytes can still be trusted.

The store's records are the truth; the ledger mirrors them for queries and is filled again from here when it was lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from daemon.engine import gguf
from daemon.errors import Ambiguous, NotFound, Refused, SwarmError, UsageError, VerificationError
from daemon.ledger import LedgerThread
from daemon.transfer.identify import Identified, identify
from daemon.transfer.objects import object_cid
from daemon.transfer.seeding import Seeding
from daemon.transfer.store import Record, Store
from daemon.trust import TrustBook
from registry import codes, refs
from registry.errors import Malformed
from registry.records import GgufFacts, Model, Trust
from registry.store import Ledger

log = logging.getLogger(__name__)


class Library:
    def __init__(self, store: Store, ledger: LedgerThread, trust: TrustBook, seeding: Seeding, on_change: Callable[[], None]) -> None:
        self._store = store
        self._ledger = ledger
        self._trust = trust
        self._seeding = seeding
        self._on_change = on_change
        self._records: dict[str, Record] = {}
        self.removing: Callable[[Model], None] = lambda model: None

    # -- opening ----------------------------------------------------------------------------------------------------

    async def open(self) -> list[str]:
        """Read the store. Returns the blake3 of files that have no readable record: give them to `identify_again`."""
        records, strays = await asyncio.to_thread(self._scan)
        self._records = {record.model.identity.blake3: record for record in records}
        await self._ledger.call(Ledger.replace_models, self.models())
        return strays

    def _scan(self) -> tuple[list[Record], list[str]]:
        records: list[Record] = []
        strays: list[str] = []
        for blake3 in self._store.blobs():
            record = self._store.read_record(blake3)
            if record is None:
                strays.append(blake3)
            else:
                records.append(self._with_stamp_checked(record))
        return records, strays

    def _with_stamp_checked(self, record: Record) -> Record:
        model = record.model
        if model.quarantined is None and self._store.stamp(model.identity.blake3) != model.file_stamp:
            log.warning("%s changed on disk since it entered the store", model.identity.blake3)
            return replace(record, model=replace(model, quarantined="the file changed on disk since it entered the store"))
        return record

    async def identify_again(self, blake3: str) -> None:
        """Adopt a file whose record is gone or unreadable, as unsigned; what is not what its name says is left aside."""
        path = self._store.path(blake3)
        identified = await identify(path)
        if identified.identity.blake3 != blake3:
            log.error("%s in the store is not what its name says; it is left alone and not listed", path.name)
            return
        facts = await asyncio.to_thread(gguf.inspect, path)
        await self.enter(identified, Record(self.describe(identified, facts.facts.name or blake3[:12], facts.facts, "pulled")))

    def describe(self, identified: Identified, name: str, facts: GgufFacts, origin: str) -> Model:
        """A model record as of now; signature and source are the caller's to add."""
        return Model(
            identity=identified.identity,
            name=name,
            facts=facts,
            added=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            origin="published" if origin == "published" else "pulled",
            torrent=object_cid(identified.torrent),
        )

    # -- looking ----------------------------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        return sorted((record.model for record in self._records.values()), key=lambda model: (model.name, model.identity.blake3))

    def record(self, model: Model) -> Record:
        return self._records[model.identity.blake3]

    def records(self) -> list[Record]:
        return list(self._records.values())

    def sound(self, blake3: str) -> bool:
        """Whether these bytes are here and nothing is known against them."""
        return blake3 in self._records and self._records[blake3].model.quarantined is None

    def path(self, model: Model) -> Path:
        return self._store.path(model.identity.blake3)

    def trust(self, model: Model) -> Trust:
        return self._trust.decide(model.signed_by, model.name)

    def find(self, text: str) -> Model:
        """The one model that a code, CID, infohash, blake3, magnet or name means. Raises `NotFound`, `Ambiguous`, `UsageError`."""
        found = self.matches(text)
        if not found:
            raise NotFound(text, "no such model here", "swarmctl ls lists what is here, swarmctl models what others have")
        if len(found) > 1:
            told = codes.told_apart([codes.code_of_infohash_v2(model.identity.infohash_v2) for model in found])
            listing = ", ".join(f"{code} {model.name}" for code, model in zip(told, found, strict=True))
            raise Ambiguous(text, f"means {len(found)} models: {listing}", "use a longer code or the CID")
        return found[0]

    def matches(self, text: str) -> list[Model]:
        try:
            ref = refs.parse_ref(text)
        except Malformed as error:
            raise UsageError(text, str(error), "use a code, a CID, a magnet or a name") from error
        return [model for model in self.models() if _means(ref, model)]

    async def small_object(self, cid: str) -> bytes | None:
        """A manifest or .torrent of this node by its CID, for whoever cannot get it from IPFS."""
        for record in self._records.values():
            if record.envelope is not None and record.model.manifest == cid:
                return record.envelope.encode()
            if record.model.torrent == cid:
                return await asyncio.to_thread(self._store.read_torrent, record.model.identity.blake3)
        return None

    def usable(self, model: Model) -> Path:
        """The model's file, or `Refused` when it is quarantined or its publisher is."""
        if model.quarantined is not None:
            raise Refused(model.name, model.quarantined, f"swarmctl rm {model.identity.cid} and pull it again")
        self._trust.require(model.signed_by, model.name)
        return self.path(model)

    # -- changing ---------------------------------------------------------------------------------------------------

    async def enter(self, identified: Identified, record: Record, on_bytes: Callable[[int], None] | None = None) -> tuple[Model, list[str]]:
        """Make a file that has its place in the store a model of this node: recorded, pinned, seeded, announced.

        Returns the model and notes for people (for instance that IPFS is away and the pin will follow).
        """
        blake3 = identified.identity.blake3
        stamp = await asyncio.to_thread(self._store.stamp, blake3)
        if stamp is None:
            raise VerificationError(record.model.name, "its file left the store while it entered", "try again")
        record = replace(record, model=replace(record.model, file_stamp=stamp))
        await asyncio.to_thread(self._store.write_torrent, blake3, identified.torrent)
        await asyncio.to_thread(self._store.write_record, record)
        self._records[blake3] = record
        await self._ledger.call(Ledger.save_model, record.model)
        if record.model.signed_by is not None:
            await self._trust.remember(record.model.signed_by, record.model.name)
        notes = await self._seeding.hold(record, [*identified.leaves, *identified.nodes], on_bytes)
        self._on_change()
        return record.model, notes

    async def remove(self, model: Model) -> None:
        """Forget a model everywhere and delete its file from the store (a hard-linked original stays where it is)."""
        blake3 = model.identity.blake3
        if blake3 not in self._records:
            raise NotFound(model.name, "no such model here", "swarmctl ls lists what is here")
        self.removing(model)
        await self._seeding.release(model)
        await asyncio.to_thread(self._store.remove, blake3)
        self._records.pop(blake3, None)
        await self._ledger.call(Ledger.remove_model, blake3)
        self._on_change()

    async def check(self, model: Model, on_bytes: Callable[[int], None] | None = None) -> Model:
        """Rehash a model. Returns it, quarantined if its bytes are no longer the ones that its name promises."""
        why: str | None = None
        try:
            identified = await identify(self.path(model), on_bytes)
            if identified.identity != model.identity:
                why = "its bytes changed on disk"
        except SwarmError as error:
            why = error.why
        except OSError:
            why = "its file is missing"
        if why is None and model.quarantined is None:
            return model
        if why is None:
            stamp = await asyncio.to_thread(self._store.stamp, model.identity.blake3)
            return await self._update(replace(model, quarantined=None, file_stamp=stamp or model.file_stamp))
        await self._seeding.release(model)
        return await self._update(replace(model, quarantined=why))

    async def _update(self, model: Model) -> Model:
        record = replace(self._records[model.identity.blake3], model=model)
        await asyncio.to_thread(self._store.write_record, record)
        self._records[model.identity.blake3] = record
        await self._ledger.call(Ledger.save_model, model)
        if model.quarantined is None:
            await self._seeding.hold(record, [], None)
        self._on_change()
        return model


def _means(ref: refs.Ref, model: Model) -> bool:
    identity = model.identity
    match ref:
        case refs.CodeRef(code=code, name=name):
            own = codes.codes_of(identity.cid, identity.infohash_v2)
            return any(full.startswith(code) for full in own) or model.name == name
        case refs.CidRef(cid=wanted):
            return wanted in (identity.cid, model.manifest, model.torrent)
        case refs.MagnetRef(infohash=v1, infohash_v2=v2):
            return identity.infohash == v1 or identity.infohash_v2 == v2
        case refs.NameRef(name=name):
            digests = (identity.blake3, identity.sha256, identity.infohash, identity.infohash_v2)
            return name == model.name or name.lower() in digests
        case _:
            return False
