"""The sequences of the KV cache: what each one holds, who gets which, and what is given up when there is no room.

- A slot keeps what was computed in it. The next chat starts behind the longest prefix that any slot has in common with it.
- A prefix that another chat is reading at this moment is waited for, not read twice: `n` answers to one prompt, or a crowd
  with one system prompt. Whoever waits has its slot already, so nobody overtakes it, and it blocks nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from daemon.engine.worker.answering import Chat, common

_WORTH: Final = 16  # tokens of a prefix that are worth waiting for


class KvCache(Protocol):
    """What `daemon.engine.worker.llama.Llama` does for the slots."""

    can_roll_back: bool

    def forget(self, sequence: int, position: int) -> bool: ...
    def share(self, source: int, target: int, end: int) -> None: ...


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence of the KV cache, which holds `tokens[:read]`. While a chat runs in it, these are the chat's own tokens."""

    sequence: int
    tokens: list[int] = field(default_factory=list)
    read: int = 0
    chat: Chat | None = None
    used: int = 0  # step of last use
    behind: tuple[Slot, Chat, int] | None = None  # waits until that chat has read so many tokens in that slot

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.read

    def common(self, tokens: Sequence[int]) -> int:
        """How much of a prompt it saves to read; the last token must be decoded for its logits."""
        return common(self.tokens, tokens, min(self.read, len(tokens) - 1))


class Slots:
    def __init__(self, cache: KvCache, count: int) -> None:
        self._cache = cache
        self.all = [Slot(sequence) for sequence in range(count)]

    @property
    def running(self) -> list[Slot]:
        return [slot for slot in self.all if slot.chat]

    @property
    def idle(self) -> list[Slot]:
        return [slot for slot in self.all if not slot.chat]

    def needed(self, chat: Chat) -> int:
        """Cells that the chats which run, and `chat`, take together; a prefix that several have counts once."""
        last: list[int] = []
        cells = 0
        for tokens in sorted([chat.tokens, *(slot.tokens for slot in self.running)]):
            cells += len(tokens) - (common(last, tokens, len(tokens)) if self._cache.can_roll_back else 0)
            last = tokens
        return cells

    def place(self, chat: Chat) -> None:
        """Give `chat` the idle slot that saves most work."""
        best = max(self.all, key=lambda slot: slot.common(chat.tokens))
        saved = best.common(chat.tokens)
        idle = self.idle
        # A long conversation in the cache is not cut down to a short greeting while another slot is idle.
        worth = [slot for slot in idle if slot is not best] if 0 < 2 * saved < best.read else idle
        target = best if best in worth and saved else min(worth or idle, key=lambda slot: (slot.read > 0, slot.used))
        if target is not best or not self._cache.forget(target.sequence, saved):
            self._cache.forget(target.sequence, 0)
            saved = self._share(best, target, saved) if target is not best else 0
        target.chat, target.tokens, target.read = chat, chat.tokens, saved
        target.behind = self._leader(target, saved)
        if target.behind is None:
            self._settled(target)

    def _leader(self, slot: Slot, saved: int) -> tuple[Slot, Chat, int] | None:
        """The chat that is about to read most of what `slot` would have to read."""
        if not self._cache.can_roll_back:
            return None
        best = None
        for other in self.running:
            assert other.chat is not None
            # A chat's prompt only: it may take long until its answer has been made, and nobody knows it before.
            shared = common(other.tokens, slot.tokens, min(other.chat.prompt, len(slot.tokens) - 1))
            if other is not slot and shared >= max(saved, other.read) + _WORTH and (best is None or shared > best[2]):
                best = other, other.chat, shared
        return best

    def follow(self) -> None:
        """Let those go on whose prefix has been read, or will not be."""
        for slot in self.running:
            if slot.behind is None:
                continue
            leader, chat, wanted = slot.behind
            if leader.chat is chat and leader.read < wanted:
                continue
            slot.behind = None
            saved = leader.common(slot.tokens)
            if saved > slot.read:
                self._cache.forget(slot.sequence, 0)
                slot.read = self._share(leader, slot, saved)
            self._settled(slot)

    def _share(self, source: Slot, target: Slot, count: int) -> int:
        if not count or not self._cache.can_roll_back:
            return 0
        self._cache.share(source.sequence, target.sequence, count)
        return count

    def _settled(self, slot: Slot) -> None:
        """What a chat found in the cache the first time; when it is computed again later, that was no luck of its."""
        assert slot.chat is not None
        if slot.chat.cached is None:
            slot.chat.cached = slot.read

    def keep(self, slot: Slot, decoded: int, valid: int, step: int) -> None:
        """`decoded` more tokens are in the cache, of which the first `valid` are what the chat has."""
        slot.read += valid
        slot.used = step
        if valid < decoded and not self._cache.forget(slot.sequence, slot.read):
            self.clear(slot)  # it is read again

    def release(self, slot: Slot) -> None:
        """The chat leaves; what the slot holds stays for the next one."""
        slot.chat, slot.behind = None, None

    def clear(self, slot: Slot) -> None:
        self._cache.forget(slot.sequence, 0)
        slot.read = 0
        if slot.chat is None:
            slot.tokens = []
