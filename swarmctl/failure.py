"""The one way a command fails: a line `WHAT: WHY; NEXT STEP`, and the exit code of the contract."""

from __future__ import annotations

from typing import Any

BUG, USAGE, NOT_FOUND, NOT_VERIFIED, UNSERVED, NO_SPACE, IN_THE_WAY, REFUSED, INTERRUPTED = 1, 2, 3, 4, 5, 6, 7, 8, 130


class Failure(Exception):
    """`message` is `WHAT: WHY`. `printed`: the command has written its JSON document already, and no error object may follow."""

    def __init__(self, code: int, message: str, hint: str = "", *, printed: bool = False) -> None:
        super().__init__(code, message, hint)
        self.code = code
        self.message = message
        self.hint = hint
        self.printed = printed

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def line(self) -> str:
        """As people see it on stderr."""
        from swarmctl.render import safe

        return f"error: {safe(str(self))}"

    def as_json(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message, "hint": self.hint}}

    @classmethod
    def from_json(cls, error: Any) -> Failure:
        """From the `error` object of the daemon; `code` is the exit code there too."""
        if not isinstance(error, dict):
            return cls(BUG, "daemon: an error without a reason", "see logs/daemon.log in the data folder")
        code = error.get("code")
        return cls(code if isinstance(code, int) and 1 <= code <= 8 else BUG, str(error.get("message")), str(error.get("hint") or ""))
