"""One answer while it is made: which tokens it takes, what of them may be shown, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from daemon.engine.interface import TokenLogprob, Usage
from daemon.engine.worker.lookup import Lookup
from daemon.engine.worker.sampling import Logits, NothingToDraw, Sampler, logprob
from daemon.engine.worker.text import AnswerText, Shown

Finish = Literal["stop", "length"]


class Unanswerable(Exception):
    """This answer cannot go on, though others can. The text is one line for whoever asked."""


class Constraint(Protocol):
    """Which tokens an answer may take, because it follows a grammar. Raises `Unanswerable` when it cannot tell."""

    def active(self) -> bool:
        """False: whatever is drawn is allowed, as before a tool call begins."""
        ...

    def allowed(self, token: int) -> bool:
        """A cheap check of one token, also of one that ends the answer."""
        ...

    def mask(self, logits: Logits) -> None:
        """Set what is forbidden to minus infinity, in place."""
        ...

    def accept(self, token: int) -> None:
        """`token` was taken; called for each one of the answer, also when not active."""
        ...

    def forced(self) -> list[int]:
        """Tokens that are certain to follow."""
        ...

    def done(self) -> bool:
        """Nothing may follow."""
        ...


class Vocabulary(Protocol):
    context: int

    def piece(self, token: int) -> bytes: ...
    def ends(self, token: int) -> bool: ...


@dataclass(slots=True, eq=False)
class Chat:
    """One request. `tokens` is the prompt and, behind it, the answer so far."""

    id: int
    tokens: list[int]
    prompt: int  # how many of them are the prompt
    limit: int  # answer tokens at most
    sampler: Sampler
    text: AnswerText
    on_text: Callable[[str, tuple[TokenLogprob, ...]], None]
    on_end: Callable[[Finish, Usage], None]
    on_error: Callable[[str], None]
    logprobs: int | None = None  # how many of the likeliest tokens to name; None: none, and not the drawn one either
    constraint: Constraint | None = None
    marks: Mapping[int, bytes] = field(default_factory=dict)  # control tokens whose text is part of the answer
    cached: int | None = None  # tokens of the prompt that were in the KV cache; None: not looked up yet
    lookup: Lookup = field(init=False)

    def __post_init__(self) -> None:
        self.lookup = Lookup(self.tokens)

    @property
    def answered(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt, self.answered, self.cached or 0)

    def advance(self, logits: Logits, vocabulary: Vocabulary) -> Finish | None:
        """Take the token that follows, and those that are certain after it; how the answer ended, if it did.

        Raises `Unanswerable`.
        """
        token = self._pick(logits)
        if vocabulary.ends(token):
            return "stop"
        said = None if self.logprobs is None else logprob(logits, token, self.logprobs, vocabulary.piece)
        finish = self._take(token, said, vocabulary)
        # With logprobs each token needs its own logits, so it is drawn like any other: only one is allowed then.
        while finish is None and self.constraint is not None and self.logprobs is None and (forced := self.constraint.forced()):
            for token in forced:
                finish = finish or ("stop" if vocabulary.ends(token) else self._take(token, None, vocabulary))
        return finish

    def finish(self) -> Shown:
        """What was held back."""
        return self.text.finish()

    def _pick(self, logits: Logits) -> int:
        try:
            token = self.sampler.draw(logits)
            # To ask about one token is much cheaper than to mask all of them, and most that are drawn are allowed.
            if self.constraint is not None and self.constraint.active() and not self.constraint.allowed(token):
                masked = logits.copy()
                self.constraint.mask(masked)
                token = self.sampler.draw(masked)
        except NothingToDraw:
            raise Unanswerable("no token may follow, or the model computes no numbers") from None
        return token

    def _take(self, token: int, said: TokenLogprob | None, vocabulary: Vocabulary) -> Finish | None:
        self.tokens.append(token)
        self.sampler.accept(token)
        if self.constraint is not None:
            self.constraint.accept(token)
        text, logprobs = self.text.push(self.marks.get(token) or vocabulary.piece(token), said)
        if text or logprobs:
            self.on_text(text, logprobs)
        if self.text.stopped or (self.constraint is not None and self.constraint.done()):
            return "stop"
        return "length" if self.answered >= self.limit or len(self.tokens) >= vocabulary.context else None


def common(first: Sequence[int], second: Sequence[int], most: int) -> int:
    """Length of the longest common prefix, at most `most`."""
    end = min(len(first), len(second), most)
    if first[:end] == second[:end]:
        return end
    return next(i for i in range(end) if first[i] != second[i])
