"""Tries a grammar in a process of its own: `python daemon/engine/worker/grammar_check.py`, the grammar on stdin, a verdict on stdout.

llguidance bounds most of what it does, but a few schemas - a dozen patterns that must all hold - keep it busy for hours, and
nothing can interrupt it. Here the kernel does. What passes is compiled again in the worker, and takes no longer there.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Final

from llguidance import LLMatcher, LLParserLimits

SECONDS: Final = 1  # of CPU; the largest schema that a request can hold takes half of it
_MEMORY: Final = 1 << 30  # bytes of address space
_STATES: Final = 20_000  # of the lexer, about 2 kB each
_ROW: Final = 20_000  # four for each property that may be left out; 2,000 by default


def limits() -> LLParserLimits:
    """Less memory for the lexer than by default, room for all properties that a request can hold, and errors without all state."""
    return LLParserLimits(max_lexer_states=_STATES, max_items_in_row=_ROW, verbose_errors=False)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    wrong, messages = LLMatcher.validate_grammar_with_warnings(sys.stdin.read(), None, limits=limits())
    json.dump({"wrong": wrong, "messages": messages}, sys.stdout)


if __name__ == "__main__":
    main()
