"""What a loaded model needs to call tools and to follow schemas: the marks of its format, grammars, and parsers of its answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from daemon.engine.interface import ChatRequest, Delta, FinishReason, TokenLogprob, Usage
from daemon.engine.worker.grammar import GrammarRefused, Plan, plan
from daemon.engine.worker.prompts import Refused
from daemon.engine.worker.toolparse import ToolParser
from daemon.engine.worker.tools import THINK, THOUGHT, Format

if TYPE_CHECKING:
    from daemon.engine.worker.answering import Constraint
    from daemon.engine.worker.constraint import Ready, Tokenizer
    from daemon.engine.worker.llama import Llama

_HINT: Final = "change the schema"
Found = Callable[["Ready | GrammarRefused"], None]


class Guide:
    """One for each worker. What raises raises `Refused`."""

    def __init__(self, llama: Llama, style: Format, memory: threading.Lock) -> None:
        """`memory`: see `Compiler`."""
        from daemon.engine.worker.constraint import Compiler, Spelling, check  # see Worker.__init__

        def tokenizer() -> Tokenizer:
            every = range(llama.vocabulary)
            control = frozenset(token for token in every if llama.controls(token))
            ends = [token for token in every if llama.ends(token)]
            return Spelling([llama.spell(token) for token in every], control, ends, *llama.native_tokeniser()).tokenizer()

        self._llama = llama
        self._style = style
        self._compiler = Compiler(tokenizer, check, memory)
        self._control: dict[str, int] = {}
        for mark in {*style.head, *style.middle, *style.tail, *style.more, *style.end, THINK, THOUGHT}:
            tokens = llama.tokenise(mark, control=True)
            if len(tokens) == 1 and llama.controls(tokens[0]):
                self._control[mark] = tokens[0]
        self.marks = {token: mark.encode() for mark, token in self._control.items()}

    def plan(self, request: ChatRequest) -> Plan | None:
        try:
            return plan(request, self._style, self._control)
        except GrammarRefused as error:
            raise self.refused("tools" if request.schema is None else "response_format", error) from None

    def refused(self, what: str, error: GrammarRefused) -> Refused:
        return Refused("UsageError", what, str(error), _HINT)

    def compile(self, plan: Plan, wanted: Callable[[], bool], found: Found) -> None:
        """Have `found` called, in another thread, with the grammar of `plan`. `wanted` is asked there too."""
        self._compiler.start(plan.grammar, wanted, found)

    def constraint(self, plan: Plan, matcher: Ready, thinking: bool) -> Constraint:
        from daemon.engine.worker.constraint import constrain

        return constrain(plan, matcher, self._style, self._control, self._piece, self._compiler.tokenise, thinking)

    def parser(self, request: ChatRequest, thinking: bool) -> ToolParser | None:
        """None where no tools are offered: then nothing is a call."""
        if not request.tools or request.tool_choice == "none":
            return None
        names = [tool.name for tool in request.tools]
        return ToolParser(self._style, names, thinking, only=request.tool_choice == "required")

    def _piece(self, token: int) -> bytes:
        return self.marks.get(token) or self._llama.piece(token)


class Told:
    """What an answer says, as deltas: with a parser, calls of tools apart from text."""

    def __init__(self, tell: Callable[[Delta], None], parser: ToolParser | None) -> None:
        self._tell = tell
        self._parser = parser

    def text(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> None:
        delta = Delta(text) if self._parser is None else self._parser.push(text)
        if delta.text or delta.tool_calls or logprobs:
            self._tell(replace(delta, logprobs=logprobs))

    def end(self, finish: FinishReason, usage: Usage) -> None:
        called = False
        if self._parser is not None:
            rest = self._parser.finish()
            called = self._parser.calls > 0
            if rest.text or rest.tool_calls:
                self._tell(rest)
        self._tell(Delta(finish="tool_calls" if called and finish == "stop" else finish, usage=usage))
