"""What can be wrong with bytes or text that came from outside; the daemon maps these to its own errors.

    ValueError
    ├── Malformed          it does not parse, or breaks a ceiling
    ├── Stale              it parses and verifies, but its time is over (or not yet there)
    │   ├── Repeated       it is known already, which is no fault of anybody
    │   └── Misdated       no clock that is right can have dated it
    ├── AmbiguousRef       a code or name that several models share
    └── NotVerified        a signature or digest is wrong
        └── CouldNotCheck  nothing is known to be wrong, but it could not be checked (never treated as right)

The texts say what is wrong in a few words and repeat no more than a short, escaped piece of the input.
"""

from __future__ import annotations


class Malformed(ValueError):
    """The input does not parse or breaks a ceiling."""


class Stale(ValueError):
    """Replayed, older than what is known, expired, or dated by a clock that is off."""


class Repeated(Stale):
    """Known already, or our own: what is said over two ways comes twice."""


class Misdated(Stale):
    """Signed by `node`, and dated so that the clock of one of the two nodes must be off; `long_ago` if in the past."""

    def __init__(self, text: str, node: str, *, long_ago: bool) -> None:
        super().__init__(text)
        self.node = node
        self.long_ago = long_ago


class NotVerified(ValueError):
    """A signature, key or digest is wrong."""


class CouldNotCheck(NotVerified):
    """The check itself was impossible: an unknown algorithm, missing evidence."""


class AmbiguousRef(ValueError):
    """Several models are meant by one code or name; `candidates` are full codes, one for each."""

    def __init__(self, text: str, candidates: tuple[str, ...]) -> None:
        super().__init__(f"{shown(text)} means {len(candidates)} models")
        self.candidates = candidates


def shown(text: str, limit: int = 40) -> str:
    """A short, escaped form of untrusted text for a message: no control characters, no terminal sequences."""
    return ascii(text if len(text) <= limit else text[:limit] + "...")
