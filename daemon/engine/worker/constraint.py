"""Answers that follow a grammar, token by token: the only file that knows llguidance (docs/decisions/0004).

Grammars are compiled in a thread, because the first needs a table of the whole vocabulary (0.3 s for 49,000 tokens, during
which no Python runs) and each is tried in a child process before. What was compiled is kept: programs ask with the same
schema again and again.
"""

from __future__ import annotations

import codecs
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from daemon.engine.codec import MAX_CALLS
from daemon.engine.worker import grammar_check
from daemon.engine.worker.answering import Constraint, Unanswerable
from daemon.engine.worker.grammar import GrammarRefused, Plan
from daemon.engine.worker.sampling import Logits
from daemon.engine.worker.tools import Format, Watch

Ready = LLMatcher  # a grammar, as far as an answer has followed it
Tokenizer = LLTokenizer

_KEPT: Final = 32  # grammars
_PATIENCE: Final = 30.0  # seconds for a check that may use one second of CPU: the machine may be busy
_PLACE: Final = re.compile(r"<|\(|\s*\d*\s*\||\s*\^")  # lines that show a piece of the grammar
_WHERE: Final = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
_LONGEST: Final = 300  # characters of a reason


@dataclass(frozen=True, slots=True)
class Spelling:
    """What llguidance has to know of a vocabulary: the bytes of each token, those that are control tokens, those that end an answer."""

    tokens: list[bytes]
    control: frozenset[int]
    ends: list[int]
    vocabulary: int  # pointer to a llama_vocab
    tokenise: int  # address of llama_tokenize

    def tokenizer(self) -> Tokenizer:
        # A control token never stands for its text: llguidance knows such tokens by the byte 0xff.
        tokens = [b"\xff" + piece if token in self.control else piece for token, piece in enumerate(self.tokens)]
        made: Tokenizer = LLTokenizer.from_llamacpp(  # type: ignore[attr-defined]  # missing in its stubs
            tokens=tokens, vocab_ptr=self.vocabulary, tokenize_fptr=self.tokenise, eos_token=self.ends, slices=None
        )
        return made


class Compiler:
    """Makes grammars ready in a thread of its own, one after the other."""

    def __init__(self, tokenizer: Callable[[], Tokenizer], check: Callable[[str], None], memory: threading.Lock) -> None:
        """`check` comes first and raises `GrammarRefused`; `memory` is held while nothing may limit the memory of this process."""
        self._make_tokenizer = tokenizer
        self._check = check
        self._memory = memory
        self._tokenizer: Tokenizer | None = None
        self._ready: OrderedDict[str, Ready] = OrderedDict()
        self._queue: queue.SimpleQueue[tuple[str, Callable[[], bool], Callable[[Ready | GrammarRefused], None]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, grammar: str, wanted: Callable[[], bool], done: Callable[[Ready | GrammarRefused], None]) -> None:
        """Have `done` called, in the thread, with what `grammar` has become; not when it is not `wanted` any more in its turn."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="grammars", daemon=True)
            self._thread.start()
        self._queue.put((grammar, wanted, done))

    def tokenise(self, text: bytes) -> list[int]:
        """Tokens of `text`, none of them a control token. There must have been a grammar before."""
        assert self._tokenizer is not None
        return list(self._tokenizer.tokenize_bytes(text))

    def compile(self, grammar: str) -> Ready:
        """Raises `GrammarRefused`."""
        if grammar not in self._ready:
            self._ready[grammar] = self._compile(grammar)
            while len(self._ready) > _KEPT:
                self._ready.popitem(last=False)
        self._ready.move_to_end(grammar)
        return self._ready[grammar].deep_copy()

    def _run(self) -> None:
        while True:
            grammar, wanted, done = self._queue.get()
            if not wanted():
                continue
            try:
                found: Ready | GrammarRefused = self.compile(grammar)
            except GrammarRefused as error:
                found = error
            except BaseException as error:  # also Rust's panics: those who wait behind this one must not wait for ever
                found = GrammarRefused(f"it cannot be compiled: {type(error).__name__}")
            done(found)

    def _compile(self, grammar: str) -> Ready:
        text = LLMatcher.grammar_from_lark(grammar)
        self._check(text)
        with self._memory:
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
            matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=grammar_check.limits())
            tried = matcher.deep_copy()
            tried.compute_bitmask()
        _raise_for(matcher)
        if tried.is_stopped() and not tried.is_accepting():
            raise GrammarRefused("nothing can follow it")
        return matcher


def check(grammar: str) -> None:
    """Try `grammar` in a child process. Raises `GrammarRefused` when it is wrong or would take too long."""
    try:
        child = subprocess.run(
            [sys.executable, "-I", os.path.abspath(grammar_check.__file__)],
            input=grammar.encode(), capture_output=True, timeout=_PATIENCE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise GrammarRefused("it is too complex") from None
    if child.returncode:
        raise GrammarRefused("it is too complex")
    verdict = json.loads(child.stdout)
    if verdict["wrong"]:
        raise GrammarRefused(_line(verdict["messages"][0]))


def _raise_for(matcher: Ready) -> None:
    if matcher.is_error():
        raise GrammarRefused(_line(matcher.get_error()))


def _line(message: str) -> str:
    """The reason without where it stands in a grammar that nobody has seen."""
    lines = [line for line in message.splitlines() if line.strip() and not _PLACE.match(line)]
    return ascii(_WHERE.sub("", " ".join(" ".join(lines).split()))[:_LONGEST])[1:-1]


# --- what holds one answer ---


def constrain(
    plan: Plan,
    matcher: Ready,
    style: Format,
    control: Mapping[str, int],
    piece: Callable[[int], bytes],
    tokenise: Callable[[bytes], list[int]],
    thinking: bool,
) -> Constraint:
    """`thinking`: the prompt ends in <think>. `piece` gives the text of the marks in `control` too."""
    if not plan.waits:
        return Follow(matcher)

    def enter(text: bytes) -> list[int]:
        mark = style.head[0]
        return [control[mark], *tokenise(text.removeprefix(mark.encode()))] if mark in control else tokenise(text)

    return Await(matcher, Watch(style, thinking), piece, enter, plan.single)


class Follow:
    """An answer that follows its grammar from the first token to the last."""

    def __init__(self, matcher: Ready) -> None:
        self._matcher = matcher

    def active(self) -> bool:
        return True

    def allowed(self, token: int) -> bool:
        return self._matcher.validate_tokens([token]) == 1

    def mask(self, logits: Logits) -> None:
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")[: len(logits)]
        self._raise()
        logits[: len(bits)][bits == 0] = -np.inf
        logits[len(bits) :] = -np.inf

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._raise()

    def forced(self) -> list[int]:
        return [] if self.done() else list(self._matcher.compute_ff_tokens())

    def done(self) -> bool:
        return bool(self._matcher.is_stopped())

    def _raise(self) -> None:
        if self._matcher.is_error():
            raise Unanswerable(f"its grammar cannot be followed further: {_line(self._matcher.get_error())}")


class Await:
    """An answer that is free until a call begins, and again behind it."""

    def __init__(
        self, matcher: Ready, watch: Watch, piece: Callable[[int], bytes], enter: Callable[[bytes], list[int]], single: bool
    ) -> None:
        self._fresh = matcher
        self._watch = watch
        self._piece = piece
        self._enter = enter
        self._left = 1 if single else MAX_CALLS
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside: Follow | None = None

    def active(self) -> bool:
        return self._inside is not None

    def allowed(self, token: int) -> bool:
        return self._inside is None or self._inside.allowed(token)

    def mask(self, logits: Logits) -> None:
        if self._inside is not None:
            self._inside.mask(logits)

    def accept(self, token: int) -> None:
        if self._inside is not None:
            self._inside.accept(token)
            self._leave()
            return
        self._watch.push(self._decoder.decode(self._piece(token)))
        while self._watch.found and not self._begin():
            self._watch.reject(self._watch.held)

    def forced(self) -> list[int]:
        return [] if self._inside is None else self._inside.forced()

    def done(self) -> bool:
        return self._left == 0

    def _begin(self) -> bool:
        """Hand over what has been written of the call; False when it is none."""
        begun = self._watch.held.encode() + self._decoder.getstate()[0]
        tokens = self._enter(begun)
        matcher = self._fresh.deep_copy()
        if matcher.try_consume_tokens(tokens) != len(tokens):
            return False
        self._decoder.reset()
        self._inside = Follow(matcher)
        self._leave()
        return True

    def _leave(self) -> None:
        if self._inside is not None and self._inside.done():
            self._left -= 1
            self._inside = None
            self._watch.again()
