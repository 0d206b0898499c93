"""The model store on disk: `models/<blake3>.gguf` with its record `models/<blake3>.json`, and `torrents/<blake3>.torrent`.

`torrents/<CID>.json` are signed manifests, for BitTorrent to seed: copies of what stands in the records, made again when lost.

A model is in the store when its file is: the file comes last, by one rename, and goes first. A crash in between leaves a record
that nobody reads, never a file of which nothing is known. Everything that the ledger says about models can be told again from
here. All functions block; call them in a thread.

How a file enters: reflink where the filesystem can, else a hard link, else a copy. The original is never changed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from daemon.errors import NoSpace, Unavailable, VerificationError
from daemon.waiting import Stopped
from registry.records import GgufFacts, Identity, Model

Stamp = tuple[int, int, int]  # inode, size and mtime (ns): a change of any of them means that the bytes cannot be trusted

_FICLONE = 0x40049409  # linux/fs.h; the same on x86-64 and aarch64
_COPY_CHUNK = 8 << 20
_RECORD_LIMIT = 256 << 10  # bytes; a record with its manifest is about 3 KiB
_SPARE = 64 << 20  # bytes of disk that no download may take
_PARTIAL_S = 30 * 24 * 3600  # what an unfinished download has is kept so long after its last byte
_NEW = ".new-"  # begins the name of what is still being made


@dataclass(frozen=True, slots=True)
class Record:
    """What stands beside a model's file: the model, and its signed manifest (DSSE JSON) where there is one."""

    model: Model
    envelope: str | None = None


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn the operating system's errors about the store into ours, without the path in them."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpace(what, "the disk is full", "free some space and try again; what is there already is kept") from error
        raise Unavailable(what, f"the store cannot be used: {error.strerror or error}", "check the data folder's permissions") from error


class Store:
    def __init__(self, home: Path) -> None:
        self.models = home / "models"
        self.torrents = home / "torrents"
        self.partials = self.models / ".partial"

    def open(self) -> None:
        with disk_errors("data folder"):
            for folder in (self.models, self.torrents, self.partials):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._clean(time.time() - _PARTIAL_S)

    def _clean(self, before: float) -> None:
        """Remove what a crash left half made, and downloads that nobody went on with."""
        for new in [*self.models.glob(_NEW + "*"), *self.torrents.glob(_NEW + "*")]:
            new.unlink()
        for folder in filter(Path.is_dir, self.partials.iterdir()):
            changed = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
            if folder.name.startswith(_NEW) or changed < before:
                shutil.rmtree(folder)

    def path(self, blake3: str) -> Path:
        return self.models / f"{blake3}.gguf"

    def partial(self, key: str) -> Path:
        """A private folder for one unfinished download. `key` is a digest or a CID, never a name."""
        if not key.isalnum():
            raise ValueError(f"not a digest: {key!r}")
        folder = self.partials / key
        with disk_errors("download"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def discard(self, key: str) -> None:
        shutil.rmtree(self.partials / key, ignore_errors=True)

    def require_space(self, size: int, what: str) -> None:
        with disk_errors(what):
            free = shutil.disk_usage(self.models).free
        if free < size + _SPARE:
            raise NoSpace(what, f"needs {size} bytes and {max(free - _SPARE, 0)} are free", "free some space and try again")

    # -- how a file enters ------------------------------------------------------------------------------------------

    def adopt(self, original: Path, stamp: Stamp, record: Record, torrent: bytes, stop: threading.Event) -> Record:
        """Give `original` its place in the store without changing it. Raises `NoSpace`, `Unavailable`, and `VerificationError`
        when it is no longer the file of `stamp`."""
        with disk_errors(original.name), tempfile.TemporaryDirectory(dir=self.partials, prefix=_NEW) as folder:
            temporary = Path(folder) / "model.gguf"
            _clone(original, temporary) or _link(original, temporary) or self._copy(original, temporary, stop)
            if stamp_of(original) != stamp:
                raise VerificationError(original.name, "the file changed while it was read", "publish it again when nobody writes to it")
            return self._place(temporary, record, torrent)

    def accept(self, partial: Path, record: Record, torrent: bytes, stop: threading.Event) -> Record:
        """Move a verified download to its place."""
        with disk_errors("download"):
            _sync_file(partial)
            partial.chmod(0o444)
            return self._place(partial, record, torrent)

    def keep(self, record: Record, torrent: bytes, stop: threading.Event) -> Record:
        """A new record for a file that is in its place already."""
        with disk_errors("model"):
            return self._describe(self.path(record.model.identity.blake3), record, torrent)

    def _place(self, temporary: Path, record: Record, torrent: bytes) -> Record:
        record = self._describe(temporary, record, torrent)
        temporary.replace(self.path(record.model.identity.blake3))
        _sync_folder(self.models)
        return record

    def _describe(self, file: Path, record: Record, torrent: bytes) -> Record:
        record = replace(record, model=replace(record.model, file_stamp=stamp_of(file)))
        _write_atomically(self.torrents / f"{record.model.identity.blake3}.torrent", torrent)
        self.write_record(record)
        return record

    def _copy(self, original: Path, target: Path, stop: threading.Event) -> bool:
        self.require_space(original.stat().st_size, original.name)
        with original.open("rb") as source, target.open("wb") as copy:
            while chunk := source.read(_COPY_CHUNK):
                copy.write(chunk)
                if stop.is_set():
                    raise Stopped
        _sync_file(target)
        target.chmod(0o444)
        return True

    # -- records ----------------------------------------------------------------------------------------------------

    def read_torrent(self, blake3: str) -> bytes | None:
        try:
            return (self.torrents / f"{blake3}.torrent").read_bytes()
        except OSError:
            return None

    def clean_manifests(self, kept: Set[str]) -> None:
        """Remove the files of manifests but those with a name in `kept`."""
        with disk_errors("manifest"):
            for path in self.torrents.glob("*.json"):
                if path.name not in kept:
                    path.unlink()

    def write_record(self, record: Record) -> None:
        document = {"model": asdict(record.model), "envelope": record.envelope}
        _write_atomically(self.models / f"{record.model.identity.blake3}.json", json.dumps(document, indent=1).encode())

    def read_record(self, blake3: str) -> Record | None:
        """None when there is no record or it cannot be read; the file must then be identified anew."""
        try:
            with (self.models / f"{blake3}.json").open("rb") as file:
                document = json.loads(file.read(_RECORD_LIMIT))
            fields = dict(document["model"])
            fields["identity"] = Identity(**fields["identity"])
            fields["facts"] = GgufFacts(**fields["facts"])
            fields["file_stamp"] = tuple(fields["file_stamp"])
            model = Model(**fields)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if model.identity.blake3 != blake3:
            return None
        return Record(model, document.get("envelope"))

    def blobs(self) -> list[str]:
        """The blake3 of every model file in the store, as their names say."""
        return sorted(path.stem for path in self.models.glob("*.gguf") if len(path.stem) == 64)

    def stamp(self, blake3: str) -> Stamp | None:
        """The stamp of a model's file; None when it is not there."""
        try:
            return stamp_of(self.path(blake3))
        except OSError:
            return None

    def remove(self, blake3: str) -> None:
        with disk_errors("model"):
            for path in (self.path(blake3), self.models / f"{blake3}.json", self.torrents / f"{blake3}.torrent"):
                path.unlink(missing_ok=True)


def stamp_of(path: Path) -> Stamp:
    status = path.stat()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _clone(original: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        with original.open("rb") as source, target.open("wb") as clone:
            fcntl.ioctl(clone.fileno(), _FICLONE, source.fileno())
    except OSError:  # the filesystem cannot, or it is another one: a hard link is tried next
        target.unlink(missing_ok=True)
        return False
    target.chmod(0o444)
    return True


def _link(original: Path, target: Path) -> bool:
    try:
        os.link(original, target)
    except OSError:  # another filesystem, or the kernel protects the file: a copy is made next
        return False
    return True


def _write_atomically(path: Path, data: bytes) -> None:
    with disk_errors(path.suffix.lstrip(".")):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_NEW)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
