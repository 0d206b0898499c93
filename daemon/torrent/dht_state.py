"""The DHT nodes of the last run in a file, as libtorrent writes them. All of it blocks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import libtorrent as lt

from daemon.home import write_private
from daemon.torrent.bencode import BadBencode, decode

log = logging.getLogger(__name__)

MAX_STATE = 256 << 10  # bytes; libtorrent writes 10 to 20 KiB
_MAX_DEPTH = 4
_MAX_TOKENS = 30_000
_ONLY_DHT: Any = lt.save_state_flags_t.save_dht_state


def read(path: Path | None) -> tuple[Any, bool]:
    """libtorrent's `session_params`, and whether they hold nodes. What is damaged is logged."""
    if path is None:
        return lt.session_params(), False
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_STATE + 1)
        _check(raw)
        return lt.read_session_params(raw, _ONLY_DHT), True
    except FileNotFoundError:
        return lt.session_params(), False
    except (OSError, BadBencode, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        log.warning("%s is damaged (%s); other DHT nodes are looked for", path.name, why)
        return lt.session_params(), False


def save(path: Path, session: Any) -> None:
    """Write the nodes that `session` knows, whole or not at all. Raises `Unavailable`."""
    state = session.session_state(_ONLY_DHT)
    write_private(path, bytes(lt.write_session_params_buf(state, _ONLY_DHT)))


def _check(raw: bytes) -> None:
    if len(raw) > MAX_STATE:
        raise BadBencode(f"it is larger than {MAX_STATE} bytes")
    whole, _ = decode(raw, max_depth=_MAX_DEPTH, max_tokens=_MAX_TOKENS)
    if not isinstance(whole, dict) or not isinstance(whole.get(b"dht state"), dict):
        raise BadBencode("it holds no DHT state")
