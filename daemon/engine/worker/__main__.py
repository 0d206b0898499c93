"""The child process that holds one model: `python -m daemon.engine.worker`, spoken to over stdin and stdout.

One thread reads what the daemon says and ends the process when the daemon is gone, also in the middle of a decode.
The main thread does everything else: template, tokens, decoding, answers.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from daemon.engine import codec
from daemon.engine.interface import CAPABILITIES, Capability, ChatRequest, Delta, EmbeddingRequest, Embeddings, Request
from daemon.engine.protocol import TEXTS, Load, Message, encode, read
from daemon.engine.worker.grammar import GrammarRefused, Plan
from daemon.engine.worker.guiding import Guide, Told
from daemon.engine.worker.isolation import TimedOut, leave_network, limit_process, limited
from daemon.engine.worker.prompts import TEMPLATE_MEMORY, TEMPLATE_SECONDS, Prompts, Refused
from daemon.engine.worker.template import ChatTemplate, TemplateFailure
from daemon.engine.worker.warmup import warm_up
from daemon.orphan import die_with_parent
from registry.errors import Malformed

if TYPE_CHECKING:
    from daemon.engine.worker.answering import Chat
    from daemon.engine.worker.constraint import Ready
    from daemon.engine.worker.llama import Llama


class Worker:
    """Answers requests with one loaded model until its input ends."""

    def __init__(self, inbox: queue.SimpleQueue[Message], target: BinaryIO, load: Load, llama: Llama, template: ChatTemplate) -> None:
        # Only now: NumPy and llama.cpp start threads, and `leave_network` must come before any thread.
        from daemon.engine.worker.embedding import EmbeddingQueue
        from daemon.engine.worker.scheduler import Scheduler

        self._inbox = inbox
        self._target = target
        self._llama = llama
        self._stops = template.stops
        memory = threading.Lock()
        self._prompts = Prompts(llama, template, memory)
        self._guide = Guide(llama, template.calls, memory)
        self._planned: dict[int, tuple[Chat, Plan]] = {}  # until its grammar is ready
        self._deltas: list[tuple[int, codec.Json]] = []
        measured = warm_up(llama, load["threads"])
        self.tokens_per_second = measured.tokens_per_second
        self._scheduler = Scheduler(llama, load["slots"], measured.row_cost)
        self._texts = EmbeddingQueue(llama, TEXTS)

    @property
    def capabilities(self) -> frozenset[Capability]:
        return CAPABILITIES if self._llama.writes else frozenset({"embeddings"})

    def run(self) -> NoReturn:
        while True:
            while not self._inbox.empty() or not (self._scheduler.busy or self._texts.busy):
                self._take(self._inbox.get())
            if self._texts.busy:
                self._embed()
            if self._scheduler.busy:
                self._scheduler.step()
            self._send()

    def _take(self, message: Message) -> None:
        if message["type"] == "ask":
            try:
                self._begin(message["id"], codec.load_request(message["request"]))
            except Refused as error:
                self._refuse(message["id"], *error.args)
            except Malformed as error:
                self._refuse(message["id"], "UsageError", "the request", str(error), "")
        elif message["type"] == "grammar":
            self._follow(message["id"], message["found"])
        elif message["type"] == "cancel":
            self._planned.pop(message["id"], None)
            self._scheduler.cancel(message["id"])
            self._texts.cancel(message["id"])
        elif message["type"] == "threads":
            self._llama.set_threads(message["count"])

    def _begin(self, request_id: int, request: Request | EmbeddingRequest) -> None:
        from daemon.engine.worker.answering import Chat
        from daemon.engine.worker.embedding import Texts
        from daemon.engine.worker.sampling import Sampler
        from daemon.engine.worker.text import AnswerText

        def tell(delta: Delta) -> None:
            self._deltas.append((request_id, codec.dump_delta(delta)))

        def fail(why: str) -> None:
            self._refuse(request_id, "InferenceError", "the answer", why, "ask in another way")

        if isinstance(request, EmbeddingRequest):
            texts = self._prompts.texts(request)
            self._texts.submit(Texts(request_id, texts, lambda found: self._answer(request_id, found), fail))
            return
        sampling = request.sampling
        plan = self._guide.plan(request) if isinstance(request, ChatRequest) else None
        self._prompts.check("logit_bias", list(sampling.logit_bias))
        tokens = self._prompts.read(request)
        room = self._llama.context - len(tokens)
        seed = int.from_bytes(os.urandom(8)) if sampling.seed is None else sampling.seed % 2**64
        parser = self._guide.parser(request, self._prompts.thinking(tokens)) if isinstance(request, ChatRequest) else None
        told = Told(tell, parser)
        chat = Chat(
            id=request_id,
            tokens=tokens,
            prompt=len(tokens),
            limit=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
            sampler=Sampler(sampling, seed),
            text=AnswerText([*sampling.stop, *(self._stops if isinstance(request, ChatRequest) else ())]),
            on_text=told.text,
            on_end=told.end,
            on_error=fail,
            logprobs=sampling.logprobs,
            marks=self._guide.marks if parser else {},
        )
        if plan is None:
            self._scheduler.submit(chat)
        else:
            self._planned[request_id] = chat, plan
            self._guide.compile(
                plan,
                wanted=lambda: request_id in self._planned,  # else clients that come and go would fill the queue of grammars
                found=lambda found: self._inbox.put({"type": "grammar", "id": request_id, "found": found}),
            )

    def _follow(self, request_id: int, found: Ready | GrammarRefused) -> None:
        """The grammar of an answer is ready, or will never be; nothing when nobody waits for that answer any more."""
        if request_id not in self._planned:
            return
        chat, plan = self._planned.pop(request_id)
        if isinstance(found, GrammarRefused):
            self._refuse(request_id, *self._guide.refused(plan.what, found).args)
        else:
            chat.constraint = self._guide.constraint(plan, found, self._prompts.thinking(chat.tokens))
            self._scheduler.submit(chat)

    def _embed(self) -> None:
        from daemon.engine.worker.llama import LlamaError
        from daemon.engine.worker.scheduler import PREFILL

        try:
            self._texts.step(min(PREFILL, self._llama.batch) if self._scheduler.busy else self._llama.batch)
        except LlamaError as error:  # answers have another context, which is as good as before
            self._texts.fail(str(error))

    def _answer(self, request_id: int, found: Embeddings) -> None:
        self._send(type="embeddings", id=request_id, embeddings=codec.dump_embeddings(found))

    def _refuse(self, request_id: int, kind: str, what: str, why: str, hint: str) -> None:
        self._send(type="error", id=request_id, kind=kind, what=what, why=why, hint=hint)

    def _send(self, **message: object) -> None:
        """What there is to tell, in the order in which it happened: the pieces of all answers are one frame per step."""
        if self._deltas:
            self._target.write(encode({"type": "deltas", "deltas": self._deltas}))
            self._deltas = []
        if message:
            self._target.write(encode(message))
        self._target.flush()


def main() -> NoReturn:
    source, target = _take_pipes()
    limit_process()
    offline = leave_network()
    die_with_parent(int(sys.argv[1]))
    from daemon.engine.worker.llama import Llama, LlamaError, has_gpu  # see Worker.__init__

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
        send({"type": "stage", "stage": "load", "gpu": has_gpu()})
        llama = Llama(load)
        send({"type": "stage", "stage": "warm-up", "gpu": has_gpu()})
        worker = Worker(inbox, target, load, llama, template)
    except TemplateFailure as error:
        _fail(send, f"its chat template cannot be used: {error}")
    except TimedOut:
        _fail(send, f"its chat template ran for more than {TEMPLATE_SECONDS:g} s")
    except LlamaError as error:
        _fail(send, str(error))
    ready: Message = {"type": "ready", "context": llama.context, "slots": load["slots"], "offline": offline}
    send({**ready, "tokens_per_second": round(worker.tokens_per_second, 1), "capabilities": sorted(worker.capabilities)})
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
