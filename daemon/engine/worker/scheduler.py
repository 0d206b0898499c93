"""Continuous batching: which tokens of which chats go into the next decode.

- A chat waits until a slot is free and the KV cache has room for its prompt and a little more; first come, first in.
- Every step takes the newest token of each running answer first, with guesses behind it where they pay (lookup.py), then shares
  what is left among the prompts being read, one after the other (`_shares`). While answers run, a step reads as many prompt tokens
  as this machine can in `_STALL_S`, and at least `PREFILL`, so that a long prompt does not stall them.
- Prefixes are kept, shared and waited for: see slots.py.
- When the cache is full all the same: idle prefixes go first, oldest first; then the youngest chat goes back to the queue
  and is computed again later; a chat that is alone ends with "length".
- Chats are cancelled between steps: aborting a decode would hit all of them.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from daemon.engine.worker.answering import Chat, Finish, Unanswerable
from daemon.engine.worker.llama import Llama, LlamaError, Row
from daemon.engine.worker.lookup import price
from daemon.engine.worker.slots import Slot, Slots

PREFILL: Final = 128  # prompt tokens that a step may always read; with fewer, reading takes much longer in all
_STALL_S: Final = 0.3  # what answers wait in such a step, where the machine is fast enough for more than `PREFILL` tokens
_HEADROOM: Final = 64  # tokens of answer that must fit before a chat is let in


@dataclass(slots=True)
class _Part:
    """What one chat has in a decode."""

    slot: Slot
    chat: Chat
    tokens: list[int]  # decoded now: what the chat has, and guesses behind it
    outputs: list[int]  # rows of the batch that have logits: behind the newest token, and behind each guess


class Scheduler:
    """Owns the context; every method is called from the one thread that decodes."""

    def __init__(self, llama: Llama, slots: int, row_cost: float) -> None:
        """`row_cost`: see `price`."""
        self._llama = llama
        self._slots = Slots(llama, slots)
        self._row_cost = row_cost
        self._waiting: deque[Chat] = deque()
        self._step = 0
        self._prefill = PREFILL  # prompt tokens that a step may read while answers run, by the latest step that read many

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or bool(self._slots.running)

    def submit(self, chat: Chat) -> None:
        self._waiting.append(chat)

    def cancel(self, chat_id: int) -> None:
        """Forget a chat, whether it waits or runs; nothing when it has ended already."""
        self._waiting = deque(chat for chat in self._waiting if chat.id != chat_id)
        for slot in self._slots.running:
            if slot.chat and slot.chat.id == chat_id:
                self._slots.release(slot)

    def step(self) -> None:
        """One decode, and what follows from it. Raises `LlamaError` when the context is no longer usable."""
        self._step += 1
        self._admit()
        began = time.perf_counter()
        guessing = self._llama.can_roll_back
        rows, parts = self._compose(guessing)
        while rows and not self._llama.decode(rows):
            # Nobody gives up anything for what may be wrong.
            if not guessing:
                self._make_room()
            guessing = False
            rows, parts = self._compose(guessing)
        for part in parts:
            self._draw(part)
        if len(rows) >= PREFILL:
            row_s = (time.perf_counter() - began) / len(rows)
            self._prefill = max(PREFILL, int(_STALL_S / row_s))

    def _admit(self) -> None:
        while self._waiting and self._slots.idle:
            chat = self._waiting[0]
            if self._slots.running:
                room = self._llama.context - min(_HEADROOM, chat.limit - chat.answered)
                if self._slots.needed(chat) > room:
                    return
            self._slots.place(self._waiting.popleft())

    # --- one step ---

    def _compose(self, guessing: bool) -> tuple[list[Row], list[_Part]]:
        """The rows of the next decode, and whose they are."""
        self._slots.follow()
        running = [slot for slot in self._slots.running if slot.behind is None]
        answering = [slot for slot in running if slot.unread == 1]
        reading = [slot for slot in running if slot.unread > 1]
        budget = self._llama.batch - len(answering)
        spare = min(self._llama.outputs - len(running), budget - len(reading))
        rows: list[Row] = []
        parts: list[_Part] = []
        for slot in answering:
            guessed = self._guess(slot, len(answering), spare) if guessing else []
            spare -= len(guessed)
            budget -= len(guessed)
            self._add(slot, 1, guessed, rows, parts)
        if answering:
            budget = min(self._prefill, budget)
        for slot, share in _shares(reading, budget):
            self._add(slot, share, [], rows, parts)
        return rows, parts

    def _guess(self, slot: Slot, answers: int, spare: int) -> list[int]:
        chat = slot.chat
        assert chat is not None
        guessed = chat.lookup.guess(price(answers, self._row_cost))
        # Behind the last token of an answer comes nothing, whether its limit or the context ends it.
        left = min(chat.limit - chat.answered, self._llama.context - len(chat.tokens)) - 1
        return guessed[: max(0, min(spare, left))]

    def _add(self, slot: Slot, count: int, guessed: list[int], rows: list[Row], parts: list[_Part]) -> None:
        assert slot.chat is not None
        tokens = slot.tokens[slot.read : slot.read + count] + guessed
        newest = len(slot.tokens) - 1
        first = len(rows)
        rows += [(token, at, slot.sequence, at >= newest) for at, token in enumerate(tokens, slot.read)]
        outputs = [first + i for i in range(len(tokens)) if slot.read + i >= newest]
        parts.append(_Part(slot, slot.chat, tokens, outputs))

    def _draw(self, part: _Part) -> None:
        """Take tokens for as long as they are those that were decoded."""
        slot, chat, decoded = part.slot, part.chat, part.tokens
        valid = len(decoded) - max(0, len(part.outputs) - 1)  # those that are no guesses
        finish: Finish | None = None
        failure: str | None = None
        for row in part.outputs:
            before = len(chat.tokens)
            try:
                finish = chat.advance(self._llama.logits(row), self._llama)
            except Unanswerable as error:
                failure = str(error)
            taken = len(chat.tokens) - before
            right = valid < len(decoded) and taken > 0 and chat.tokens[before] == decoded[valid]
            valid += right
            if finish or failure or not right or taken > 1:
                break
        self._slots.keep(slot, len(decoded), valid, self._step)
        if failure is not None:
            self._slots.release(slot)
            chat.on_error(failure)
        elif finish is not None:
            self._end(slot, chat, finish)

    def _end(self, slot: Slot, chat: Chat, finish: Finish) -> None:
        text, logprobs = chat.finish()
        if text or logprobs:
            chat.on_text(text, logprobs)
        self._slots.release(slot)
        chat.on_end("stop" if chat.text.stopped else finish, chat.usage)

    def _make_room(self) -> None:
        """The KV cache is full: give up what costs least."""
        idle = [slot for slot in self._slots.idle if slot.read]
        running = [slot for slot in self._slots.running if slot.read]
        if idle:
            self._slots.clear(min(idle, key=lambda slot: slot.used))
        elif len(running) > 1:
            youngest = max(running, key=lambda slot: slot.chat.id if slot.chat else 0)
            chat = youngest.chat
            assert chat is not None
            self._slots.release(youngest)
            self._slots.clear(youngest)
            self._waiting.appendleft(chat)
        elif running and running[0].chat and running[0].chat.answered:
            self._end(running[0], running[0].chat, "length")
        else:
            raise LlamaError("the KV cache has no room for a prompt that should fit")


def _shares(reading: list[Slot], budget: int) -> list[tuple[Slot, int]]:
    """How much each chat reads of its prompt now, at most `budget` tokens in all.

    The shortest rest goes first, so that most answers begin early; half of the budget is for whoever came first, so that no prompt
    waits for ever because it is long. The last token of a prompt is left for the next step, where it is one row among the newest
    tokens of answers: as it is when the whole prompt is in the cache. Large batches are rounded in another way, and the same
    question should get the same answer twice.
    """
    if not reading:
        return []
    left = {slot.sequence: slot.unread - (slot.chat is not None and not slot.chat.answered) for slot in reading}
    first = min(reading, key=lambda slot: slot.chat.id if slot.chat else 0)
    shares = {first.sequence: min(left[first.sequence], budget // 2)}
    budget -= shares[first.sequence]
    for slot in sorted(reading, key=lambda slot: slot.unread):
        more = min(left[slot.sequence] - shares.get(slot.sequence, 0), budget)
        shares[slot.sequence] = shares.get(slot.sequence, 0) + more
        budget -= more
    return [(slot, shares[slot.sequence]) for slot in reading if shares[slot.sequence]]
