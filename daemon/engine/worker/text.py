"""From the bytes of tokens to text that may be shown: whole characters only, and nothing that could begin a stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence

from daemon.engine.interface import TokenLogprob

Shown = tuple[str, tuple[TokenLogprob, ...]]  # text, and the logprobs of the tokens that it ends


class AnswerText:
    """Turns token bytes into text. A character or a stop string may lie across any number of tokens."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._shown = 0  # characters
        self._logprobs: deque[tuple[int, int, TokenLogprob]] = deque()  # first and last character + 1 of a token that is not shown yet
        self.stopped = False

    def push(self, piece: bytes, logprob: TokenLogprob | None = None) -> Shown:
        """What is certain after `piece`; sets `stopped` when a stop string is complete (it is left out)."""
        begin = self._shown + len(self._held)
        text = self._decoder.decode(piece)
        if logprob is not None:
            # Bytes that are still in the decoder belong to a character that a later token completes.
            self._logprobs.append((begin, begin + len(text) + bool(self._decoder.getstate()[0]), logprob))
        return self._advance(text)

    def finish(self) -> Shown:
        """What was held back, at the end of an answer. Half a character becomes U+FFFD."""
        text, logprobs = self._advance(self._decoder.decode(b"", final=True))
        text += self._held
        self._held = ""
        rest = () if self.stopped else tuple(one for _, _, one in self._logprobs)
        self._logprobs.clear()
        return text, logprobs + rest

    def _advance(self, text: str) -> Shown:
        if self.stopped:
            return "", ()
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            text = text[: min(found)]
        elif self._stops:
            held = max(overlap(text, stop) for stop in self._stops)
            self._held = text[len(text) - held :]
            text = text[: len(text) - held]
        self._shown += len(text)
        return text, self._ended()

    def _ended(self) -> tuple[TokenLogprob, ...]:
        """The logprobs of tokens whose text is shown to its end or, when a stop string cuts it, at all."""
        if not self._logprobs:
            return ()
        ended = []
        while self._logprobs and (self._logprobs[0][1] <= self._shown or (self.stopped and self._logprobs[0][0] < self._shown)):
            ended.append(self._logprobs.popleft()[2])
        return tuple(ended)


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` are a beginning of `mark`, which is not in it."""
    return next((length for length in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:length])), 0)
