"""A signed manifest as a torrent of its own: small, deterministic, and named by our magnets.

Its file is `<CID of the manifest>.json`, its info dict a pure function of the manifest's bytes, so that
everybody who has the manifest is in one swarm. What comes under such an infohash is whatever somebody made
under it: that it is a manifest in its one form is checked here, who signed it and what it promises by whoever asked.
"""

from __future__ import annotations

from functools import lru_cache

from daemon.errors import UsageError, VerificationError
from daemon.torrent import metainfo
from daemon.torrent.metainfo import Metainfo
from daemon.transfer.objects import object_cid

_KEPT = 1024  # manifests whose torrents are remembered: a few KiB each, and asked for at every `ls`


def file_name(cid: str) -> str:
    """What a manifest is called in its torrent and on disk."""
    return f"{cid}.json"


@lru_cache(_KEPT)
def torrent_of(envelope: str) -> Metainfo:
    """The torrent of a signed manifest. Raises `UsageError` for one that is larger than a manifest may be."""
    data = envelope.encode()
    return metainfo.small_torrent(file_name(object_cid(data)), data)


def checked(data: bytes, infohash: str) -> str:
    """The manifest that came under the v1 infohash of its torrent. Raises `VerificationError` when it is another file."""
    try:
        envelope = data.decode()
        found = torrent_of(envelope).infohash
    except (UnicodeDecodeError, UsageError):
        found = ""
    if found != infohash:
        raise VerificationError(
            "manifest",
            "what came under its infohash is no manifest in its form",
            "check the magnet with whoever gave it",
        )
    return envelope
