"""Continuous batching: which tokens of which chats go into the next decode.

- A chat waits until a slot is free and the KV cache has room for its prompt and a little more; first come, first in.
- Every step takes one token of each running answer first, then shares what is left among the prompts being read. While
  answers run, a step reads at most `PREFILL` prompt tokens, so that a long prompt does not stall them.
- A slot keeps what it computed. The next chat starts after the longest prefix that any slot has in common with it.
- When the cache is full all the same: idle prefixes go first, oldest first; then the youngest chat goes back to the queue
  and is computed again later; a chat that is alone ends with "length".
- Chats are cancelled between steps: aborting a decode would hit all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from daemon.engine.llama import BATCH, Llama, LlamaError, Row, Sampler
from daemon.engine.text import AnswerText

PREFILL: Final = 128  # prompt tokens per step while answers run: 289 ms instead of 850 ms of stall on a 1500-token prompt
_HEADROOM: Final = 64  # tokens of answer that must fit before a chat is let in

Finish = Literal["stop", "length"]


@dataclass(slots=True, eq=False)
class Chat:
    """One request. `tokens` is the prompt and, behind it, the answer so far."""

    id: int
    tokens: list[int]
    prompt: int  # how many of them are the prompt
    limit: int  # answer tokens at most
    sampler: Sampler
    text: AnswerText
    on_text: Callable[[str], None]
    on_end: Callable[[Finish, int, int], None]  # finish, prompt tokens, answer tokens
    slot: Slot | None = None
    read: int = 0  # tokens that are in the KV cache

    @property
    def answered(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.read


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence of the KV cache, and the tokens it holds."""

    sequence: int
    held: list[int] = field(default_factory=list)
    chat: Chat | None = None
    used: int = 0  # step of last use


class Scheduler:
    """Owns the context; every method is called from the one thread that decodes."""

    def __init__(self, llama: Llama, slots: int) -> None:
        self._llama = llama
        self._slots = [Slot(sequence) for sequence in range(slots)]
        self._waiting: deque[Chat] = deque()
        self._step = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(slot.chat for slot in self._slots)

    def submit(self, chat: Chat) -> None:
        self._waiting.append(chat)

    def cancel(self, chat_id: int) -> None:
        """Forget a chat, whether it waits or runs; nothing when it has ended already."""
        for chat in [*self._waiting, *self._running()]:
            if chat.id == chat_id:
                self._release(chat)
                chat.sampler.close()

    def step(self) -> None:
        """One decode, and what follows from it. Raises `LlamaError` when the context is no longer usable."""
        self._step += 1
        self._admit()
        rows, ready = self._compose()
        while rows and not self._llama.decode(rows):
            self._make_room()
            rows, ready = self._compose()
        for chat in self._running():
            taken = [row[0] for row in rows if chat.slot and row[2] == chat.slot.sequence]
            self._keep(chat, taken)
        for row, chat in ready:
            self._draw(chat, row)

    def _running(self) -> list[Chat]:
        return [slot.chat for slot in self._slots if slot.chat]

    # --- who is let in, and where ---

    def _admit(self) -> None:
        while self._waiting:
            idle = [slot for slot in self._slots if not slot.chat]
            chat = self._waiting[0]
            running = self._running()
            needed = sum(len(other.tokens) for other in running) + len(chat.tokens) + min(_HEADROOM, chat.limit - chat.answered)
            if not idle or (running and needed > self._llama.context):
                return
            self._place(self._waiting.popleft(), idle)

    def _place(self, chat: Chat, idle: list[Slot]) -> None:
        """Give `chat` the slot that saves most work."""
        wanted = len(chat.tokens) - 1  # the last token must be decoded for its logits
        best = max(self._slots, key=lambda slot: _common(slot.held, chat.tokens, wanted))
        common = _common(best.held, chat.tokens, wanted)
        # A long conversation in the cache is not cut down to a short greeting while another slot is idle.
        worth = [slot for slot in idle if slot is not best] if 0 < 2 * common < len(best.held) else idle
        in_place = best in worth and common > 0
        target = best if in_place else min(worth or idle, key=lambda slot: (len(slot.held) > 0, slot.used))
        if target is best:
            if not self._llama.forget(target.sequence, common):
                common = 0
                self._llama.forget(target.sequence, 0)
        else:
            self._llama.forget(target.sequence, 0)
            common = common if self._llama.can_roll_back else 0
            if common:
                self._llama.share(best.sequence, target.sequence, common)
        target.held = chat.tokens[:common]
        target.chat, chat.slot, chat.read = chat, target, common

    # --- one step ---

    def _compose(self) -> tuple[list[Row], list[tuple[int, Chat]]]:
        """The rows of the next decode, and which of them the next tokens are drawn from."""
        rows: list[Row] = []
        ready: list[tuple[int, Chat]] = []
        running = self._running()
        answering = [chat for chat in running if chat.unread == 1]
        reading = sorted((chat for chat in running if chat.unread > 1), key=lambda chat: chat.unread)
        budget = min(PREFILL, BATCH - len(answering)) if answering else BATCH
        shares = {id(chat): 1 for chat in answering}
        for place, chat in enumerate(reading):
            share = min(chat.unread, budget // (len(reading) - place))
            shares[id(chat)] = share
            budget -= share
        for chat in [*answering, *reading]:
            assert chat.slot is not None
            last = len(chat.tokens) - 1
            for position in range(chat.read, chat.read + shares[id(chat)]):
                if position == last:
                    ready.append((len(rows), chat))
                rows.append((chat.tokens[position], position, chat.slot.sequence, position == last))
        return rows, ready

    def _keep(self, chat: Chat, taken: list[int]) -> None:
        assert chat.slot is not None
        chat.slot.held += taken
        chat.slot.used = self._step
        chat.read += len(taken)

    def _draw(self, chat: Chat, row: int) -> None:
        token = chat.sampler.draw(row)
        if self._llama.ends(token):
            self._end(chat, "stop")
            return
        chat.tokens.append(token)
        text = chat.text.push(self._llama.piece(token))
        if text:
            chat.on_text(text)
        if chat.text.stopped:
            self._end(chat, "stop")
        elif chat.answered >= chat.limit or len(chat.tokens) >= self._llama.context:
            self._end(chat, "length")

    def _end(self, chat: Chat, finish: Finish) -> None:
        rest = chat.text.finish()
        if rest:
            chat.on_text(rest)
        self._release(chat)
        chat.sampler.close()
        chat.on_end("stop" if chat.text.stopped else finish, chat.prompt, chat.answered)

    def _release(self, chat: Chat) -> None:
        """Take `chat` off its slot or out of the queue; what the slot holds stays for the next one."""
        if chat.slot:
            chat.slot.chat = None
            chat.slot = None
        elif chat in self._waiting:
            self._waiting.remove(chat)

    def _make_room(self) -> None:
        """The KV cache is full: give up what costs least."""
        idle = [slot for slot in self._slots if slot.held and not slot.chat]
        running = self._running()
        if idle:
            self._clear(min(idle, key=lambda slot: slot.used))
        elif len(running) > 1:
            youngest = max(running, key=lambda chat: chat.id)
            slot = youngest.slot
            assert slot is not None
            self._release(youngest)
            self._clear(slot)
            self._waiting.appendleft(youngest)
        elif running and running[0].answered:
            self._end(running[0], "length")
        else:
            raise LlamaError("the KV cache has no room for a prompt that should fit")

    def _clear(self, slot: Slot) -> None:
        self._llama.forget(slot.sequence, 0)
        slot.held = []


def _common(held: list[int], tokens: list[int], most: int) -> int:
    """Length of the longest common prefix, at most `most`."""
    end = min(len(held), most)
    if held[:end] == tokens[:end]:
        return end
    return next(i for i in range(end) if held[i] != tokens[i])
