"""What one client of the local API may take of this machine, and for how long it may keep it waiting."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web


@dataclass(frozen=True, slots=True)
class Limits:
    """Times are seconds, sizes bytes."""

    connections: int = 256  # at the same time; far from the open files that a process may have
    request_line: int = 8 * 1024
    header: int = 16 * 1024  # one field, name and value; told from `request_line` by its size (see `server.py`)
    headers: int = 64  # fields of a request
    header_s: float = 10.0  # to send a request's header, from the connection or the last answer on
    body_s: float = 10.0  # to send a request's body
    unread: int = 16 * 1024  # of an answer that wait here for the client to read on
    unread_s: float = 10.0  # for which it may let them wait
    first_s: float = 15.0  # for which an error of a stream may still become a status
    silence_s: float = 10.0  # of a stream, before a comment fills it


LIMITS = web.AppKey("limits", Limits)
