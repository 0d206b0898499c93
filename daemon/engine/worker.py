"""The child process that holds one model: `python -m daemon.engine.worker`, spoken to over stdin and stdout.

One thread reads what the daemon says and ends the process when the daemon is gone, also in the middle of a decode.
The main thread does everything else: template, tokens, decoding, answers.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn

from daemon.engine import codec
from daemon.engine.chat import ChatTemplate, TemplateFailure, split
from daemon.engine.interface import ChatRequest, Delta, EmbeddingRequest, Request, Usage
from daemon.engine.isolation import TimedOut, leave_network, limit_process, limited
from daemon.engine.protocol import Load, Message, encode, read
from daemon.engine.text import AnswerText
from daemon.orphan import die_with_parent

if TYPE_CHECKING:
    from daemon.engine.llama import Llama
    from daemon.engine.scheduler import Scheduler

TEMPLATE_SECONDS: Final = 2.0
TEMPLATE_MEMORY: Final = 256 << 20  # bytes
_LONGEST_TOKEN: Final = 64  # characters; what is longer than this times the context cannot fit it
_WARM_UP: Final = 32  # tokens; a batch and single tokens take different kernels, and both must work
_TIMED: Final = 4
_SHORTEN: Final = "shorten it or serve with more context"


class _Refused(Exception):
    """This request cannot be answered: an error of daemon/errors.py by name, then what, why, hint."""


class Worker:
    """Answers chats with one loaded model until its input ends."""

    def __init__(self, inbox: queue.SimpleQueue[Message], send: Callable[[Message], None], load: Load, template: ChatTemplate) -> None:
        # Only now: libraries of the model's side start threads, and `leave_network` must come before any thread.
        from daemon.engine.llama import Llama
        from daemon.engine.scheduler import Scheduler

        self._inbox = inbox
        self._send = send
        self._template = template
        self._llama: Llama = Llama(load)
        self._special = self._llama.special()
        self._control = self._llama.control_texts()
        self._scheduler: Scheduler = Scheduler(self._llama, load["slots"])

    @property
    def context(self) -> int:
        return self._llama.context

    def warm_up(self) -> float:
        """Decode for the first time, where a build for another machine dies; tokens per second of one answer."""
        token = self._llama.first_token() or 0
        self._llama.decode([(token, i, 0, i == _WARM_UP - 1) for i in range(min(_WARM_UP, self.context - _TIMED - 1))])
        self._llama.decode([(token, _WARM_UP, 0, True)])
        start = time.perf_counter()
        for i in range(_TIMED):
            self._llama.decode([(token, _WARM_UP + 1 + i, 0, True)])
        rate = _TIMED / (time.perf_counter() - start)
        self._llama.forget(0, 0)
        return rate

    def run(self) -> NoReturn:
        while True:
            while not self._inbox.empty() or not self._scheduler.busy:
                self._take(self._inbox.get())
            self._scheduler.step()

    def _take(self, message: Message) -> None:
        if message["type"] == "ask":
            try:
                self._begin(message["id"], codec.load_request(message["request"]))
            except _Refused as error:
                kind, what, why, hint = error.args
                self._send({"type": "error", "id": message["id"], "kind": kind, "what": what, "why": why, "hint": hint})
        elif message["type"] == "cancel":
            self._scheduler.cancel(message["id"])
        elif message["type"] == "threads":
            self._llama.set_threads(message["count"])

    def _begin(self, request_id: int, request: Request | EmbeddingRequest) -> None:
        from daemon.engine.scheduler import Chat

        if not isinstance(request, ChatRequest):
            raise _Refused("UsageError", "the model", "it answers chats only", "")
        sampling = request.sampling
        tokens = self._prompt(list(request.messages))
        room = self.context - len(tokens)
        if room < 1:
            raise _Refused("ContextOverflow", "the conversation", f"it has {len(tokens)} tokens and the context {self.context}", _SHORTEN)
        seed = int.from_bytes(os.urandom(4)) if sampling.seed is None else sampling.seed & 0xFFFFFFFF

        def send(delta: Delta) -> None:
            self._send({"type": "delta", "id": request_id, "delta": codec.dump_delta(delta)})

        self._scheduler.submit(
            Chat(
                id=request_id,
                tokens=tokens,
                prompt=len(tokens),
                limit=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
                sampler=self._llama.sampler(sampling, seed),
                text=AnswerText([*sampling.stop, *self._template.stops]),
                on_text=lambda text: send(Delta(text=text)),
                on_end=lambda finish, prompt, answered: send(Delta(finish=finish, usage=Usage(prompt, answered))),
            )
        )

    def _prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        too_long = _Refused("ContextOverflow", "the conversation", f"it cannot fit the context of {self.context} tokens", _SHORTEN)
        most = _LONGEST_TOKEN * self.context
        if sum(len(message["content"]) for message in messages if isinstance(message.get("content"), str)) > most:
            raise too_long
        try:
            with limited(TEMPLATE_SECONDS, TEMPLATE_MEMORY):
                prompt = self._template.render(messages, self._special, self._control)
        except TemplateFailure as error:
            why, hint = str(error), "change the conversation or use another model"
            raise _Refused("UsageError", "the model's chat template", why, hint) from None
        except TimedOut:
            why = f"it ran for more than {TEMPLATE_SECONDS:g} s"
            raise _Refused("UsageError", "the model's chat template", why, "use another model") from None
        if len(prompt) > most:
            raise too_long
        first = self._llama.first_token()
        begin = self._special["bos_token"]
        tokens = [] if first is None or (begin and prompt.startswith(begin)) else [first]
        for text, control in split(prompt):
            if text:
                tokens += self._llama.tokenise(text, control)
        if not tokens:
            raise _Refused("UsageError", "the conversation", "it is empty", "say something")
        return tokens


def main() -> NoReturn:
    source, target = _take_pipes()
    limit_process()
    offline = leave_network()
    die_with_parent(int(sys.argv[1]))
    from daemon.engine.llama import LlamaError  # see Worker.__init__

    def send(message: Message) -> None:
        target.write(encode(message))
        target.flush()

    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(source, inbox), daemon=True).start()
    load: Load = inbox.get()["load"]
    try:
        send({"type": "stage", "stage": "template"})
        with limited(TEMPLATE_SECONDS, TEMPLATE_MEMORY):
            template = ChatTemplate(load["template"])
            template.render([{"role": "user", "content": "hello"}], {"bos_token": "", "eos_token": ""}, None)
        send({"type": "stage", "stage": "load"})
        worker = Worker(inbox, send, load, template)
        send({"type": "stage", "stage": "warm-up"})
        rate = worker.warm_up()
    except TemplateFailure as error:
        _fail(send, f"its chat template cannot be used: {error}")
    except TimedOut:
        _fail(send, f"its chat template ran for more than {TEMPLATE_SECONDS:g} s")
    except LlamaError as error:
        _fail(send, str(error))
    send({"type": "ready", "context": worker.context, "slots": load["slots"], "tokens_per_second": round(rate, 1), "offline": offline})
    worker.run()


def _fail(send: Callable[[Message], None], why: str) -> NoReturn:
    send({"type": "failed", "why": why})
    os._exit(1)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The daemon's two pipes as files of our own; whatever prints to stdout after this lands in the log."""
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return source, target


def _listen(source: BinaryIO, inbox: queue.SimpleQueue[Message]) -> None:
    try:
        while (message := read(source)) is not None:
            inbox.put(message)
    finally:
        # The daemon is gone or speaks nonsense. Nothing here needs saving, and a decode must not delay the end.
        os._exit(0)


if __name__ == "__main__":
    main()
