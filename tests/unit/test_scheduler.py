"""The scheduler over a KV cache in Python that checks every row: whatever comes together, each chat gets what it would get alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.llama import BATCH, Llama, Row, Sampler
from daemon.engine.scheduler import PREFILL, Chat, Scheduler
from daemon.engine.text import AnswerText

EOG = 0


def next_token(tokens: Sequence[int]) -> int:
    """What the model says after `tokens`; about one answer in twelve ends at each token."""
    value = hash(tuple(tokens)) % 97
    return EOG if value < 8 else value


class KvCache:
    """`Llama` as far as the scheduler uses it: sequences of tokens, shared cells, and a limit on them."""

    def __init__(self, context: int, can_roll_back: bool = True) -> None:
        self.context = context
        self.can_roll_back = can_roll_back
        self.cells: dict[int, list[tuple[int, object]]] = {}  # sequence -> (token, identity of the cell)
        self.asked: list[int | None] = []
        self.batches: list[list[Row]] = []

    def used(self) -> int:
        return len({id(cell) for held in self.cells.values() for _, cell in held})

    def decode(self, rows: Sequence[Row]) -> bool:
        assert 0 < len(rows) <= BATCH
        if self.used() + len(rows) > self.context:
            return False
        self.batches.append(list(rows))
        self.asked = []
        for token, position, sequence, logits in rows:
            held = self.cells.setdefault(sequence, [])
            assert position == len(held)
            held.append((token, object()))
            self.asked.append(next_token([t for t, _ in held]) if logits else None)
        return True

    def forget(self, sequence: int, position: int) -> bool:
        held = self.cells.setdefault(sequence, [])
        assert position <= len(held)
        if position and position != len(held) and not self.can_roll_back:
            return False
        del held[position:]
        return True

    def share(self, source: int, target: int, end: int) -> None:
        assert self.can_roll_back and not self.cells.get(target)
        self.cells[target] = self.cells[source][:end]

    def piece(self, token: int) -> bytes:
        return f"{token} ".encode()

    def ends(self, token: int) -> bool:
        return token == EOG


class Drawer:
    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self.closed = 0

    def draw(self, row: int) -> int:
        token = self._cache.asked[row]
        assert token is not None, "a row without logits was sampled"
        return token

    def close(self) -> None:
        self.closed += 1


class Client:
    """One chat and what came back."""

    def __init__(self, cache: KvCache, number: int, prompt: list[int], limit: int) -> None:
        self.text = ""
        self.end: tuple[str, int, int] | None = None
        self.drawer = Drawer(cache)
        self.chat = Chat(
            id=number,
            tokens=list(prompt),
            prompt=len(prompt),
            limit=min(limit, cache.context - len(prompt)),
            sampler=cast(Sampler, self.drawer),
            text=AnswerText(()),
            on_text=self._more,
            on_end=self._done,
        )

    def _more(self, text: str) -> None:
        assert self.end is None
        self.text += text

    def _done(self, finish: str, prompt: int, answered: int) -> None:
        assert self.end is None
        self.end = (finish, prompt, answered)


def alone(prompt: list[int], limit: int, context: int) -> tuple[str, str]:
    tokens, text = list(prompt), ""
    while True:
        token = next_token(tokens)
        if token == EOG:
            return text, "stop"
        tokens.append(token)
        text += f"{token} "
        if len(tokens) - len(prompt) >= limit or len(tokens) >= context:
            return text, "length"


def scheduler(cache: KvCache, slots: int) -> Scheduler:
    return Scheduler(cast(Llama, cache), slots)


PROMPTS = st.lists(st.integers(1, 3), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(
    chats=st.lists(st.tuples(PROMPTS, st.integers(1, 40), st.integers(0, 6)), min_size=1, max_size=12),
    slots=st.integers(1, 4),
    context=st.integers(40, 120),
    can_roll_back=st.booleans(),
    cancelled=st.sets(st.integers(0, 11), max_size=3),
)
def test_each_chat_gets_what_it_would_get_alone(
    chats: list[tuple[list[int], int, int]], slots: int, context: int, can_roll_back: bool, cancelled: set[int]
) -> None:
    cache = KvCache(context, can_roll_back)
    plan = scheduler(cache, slots)
    clients = []
    for number, (prompt, limit, steps) in enumerate(chats):
        clients.append(Client(cache, number, prompt, limit))
        plan.submit(clients[-1].chat)
        for _ in range(steps):
            if plan.busy:
                plan.step()
        if number in cancelled:
            plan.cancel(number)
    for _ in range(5000):
        if not plan.busy:
            break
        plan.step()
    assert not plan.busy
    for number, (client, (prompt, limit, _)) in enumerate(zip(clients, chats, strict=True)):
        assert client.drawer.closed == 1
        if client.end is None:
            assert number in cancelled
            continue
        text, finish = alone(prompt, limit, context)
        assert (client.text, client.end[0]) == (text, finish)
        assert client.end[1:] == (len(prompt), len(text.split()))


def test_a_long_prompt_does_not_stall_a_running_answer() -> None:
    cache = KvCache(4096)
    plan = scheduler(cache, 2)
    talker = next(p for p in ([n] for n in range(1, 1000)) if len(alone(p, 200, 4096)[0].split()) > 30)
    first, second = Client(cache, 1, talker, 200), Client(cache, 2, [7] * 1500, 1)
    plan.submit(first.chat)
    plan.step()
    plan.submit(second.chat)
    plan.step()
    assert len(cache.batches[0]) == 1
    assert len(cache.batches[1]) == 1 + PREFILL
    assert len(first.text.split()) == 2


def test_a_shared_prefix_is_read_once() -> None:
    cache = KvCache(4096)
    plan = scheduler(cache, 3)
    system = [5] * 300
    for number, question in enumerate(([1, 2], [1, 3], [2])):
        plan.submit(Client(cache, number, system + question, 1).chat)
        plan.step()
    assert [len(batch) for batch in cache.batches] == [302, 1, 1]


def test_a_long_conversation_survives_a_short_one() -> None:
    cache = KvCache(4096)
    plan = scheduler(cache, 2)
    long = [5] * 300
    for number, prompt in enumerate((long, [5] * 10 + [6], [*long, 7])):
        plan.submit(Client(cache, number, prompt, 1).chat)
        while plan.busy:
            plan.step()
    assert [len(batch) for batch in cache.batches] == [300, 1, 1]


def test_prompts_share_a_step_and_the_first_come_is_first_in() -> None:
    cache = KvCache(4096)
    plan = scheduler(cache, 2)
    clients = [Client(cache, number, [number + 1] * 600, 1) for number in range(3)]
    for client in clients:
        plan.submit(client.chat)
    plan.step()
    assert sorted(row[2] for row in cache.batches[0]) == [0] * 256 + [1] * 256
    while clients[2].end is None:
        plan.step()
    assert clients[0].end and clients[1].end
