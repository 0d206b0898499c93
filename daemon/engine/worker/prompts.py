"""From requests to the tokens that the model reads. What cannot fit is refused before any work is done on it."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from daemon.engine.interface import ChatRequest, CompletionRequest, EmbeddingRequest, Request
from daemon.engine.protocol import MAX_FRAME
from daemon.engine.worker.isolation import TimedOut, limited
from daemon.engine.worker.template import ChatTemplate, TemplateFailure, split
from daemon.engine.worker.tools import THINK, THOUGHT

if TYPE_CHECKING:
    from daemon.engine.worker.llama import Llama

TEMPLATE_SECONDS: Final = 2.0
TEMPLATE_MEMORY: Final = 256 << 20  # bytes
_LONGEST_TOKEN: Final = 64  # characters; what is longer than this times the context cannot fit it
_MOST_VECTORS: Final = MAX_FRAME // 2  # bytes, which base64 makes a third more
_SHORTEN: Final = "shorten it or serve with more context"
_SPLIT: Final = "split it or serve with a larger batch"


class Refused(Exception):
    """This request cannot be answered: an error of daemon/errors.py by name, then what, why, hint."""


class Prompts:
    """Tokens for one loaded model. Everything here raises `Refused`."""

    def __init__(self, llama: Llama, template: ChatTemplate, memory: threading.Lock) -> None:
        """`memory` is held while a template may use only so much: no other thread must need any then."""
        self._llama = llama
        self._memory = memory
        self._template = template
        self._special = llama.special()
        self._control = llama.control_texts()

    def read(self, request: Request) -> list[int]:
        """The prompt, with room for one token of an answer at least."""
        match request:
            case ChatRequest():
                what, tokens = "the conversation", self._conversation(request)
            case CompletionRequest(prompt=prompt):
                what, tokens = "the prompt", self._text(prompt) if isinstance(prompt, str) else self._given("the prompt", prompt)
        if not tokens:
            raise Refused("UsageError", what, "it is empty", "say something")
        if len(tokens) >= self._llama.context:
            why = f"it has {len(tokens)} tokens and the context {self._llama.context}"
            raise Refused("ContextOverflow", what, why, _SHORTEN)
        return tokens

    def check(self, what: str, tokens: Sequence[int]) -> None:
        """llama.cpp would fail for all that are answered when one asks for a token that there is not."""
        unknown = next((token for token in tokens if not 0 <= token < self._llama.vocabulary), None)
        if unknown is not None:
            why = f"the model has no token {unknown}, only 0 to {self._llama.vocabulary - 1}"
            raise Refused("UsageError", what, why, "use this model's own tokens")

    def thinking(self, tokens: Sequence[int]) -> bool:
        """Whether the answer to this prompt begins inside of a thought."""
        return b"".join(map(self._llama.spell, tokens[-8:])).rstrip().endswith(THINK.encode())

    def _given(self, what: str, tokens: Sequence[int]) -> list[int]:
        self.check(what, tokens)
        return list(tokens)

    def texts(self, request: EmbeddingRequest) -> list[list[int]]:
        """Each as the model was trained to see a whole text."""
        longest, most = self._llama.longest_text, _MOST_VECTORS // (4 * self._llama.width)
        if len(request.inputs) > most:
            raise Refused("UsageError", "the input", f"{len(request.inputs)} texts, {most} are answered at once", "ask in several requests")
        found = []
        for given in request.inputs:
            if isinstance(given, str):
                self._check_length("the input", given, longest, _SPLIT)
                tokens = self._llama.tokenise(given, control=False, whole=True)
            else:
                tokens = self._given("the input", given)
            if not tokens:
                raise Refused("UsageError", "the input", "a text is empty", "leave it out")
            if len(tokens) > longest:
                why = f"a text has {len(tokens)} tokens, {longest} can be embedded at once"
                raise Refused("ContextOverflow", "the input", why, _SPLIT)
            found.append(tokens)
        return found

    def _text(self, text: str) -> list[int]:
        self._check_length("the prompt", text, self._llama.context)
        return [*self._begin(text), *self._llama.tokenise(text, control=True)]

    def _conversation(self, request: ChatRequest) -> list[int]:
        told = "".join(message["content"] for message in request.messages if isinstance(message.get("content"), str))
        self._check_length("the conversation", told, self._llama.context)
        try:
            with self._memory, limited(TEMPLATE_SECONDS, TEMPLATE_MEMORY):
                offered = () if request.tool_choice == "none" else request.tools
                prompt = self._template.render(request.messages, self._special, self._control, offered)
        except TemplateFailure as error:
            why, hint = str(error), "change the conversation or use another model"
            raise Refused("UsageError", "the model's chat template", why, hint) from None
        except TimedOut:
            why = f"it ran for more than {TEMPLATE_SECONDS:g} s"
            raise Refused("UsageError", "the model's chat template", why, "use another model") from None
        if request.schema is not None or request.tool_choice == "required":
            # The grammar begins with the answer: a thought that the template has begun ends before it.
            prompt = re.sub(rf"{THINK}\s*$", f"{THINK}\n\n{THOUGHT}\n\n", prompt)
        self._check_length("the conversation", prompt, self._llama.context)
        tokens = self._begin(prompt)
        for text, control in split(prompt):
            if text:
                tokens += self._llama.tokenise(text, control)
        return tokens

    def _begin(self, text: str) -> list[int]:
        """The token that every prompt begins with, where the model wants one and `text` does not bring it."""
        first, begin = self._llama.first_token(), self._special["bos_token"]
        return [] if first is None or (begin and text.startswith(begin)) else [first]

    def _check_length(self, what: str, text: str, tokens: int, hint: str = _SHORTEN) -> None:
        """Not even tokenised: it would take long, and cannot fit."""
        if len(text) > _LONGEST_TOKEN * tokens:
            raise Refused("ContextOverflow", what, f"it cannot fit {tokens} tokens", hint)
