"""`swarmctl chat` with its surroundings: reads lines from a terminal or a pipe, asks the daemon, prints, saves.

Answers go to stdout, everything else to stderr. On a terminal an error is shown and the conversation goes on; from a pipe the first one
ends it. What was typed is kept for the arrow keys while it runs, and never written to disk unless /save is told to.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from swarmctl import answers, conversation, render
from swarmctl.context import Context
from swarmctl.conversation import MAX_TEXT, Conversation, Lines, Message, Order, Say
from swarmctl.failure import IN_THE_WAY, NOT_FOUND, USAGE, Failure

MAX_FILE = 32 * 1024 * 1024  # bytes; 4 MiB of text, each character escaped


class Dialogue:
    """One conversation with one daemon. `limits` go along with every question; `saved` is the file that it came from."""

    def __init__(self, context: Context, held: Conversation, limits: Mapping[str, Any], saved: Path | None) -> None:
        self._context = context
        self._held = held
        self._limits = limits
        self._saved = saved
        self._lines = Lines()
        self._person = not context.json and sys.stdin is not None and sys.stdin.isatty()
        self._answerer: tuple[str | None, ...] = ()
        self._answered_by: str | None = None
        self._usage: dict[str, int] = {}

    def run(self) -> None:
        """Until its end. Raises `Failure` when it does not begin, and from a pipe for the first thing that goes wrong."""
        if self._held.model is not None:
            self._choose(self._held.model)
        if self._person:
            self._with_person()
            return
        for said in self._piped():
            if not self._do(said):
                break
        document = {"model": self._held.model, "answered_by": self._answered_by, "messages": self._held.messages(), "usage": self._usage}
        self._context.show(document, lambda: "")

    # -- where lines come from ------------------------------------------------------------------------------------------

    def _piped(self) -> Iterator[Say | Order]:
        while line := _line():
            if said := self._lines.feed(line.removesuffix("\n")):
                yield said
        if said := self._lines.end():
            yield said

    def _with_person(self) -> None:
        read = _reader()
        self._note("/help says what can be typed, Ctrl-D leaves")
        interrupted = 0
        while True:
            try:
                said = self._lines.feed(read("... " if self._lines.open else "> "))
                interrupted = 0
                if said is not None and not self._do(said):
                    return
            except EOFError:
                _new_line()
                if not self._lines.open:
                    return
                self._lines.drop()
            except KeyboardInterrupt:
                _new_line()
                self._lines.drop()
                interrupted += 1
                if interrupted > 1:
                    self._note("Ctrl-D or /exit leaves")
            except Failure as failure:
                print(failure.line(), file=sys.stderr, flush=True)

    # -- what is said ---------------------------------------------------------------------------------------------------

    def _do(self, said: Say | Order) -> bool:
        """False when that was the end."""
        if isinstance(said, Say):
            self._ask(self._held.ask(said.text))
        elif said.name == "exit":
            return False
        else:
            self._orders()[said.name](said.argument)
        return True

    def _orders(self) -> dict[str, Callable[[str], None]]:
        return {
            "help": lambda _: self._context.say(conversation.usage()),
            "clear": self._clear,
            "model": self._model,
            "system": self._system,
            "save": self._save,
            "retry": lambda _: self._ask(self._held.again()),
        }

    def _ask(self, messages: list[Message]) -> None:
        """One turn. A failure takes the question back; Ctrl-C of a person keeps what was said so far."""
        answer: dict[str, Any] = {}
        body = {"modelId": self._held.model, "messages": messages, **self._limits, "stream": True}
        try:
            # The daemon may have been started anew since the last turn, at another address.
            answers.stream(self._context.client(), body, answer, lambda: self._begun(answer), shown=not self._context.json)
        except Failure as failure:
            self._held.take_back()
            raise _explained(failure) from failure
        except KeyboardInterrupt:
            if not self._person:
                raise
            self._stopped(answer.get("text", ""))
        else:
            self._held.answered(answer["text"])
            self._count(answer)

    def _stopped(self, text: str) -> None:
        if text.strip():
            self._held.answered(text)
        else:
            self._held.take_back()
        if not text or text.endswith("\n"):
            _new_line()  # behind the ^C that the terminal shows

    def _begun(self, answer: Mapping[str, Any]) -> None:
        self._held.model = self._held.model or answer["code"]
        self._answered_by = answer["answered_by"]
        answerer = (answer["name"], answer["code"], answer["answered_by"], answer["via"])
        if answerer != self._answerer:
            self._answerer = answerer
            self._note(answers.who(answer))

    def _count(self, answer: Mapping[str, Any]) -> None:
        for name, count in (answer.get("usage") or {}).items():
            self._usage[name] = self._usage.get(name, 0) + count
        if self._context.json:
            print(json.dumps(answer), file=sys.stderr, flush=True)
        elif answer["finish_reason"] == "length" and self._limits["maxTokens"] is None:
            self._note("the answer was cut: the context is full; /clear begins anew")
        elif not answer["text"].strip():
            self._note("the answer is empty; /retry asks again")

    # -- slash commands -------------------------------------------------------------------------------------------------

    def _clear(self, _: str) -> None:
        self._held.clear()
        self._note("the conversation is forgotten")

    def _model(self, wanted: str) -> None:
        if wanted:
            self._choose(wanted)
            self._note(f"the next question goes to {render.safe(wanted)}")
            return
        rows = self._context.client().get("/api/swarm/models")
        self._context.say(render.askable(rows, lambda row: conversation.means(self._held.model, row)))

    def _choose(self, wanted: str) -> None:
        askable = conversation.choose(wanted, self._context.client().get("/api/swarm/models"))
        self._held.model = wanted
        if not askable:
            self._note(f"nobody serves {render.safe(wanted)} now")

    def _system(self, text: str) -> None:
        if text:
            self._held.system = None if text == "-" else text
            self._note("there is no system prompt any more" if text == "-" else "the system prompt is set")
        else:
            self._context.say(render.answer_text(self._held.system or "there is no system prompt"))

    def _save(self, name: str) -> None:
        path = Path(name).expanduser().absolute() if name else self._saved
        if path is None:
            raise Failure(USAGE, "/save: no file", "name one: /save FILE")
        if not self._held.turns:
            raise Failure(USAGE, "/save: nothing was said yet", "ask something")
        save(path, self._held.document(), again=path == self._saved)
        self._saved = path
        self._note(f"{len(self._held.turns)} messages are in {render.safe(str(path), 4000)}")

    def _note(self, text: str) -> None:
        """A line beside the conversation: dim on a terminal."""
        if self._context.json:
            self._context.say(text)
        else:
            click.secho(text, dim=True, err=True)


def _explained(failure: Failure) -> Failure:
    """The failure with what helps in a conversation: one that is too long for the model or for a request."""
    if failure.code == USAGE and failure.message.startswith(("the conversation: ", "request: ")):
        return Failure(USAGE, failure.message, f"/clear begins anew, or {failure.hint}")
    return failure


# -- lines --------------------------------------------------------------------------------------------------------------


def _line() -> str:
    """The next line of standard input; empty at its end."""
    try:
        line = sys.stdin.readline(MAX_TEXT + 2) if sys.stdin is not None else ""
    except UnicodeDecodeError:
        raise Failure(USAGE, "chat: standard input is not text", "send UTF-8") from None
    if len(line) > MAX_TEXT + 1:
        raise Failure(USAGE, f"chat: a line has more than {MAX_TEXT} characters", "send less")
    return line


def _reader() -> Callable[[str], str]:
    """Reads one line of a person, with line editing where Python has it. Raises `EOFError`."""
    if not sys.stdout.isatty():
        return _read_plainly  # input() would put its prompt among the answers
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # a text of many lines that is pasted is one turn
    return _read_edited


def _read_edited(prompt: str) -> str:
    try:
        return input(prompt)
    except UnicodeDecodeError:
        raise Failure(USAGE, "chat: what was typed is not text", "type UTF-8") from None


def _read_plainly(prompt: str) -> str:
    click.echo(prompt, nl=False, err=True)
    if line := _line():
        return line.removesuffix("\n")
    raise EOFError


def _new_line() -> None:
    click.echo(err=True)


# -- files --------------------------------------------------------------------------------------------------------------


def load(path: Path) -> Conversation:
    """The conversation that `save` wrote. Raises `Failure`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise Failure(NOT_FOUND, f"{path}: cannot be read: {error.strerror}", "give a file that /save wrote") from error
    try:
        if len(data) > MAX_FILE:
            raise ValueError(f"it has more than {MAX_FILE} bytes")
        return conversation.from_document(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise Failure(USAGE, f"{path}: not a conversation: {error}", "give a file that /save wrote") from error


def save(path: Path, document: Mapping[str, Any], *, again: bool) -> None:
    """Write a file that only its owner can read. One that exists stays as it is, unless this is done `again`. Raises `Failure`."""
    data = json.dumps(document, indent=2).encode() + b"\n"
    try:
        if again:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
            _write(handle, Path(name), data)
            os.replace(name, path)
        else:
            _write(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), path, data)
    except FileExistsError as error:
        raise Failure(USAGE, f"{path}: exists already", "save to another file, or remove it first") from error
    except OSError as error:
        raise Failure(IN_THE_WAY, f"{path}: cannot be written: {error.strerror}", "save to another file") from error


def _write(handle: int, path: Path, data: bytes) -> None:
    """Whole, or not at all."""
    try:
        with open(handle, "wb") as file:
            file.write(data)
    except BaseException:
        path.unlink()
        raise
