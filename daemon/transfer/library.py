"""The models of this node: which there are, what each is called, and whether its bytes can still be trusted.

The store's records are the truth; the ledger mirrors them for queries and is filled again from here when it was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from daemon.engine import gguf
from daemon.errors import Ambiguous, NotFound, Refused, SwarmError, UsageError, VerificationError
from daemon.ipfs.interface import IpfsNode
from daemon.ledger import LedgerThread
from daemon.transfer import manifests
from daemon.transfer.identify import Identified, identify
from daemon.transfer.objects import object_cid
from daemon.transfer.seeding import Seeding, pinned_for
from daemon.transfer.store import Record, Stamp, Store
from daemon.transfer.transfers import utc_now
from daemon.trust import TrustBook
from daemon.waiting import KeyLocks, stoppable
from registry import codes, manifest, refs
from registry.errors import Malformed
from registry.records import GgufFacts, Identity, Model, Trust
from registry.store import Ledger

log = logging.getLogger(__name__)

Arrival = Callable[[Record, bytes, threading.Event], Record]  # how a file enters: `Store.adopt`, `accept` or `keep`
_CHANGED = "the file changed on disk since it entered the store"


class Promised(Protocol):
    """A verified manifest: a `Plan` of resolve.py."""

    @property
    def identity(self) -> Identity | None: ...
    @property
    def name(self) -> str: ...
    @property
    def envelope(self) -> str | None: ...
    @property
    def manifest(self) -> str | None: ...
    @property
    def signed_by(self) -> str | None: ...
    @property
    def source(self) -> str | None: ...


class Library:
    def __init__(self, store: Store, ledger: LedgerThread, trust: TrustBook, seeding: Seeding, on_change: Callable[[], None]) -> None:
        self._store = store
        self._ledger = ledger
        self._trust = trust
        self._seeding = seeding
        self._on_change = on_change
        self._records: dict[str, Record] = {}
        self._changing = KeyLocks()  # by blake3: one model enters, is judged or leaves, one at a time

    # -- opening ----------------------------------------------------------------------------------------------------

    async def open(self) -> list[str]:
        """Read the store. Returns the blake3 of files without a whole record or .torrent: give them to `identify_again`."""
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
                continue
            if self._store.stamp(blake3) != record.model.file_stamp and record.model.quarantined is None:
                log.warning("%s changed on disk since it entered the store", blake3)
                record = replace(record, model=replace(record.model, quarantined=_CHANGED))
            records.append(record)
            torrent = self._store.read_torrent(blake3)
            if record.model.quarantined is None and (torrent is None or object_cid(torrent) != record.model.torrent):
                strays.append(blake3)
        return records, strays

    async def identify_again(self, blake3: str) -> None:
        """Find anew what was lost of a file: its .torrent, or all that was known of it, and then it is unsigned.

        What is not what its name says is left aside.
        """
        path = self._store.path(blake3)
        identified = await identify(path)
        if identified.identity.blake3 != blake3:
            log.error("%s in the store is not what its name says; it is left alone and not listed", path.name)
            return
        record = self._records.get(blake3)
        if record is None:
            facts = (await asyncio.to_thread(gguf.inspect, path)).facts
            record = Record(self.describe(identified, self.unsigned_name(identified, facts.name), facts, "pulled"))
        record = replace(record, model=replace(record.model, torrent=object_cid(identified.torrent)))
        async with self._changing(blake3):
            await self._enter(identified, record, self._store.keep)

    def unsigned_name(self, identified: Identified, *names: str | None) -> str:
        """The first of `names` that may be shown and that no publisher is known for: to leave a signature out is no way to its name."""
        for name in names:
            with contextlib.suppress(Malformed):
                if name and self._trust.publisher(shown := manifest.display_name(name)) is None:
                    return shown
        return identified.identity.blake3[:12]

    def describe(self, identified: Identified, name: str, facts: GgufFacts, origin: Literal["published", "pulled"]) -> Model:
        """A model record as of now; signature and source are the caller's to add."""
        return Model(
            identity=identified.identity,
            name=name,
            facts=facts,
            added=utc_now(),
            origin=origin,
            torrent=object_cid(identified.torrent),
        )

    # -- looking ----------------------------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        return sorted((record.model for record in self._records.values()), key=lambda model: (model.name, model.identity.blake3))

    def current(self, model: Model) -> Model:
        """What is known of a model now. Raises `NotFound` when it was removed."""
        record = self._records.get(model.identity.blake3)
        if record is None:
            raise NotFound(model.name, "no such model here", "swarmctl ls lists what is here")
        return record.model

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

    def shared_file(self, cid: str) -> Path | None:
        """The file of a sound model by its CID, to give to whoever asks; None when there is none."""
        for record in self._records.values():
            if record.model.identity.cid == cid and record.model.quarantined is None:
                return self.path(record.model)
        return None

    def manifest_infohash(self, cid: str | None) -> str | None:
        """The v1 infohash of the torrent of a manifest that is here, by the manifest's CID; None when it is not."""
        for record in self._records.values():
            if cid is not None and record.envelope is not None and record.model.manifest == cid:
                return manifests.torrent_of(record.envelope).infohash
        return None

    def usable(self, model: Model) -> Path:
        """The model's file, or `Refused` when it is quarantined or its publisher is."""
        if model.quarantined is not None:
            raise Refused(model.name, model.quarantined, f"swarmctl rm {model.identity.cid} and pull it again")
        self._trust.require(model.signed_by, model.name)
        return self.path(model)

    # -- changing ---------------------------------------------------------------------------------------------------

    async def enter(self, identified: Identified, record: Record, arrive: Arrival) -> tuple[Model, list[str]]:
        """Make an identified file a model of this node: placed by `arrive`, recorded, pinned, seeded, announced.

        Returns the model and notes for people (for instance that IPFS is away and the pin will follow). Bytes that are here
        already stay where they are, and a pull changes nothing of what is known of them.
        """
        async with self._changing(identified.identity.blake3):
            if not self.sound(identified.identity.blake3):
                return await self._enter(identified, record, arrive)
            if record.model.origin == "published":
                return await self._enter(identified, record, self._store.keep)
            known = self._records[identified.identity.blake3]
            return known.model, await self._hold(identified, known)

    async def _enter(self, identified: Identified, record: Record, arrive: Arrival) -> tuple[Model, list[str]]:
        record = await stoppable(partial(arrive, record, identified.torrent))
        self._records[identified.identity.blake3] = record
        await self._ledger.call(Ledger.save_model, record.model)
        if record.model.signed_by is not None:
            await self._trust.remember(record.model.signed_by, record.model.name)
        notes = await self._hold(identified, record)
        self._on_change()
        return record.model, notes

    async def sign(self, model: Model, promised: Promised) -> Model:
        """Record the verified manifest of a model that was unsigned until now."""
        blake3 = model.identity.blake3
        if promised.identity != model.identity or promised.envelope is None:
            raise VerificationError(model.name, "its manifest speaks of other bytes")
        async with self._changing(blake3):
            known = self.current(model)
            if known.signed_by is not None or known.quarantined is not None:
                return known
            signed = replace(
                known,
                name=promised.name,
                manifest=promised.manifest,
                signed_by=promised.signed_by,
                source=promised.source,
            )
            record = Record(signed, promised.envelope)
            await asyncio.to_thread(self._store.write_record, record)
            self._records[blake3] = record
            await self._ledger.call(Ledger.save_model, signed)
            if signed.signed_by is not None:
                await self._trust.remember(signed.signed_by, signed.name)
            await self._seeding.hold(record, [])
        self._on_change()
        return signed

    async def keep_pinned(self, node: IpfsNode, *, own: bool, others: Set[str] = frozenset()) -> None:
        """Pin what is here and IPFS has not; where the node is our `own`, unpin what it has and is not here any more.

        `others` are the CIDs that somebody else of this daemon has pinned.
        """
        pins = await node.pins()
        wanted = set(others).union(*(pinned_for(model) for model in self.models()))
        if own:
            # Kubo has pinned a few things of its own, under CIDs of version 0.
            await self._seeding.forget(node, sorted(cid for cid in pins - wanted if cid.startswith("b")))
        for model in self.models():
            if model.quarantined is None and not pinned_for(model) <= pins:
                async with self._changing(model.identity.blake3):
                    if self.sound(model.identity.blake3):
                        await self._seeding.pin(node, self._records[model.identity.blake3])

    async def _hold(self, identified: Identified, record: Record) -> list[str]:
        return await self._seeding.hold(record, [*identified.leaves, *identified.nodes])

    async def remove(self, model: Model) -> None:
        """Forget a model everywhere and delete its file from the store (a hard-linked original stays where it is)."""
        blake3 = model.identity.blake3
        async with self._changing(blake3):
            await self._seeding.release(self.current(model))
            await asyncio.to_thread(self._store.remove, blake3)
            self._records.pop(blake3, None)
            await self._ledger.call(Ledger.remove_model, blake3)
        self._on_change()

    async def check(self, model: Model) -> Model:
        """Rehash a model. Returns it, quarantined if its bytes are no longer the ones that its name promises."""
        blake3 = model.identity.blake3
        stamp = await asyncio.to_thread(self._store.stamp, blake3)
        why: str | None = None
        try:
            if (await identify(self.path(model))).identity != model.identity:
                why = "its bytes changed on disk"
        except SwarmError as error:
            why = error.why
        return await self._judge(model, why, stamp)

    async def notice_changes(self) -> None:
        """Quarantine what was changed on disk: a look at inode, size and time of every file, at no byte of them."""
        for model in self.models():
            stamp = await asyncio.to_thread(self._store.stamp, model.identity.blake3)
            known = self._records.get(model.identity.blake3)
            if known is not None and known.model == model and model.quarantined is None and stamp != model.file_stamp:
                log.warning("%s changed on disk since it entered the store", model.identity.blake3)
                with contextlib.suppress(NotFound):  # it is just being removed
                    await self._judge(model, _CHANGED, stamp)

    async def _judge(self, model: Model, why: str | None, stamp: Stamp | None) -> Model:
        """Quarantine a model, or take it out of quarantine (`why` is None): its bytes were found right when its stamp was `stamp`."""
        blake3 = model.identity.blake3
        async with self._changing(blake3):
            known = self.current(model)
            if known.file_stamp != model.file_stamp:
                return known  # other bytes came in meanwhile
            judged = replace(known, quarantined=why, file_stamp=stamp if why is None and stamp else known.file_stamp)
            if judged == known:
                return judged
            record = replace(self._records[blake3], model=judged)
            await asyncio.to_thread(self._store.write_record, record)
            self._records[blake3] = record
            await self._ledger.call(Ledger.save_model, judged)
            if why is None:
                await self._seeding.hold(record, [])
            else:
                await self._seeding.release(judged)
        self._on_change()
        return judged


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
