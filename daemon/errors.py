"""Everything that can go wrong, grouped by who is at fault.

    SwarmError
    ├── CallerError            whoever asked
    │   ├── UsageError         2  the request does not parse or does not fit
    │   │   └── ContextOverflow   it has more tokens than the model's context
    │   ├── Unauthorized       2  no bearer token, or a wrong one
    │   ├── NotFound           3  nothing has that name
    │   ├── Ambiguous          3  several things have that name
    │   └── Refused            8  trust, quota or block list says no
    ├── PeerError              another node, or bytes from outside
    │   ├── VerificationError  4  the bytes or the signature are wrong, or could not be checked
    │   ├── Unserved           5  nobody could answer or give the bytes
    │   │   └── Unreachable       no way led to the node, so it was asked nothing
    │   │       └── Declined          for its relay's owner does not want to carry this
    │   └── Busy               5  somebody could, but is at its limit
    ├── BackendError           this machine
    │   ├── NoSpace            6  the disk is full
    │   ├── NoMemory           6  the model does not fit
    │   ├── Unavailable        7  the daemon, Kubo or a port is in the way
    │   ├── ModelLoadError     7  llama.cpp could not load the model
    │   │   └── Restarting        its worker died and is about to be started again
    │   └── InferenceError     7  llama.cpp failed in the middle of an answer
    └── Bug                    1  ours

The number is the exit code of the command line and the `code` of the JSON error object.
"""

from __future__ import annotations

from typing import Any, ClassVar


class SwarmError(Exception):
    """What happened, to what, and what to do next: `WHAT: WHY; NEXT STEP`.

    `what`, `why` and `hint` may be shown to whoever asked, so they carry no key, no prompt and,
    where they can reach a peer, no path.
    """

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    openai_code: ClassVar[str | None] = None

    def __init__(self, what: str, why: str, hint: str = "") -> None:
        super().__init__(what, why, hint)
        self.what = what
        self.why = why
        self.hint = hint

    @property
    def message(self) -> str:
        return f"{self.what}: {self.why}"

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def as_json(self) -> dict[str, Any]:
        return {"error": {"code": self.exit_code, "message": self.message, "hint": self.hint}}


class CallerError(SwarmError):
    exit_code, http_status, openai_type = 2, 400, "invalid_request_error"


class UsageError(CallerError):
    pass


class ContextOverflow(UsageError):
    openai_code = "context_length_exceeded"


class Unauthorized(CallerError):
    http_status, openai_type = 401, "authentication_error"


class NotFound(CallerError):
    exit_code, http_status, openai_type = 3, 404, "not_found_error"


class Ambiguous(CallerError):
    exit_code, http_status = 3, 409


class Refused(CallerError):
    exit_code, http_status, openai_type = 8, 403, "permission_error"


class PeerError(SwarmError):
    exit_code, http_status = 5, 502


class VerificationError(PeerError):
    exit_code = 4


class Unserved(PeerError):
    http_status = 503


class Unreachable(Unserved):
    pass


class Declined(Unreachable):
    pass


class Busy(PeerError):
    http_status, openai_type = 429, "rate_limit_error"


class BackendError(SwarmError):
    exit_code, http_status = 7, 503


class NoSpace(BackendError):
    exit_code, http_status = 6, 507


class NoMemory(BackendError):
    exit_code, http_status = 6, 507


class Unavailable(BackendError):
    pass


class ModelLoadError(BackendError):
    http_status = 500


class Restarting(ModelLoadError):
    http_status = 503


class InferenceError(BackendError):
    http_status = 500


class Bug(SwarmError):
    pass
