"""`publish`: a local file becomes a signed model of this node. One read pass names it; the original is never changed."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from daemon.engine import gguf
from daemon.errors import NotFound, UsageError
from daemon.transfer.identify import Identified, identify
from daemon.transfer.library import Arrival, Library
from daemon.transfer.objects import object_cid
from daemon.transfer.store import Record, Store, disk_errors, stamp_of
from daemon.transfer.transfers import Transfer, utc_now
from registry import envelope, manifest
from registry.errors import Malformed
from registry.records import GgufFacts, Model


class Publisher:
    def __init__(self, store: Store, library: Library, key: Ed25519PrivateKey) -> None:
        self._store = store
        self._library = library
        self._key = key
        self._name_of_key = envelope.key_name(key)

    async def publish(self, transfer: Transfer, path: Path, *, name: str | None, license: str | None, source: str | None) -> Model:
        """Sign, store, pin, seed and announce `path`. Raises `UsageError`, `NotFound`, `NoSpace`, `Unavailable`."""
        shown = checked_name(name if name is not None else path.stem)
        transfer.name = shown
        identified, facts, arrive = await self.identify(transfer, path)
        facts = replace(facts, license=license or facts.license)
        claims = manifest.Manifest(
            identity=identified.identity, name=shown, facts=facts, torrent=object_cid(identified.torrent), source=source, created=utc_now()
        )
        known = self._known(claims)
        if known is not None:
            return known
        signed = envelope.sign(manifest.PAYLOAD_TYPE, manifest.build(claims), self._key)
        model = replace(
            self._library.describe(identified, shown, facts, "published"),
            manifest=object_cid(signed), signed_by=self._name_of_key, source=source,
        )  # fmt: skip
        transfer.state = "storing"
        entered, notes = await self._library.enter(identified, Record(model, signed.decode()), arrive)
        for text in notes:
            transfer.note(text)
        return entered

    async def identify(self, transfer: Transfer, path: Path) -> tuple[Identified, GgufFacts, Arrival]:
        """Check and name a local file, and say how it enters the store; nothing is in the store yet."""
        path = await asyncio.to_thread(_readable_file, path)
        header = await asyncio.to_thread(gguf.inspect, path)
        stamp = await asyncio.to_thread(stamp_of, path)
        transfer.size, transfer.state = stamp[1], "verifying"
        identified = await identify(path, self._progress(transfer))
        return identified, header.facts, partial(self._store.adopt, path, stamp)

    def _progress(self, transfer: Transfer) -> Callable[[int], None]:
        def on_bytes(done: int) -> None:
            transfer.received = done
            transfer.sources["disk"] = done

        return on_bytes

    def _known(self, claims: manifest.Manifest) -> Model | None:
        """The same model published before with the same words: publishing again changes nothing."""
        if not self._library.sound(claims.identity.blake3):
            return None
        model = self._library.find(claims.identity.cid)
        same = (
            model.signed_by == self._name_of_key
            and model.name == claims.name
            and model.facts == claims.facts
            and model.source == claims.source
        )
        return model if same else None


def checked_name(name: str) -> str:
    try:
        return manifest.display_name(name)
    except Malformed as error:
        raise UsageError("name", str(error), "give a plain name with --name") from error


def _readable_file(path: Path) -> Path:
    with disk_errors(path.name):
        try:
            path = path.expanduser().resolve(strict=True)
        except FileNotFoundError:
            raise NotFound(path.name, "no such file", "check the path") from None
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(path.name, "it is no file", "give the .gguf file itself")
        if not os.access(path, os.R_OK):
            raise UsageError(path.name, "it may not be read", "check its permissions")
    return path
