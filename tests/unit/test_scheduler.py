"""The scheduler over a KV cache in Python that checks every row: whatever comes together, each chat gets what it would get alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.engine.interface import Sampling, TokenLogprob, Usage
from daemon.engine.protocol import GUESSES
from daemon.engine.worker.answering import Chat, Unanswerable
from daemon.engine.worker.llama import Llama, Row
from daemon.engine.worker.sampling import Logits, Sampler
from daemon.engine.worker.scheduler import PREFILL, Scheduler
from daemon.engine.worker.text import AnswerText

EOG = 0
VOCABULARY = 128
BATCH = 512


def next_token(tokens: Sequence[int]) -> int:
    """What the model says after `tokens`; about one answer in twelve ends at each token, and many repeat themselves."""
    value = hash(tuple(tokens[-2:]) if tokens[0] % 2 else tuple(tokens)) % 97
    return EOG if value < 8 else value


class KvCache:
    """`Llama` as far as the scheduler uses it: sequences of tokens, shared cells, and a limit on them."""

    batch = BATCH

    def __init__(self, context: int, can_roll_back: bool = True, slots: int = 4) -> None:
        self.context = context
        self.can_roll_back = can_roll_back
        self.outputs = slots + GUESSES
        self.cells: dict[int, list[tuple[int, object]]] = {}  # sequence -> (token, identity of the cell)
        self.asked: list[int | None] = []
        self.batches: list[list[Row]] = []

    def used(self) -> int:
        return len({id(cell) for held in self.cells.values() for _, cell in held})

    def decode(self, rows: Sequence[Row]) -> bool:
        assert 0 < len(rows) <= BATCH and sum(row[3] for row in rows) <= self.outputs
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

    def logits(self, row: int) -> Logits:
        token = self.asked[row]
        assert token is not None, "a row without logits was read"
        found = np.zeros(VOCABULARY, np.float32)
        found[token] = 9
        return found

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
        assert len(self.cells[target]) == end

    def piece(self, token: int) -> bytes:
        return f"{token} ".encode()

    def ends(self, token: int) -> bool:
        return token == EOG


class Client:
    """One chat and what came back."""

    def __init__(self, cache: KvCache, number: int, prompt: list[int], limit: int) -> None:
        self.text = ""
        self.end: tuple[str, Usage] | None = None
        self.error = ""
        self.chat = Chat(
            id=number,
            tokens=list(prompt),
            prompt=len(prompt),
            limit=min(limit, cache.context - len(prompt)),
            sampler=Sampler(Sampling(temperature=0), 1),
            text=AnswerText(()),
            on_text=self._more,
            on_end=self._done,
            on_error=self._failed,
        )

    def _more(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> None:
        assert self.end is None
        self.text += text

    def _done(self, finish: str, usage: Usage) -> None:
        assert self.end is None
        self.end = finish, usage

    def _failed(self, why: str) -> None:
        assert self.end is None
        self.error = why


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


def scheduler(cache: KvCache, slots: int, row_cost: float = 1.0) -> Scheduler:
    return Scheduler(cast(Llama, cache), slots, row_cost)


def finish(plan: Scheduler) -> None:
    for _ in range(5000):
        if not plan.busy:
            return
        plan.step()
    raise AssertionError("it never ends")


PROMPTS = st.lists(st.integers(1, 3), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(
    chats=st.lists(st.tuples(PROMPTS, st.integers(1, 40), st.integers(0, 6)), min_size=1, max_size=12),
    slots=st.integers(1, 4),
    context=st.integers(40, 120),
    can_roll_back=st.booleans(),
    cancelled=st.sets(st.integers(0, 11), max_size=3),
    row_cost=st.sampled_from((0.0, 0.05, 0.5)),
)
def test_each_chat_gets_what_it_would_get_alone(
    chats: list[tuple[list[int], int, int]], slots: int, context: int, can_roll_back: bool, cancelled: set[int], row_cost: float
) -> None:
    cache = KvCache(context, can_roll_back, slots)
    plan = scheduler(cache, slots, row_cost)
    clients = []
    for number, (prompt, limit, steps) in enumerate(chats):
        clients.append(Client(cache, number, prompt, limit))
        plan.submit(clients[-1].chat)
        for _ in range(steps):
            if plan.busy:
                plan.step()
        if number in cancelled:
            plan.cancel(number)
    finish(plan)
    for number, (client, (prompt, limit, _)) in enumerate(zip(clients, chats, strict=True)):
        if client.end is None:
            assert number in cancelled
            continue
        text, reason = alone(prompt, limit, context)
        assert (client.text, client.end[0]) == (text, reason)
        usage = client.end[1]
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(text.split()))
        assert 0 <= usage.cached_tokens < len(prompt)


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


@pytest.mark.parametrize(("row_ms", "tokens"), [(0.001, BATCH - 1), (1.2, 250), (40.0, PREFILL)])
def test_a_fast_machine_reads_more_in_the_time_that_an_answer_may_wait(
    row_ms: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = KvCache(8192)
    clock = SimpleNamespace(perf_counter=lambda: row_ms / 1000 * sum(map(len, cache.batches)))
    monkeypatch.setattr("daemon.engine.worker.scheduler.time", clock)
    plan = scheduler(cache, 2)
    talker = next(p for p in ([n] for n in range(1, 1000)) if len(alone(p, 200, 4096)[0].split()) > 30)
    plan.submit(Client(cache, 1, talker, 200).chat)
    plan.step()
    plan.submit(Client(cache, 2, [7] * 4000, 1).chat)
    for _ in range(3):
        plan.step()
    assert [len(batch) for batch in cache.batches[2:4]] == [1 + tokens] * 2


def test_a_shared_prefix_is_read_once() -> None:
    cache = KvCache(4096)
    plan = scheduler(cache, 3)
    system = [5] * 300
    for number, question in enumerate(([1, 2], [1, 3], [2])):
        plan.submit(Client(cache, number, system + question, 1).chat)
        finish(plan)
    assert [len(batch) for batch in cache.batches] == [301, 1, 1, 1]  # and each time the last token of the prompt by itself


def test_a_long_conversation_survives_a_short_one() -> None:
    cache = KvCache(4096)
    plan = scheduler(cache, 2)
    long = [5] * 300
    for number, prompt in enumerate((long, [5] * 10 + [6], [*long, 7])):
        plan.submit(Client(cache, number, prompt, 1).chat)
        while plan.busy:
            plan.step()
    assert [len(batch) for batch in cache.batches] == [299, 1, 1, 1]


def test_short_prompts_are_read_first_but_the_first_that_came_goes_on() -> None:
    cache = KvCache(4096)
    plan = scheduler(cache, 3)
    lengths = (900, 600, 100, 50)
    clients = [Client(cache, number, [number + 1] * length, 1) for number, length in enumerate(lengths)]
    for client in clients:
        plan.submit(client.chat)
    plan.step()
    assert Counter(row[2] for row in cache.batches[0]) == {0: 256, 1: 157, 2: 99}
    plan.step()
    assert clients[2].end and not clients[3].end
    plan.step()
    assert Counter(row[2] for row in cache.batches[2])[2] == 49
    finish(plan)
    assert all(client.end for client in clients)


def test_a_prefix_that_is_being_read_is_waited_for() -> None:
    cache = KvCache(4096)
    plan = scheduler(cache, 4)
    system = [5] * 300
    clients = [Client(cache, number, system + question, 1) for number, question in enumerate(([1, 2], [1, 3], [2]))]
    clients.append(Client(cache, 3, [6] * 20, 1))
    for client in clients:
        plan.submit(client.chat)
    plan.step()
    # The first of the three, and the one that has nothing to do with them.
    assert sorted({row[2] for row in cache.batches[0]}) == [0, 3] and len(cache.batches[0]) == 301 + 19
    finish(plan)
    assert [len(batch) for batch in cache.batches] == [320, 4]
    assert [client.end[1].cached_tokens for client in clients if client.end] == [0, 301, 300, 0]


def test_who_waits_for_a_prefix_goes_on_when_its_reader_has_gone() -> None:
    cache = KvCache(4096)
    plan = scheduler(cache, 2)
    clients = [Client(cache, number, [5] * 900 + [number], 1) for number in range(2)]
    for client in clients:
        plan.submit(client.chat)
    plan.step()
    plan.cancel(0)
    finish(plan)
    assert clients[1].end == ("length", Usage(901, 1, 512)) or clients[1].end == ("stop", Usage(901, 0, 512))


def test_answers_to_one_prompt_need_little_room() -> None:
    cache = KvCache(1000)
    plan = scheduler(cache, 4)
    clients = [Client(cache, number, [5] * 600, 50) for number in range(4)]
    for client in clients:
        plan.submit(client.chat)
    finish(plan)
    assert cache.used() < 1000 and sum(map(len, cache.batches)) < 600 + 4 * 51 + 4


def test_a_passage_that_repeats_itself_is_guessed() -> None:
    cache = KvCache(4096)
    prompt = next([1, n] for n in range(200) if len(alone([1, n], 300, 4096)[0].split()) == 300)
    for row_cost, most in ((0.02, 120), (0.4, 200)):
        cache.batches.clear()
        client = Client(cache, 1, prompt, 300)
        plan = scheduler(cache, 1, row_cost)
        plan.submit(client.chat)
        finish(plan)
        assert client.text == alone(prompt, 300, 4096)[0]
        assert len(cache.batches) < most
        cache.cells.clear()


def test_what_never_repeats_is_not_guessed() -> None:
    cache = KvCache(4096)
    prompt = max(([2 * n] for n in range(1, 400)), key=lambda prompt: len(alone(prompt, 100, 4096)[0].split()))
    client = Client(cache, 1, prompt, 100)
    plan = scheduler(cache, 1, 0.02)
    plan.submit(client.chat)
    finish(plan)
    assert {len(batch) for batch in cache.batches} == {1}


class Counting:
    """A constraint: the answer counts upwards by one from `begin`; of every ten tokens the last five are certain."""

    def __init__(self, begin: int, end: int) -> None:
        self._next, self._end = begin, end
        self.masked = 0

    def active(self) -> bool:
        return True

    def allowed(self, token: int) -> bool:
        return token == self._next

    def mask(self, logits: Logits) -> None:
        self.masked += 1
        logits[: self._next], logits[self._next + 1 :] = -np.inf, -np.inf
        if self._next == 77:
            logits[:] = -np.inf

    def accept(self, token: int) -> None:
        assert token == self._next, "a token that is forbidden was taken"
        if token == 66:
            raise Unanswerable("it cannot be followed")
        self._next += 1

    def forced(self) -> list[int]:
        return list(range(self._next, self._next + 5)) if self._next % 10 == 5 else []

    def done(self) -> bool:
        return self._next > self._end


@given(
    chats=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20), st.integers(1, 30), st.booleans()), min_size=1, max_size=4),
    row_cost=st.sampled_from((0.0, 0.5)),
)
def test_a_constraint_is_followed_to_its_end(chats: list[tuple[int, int, int, bool]], row_cost: float) -> None:
    cache = KvCache(4096)
    plan = scheduler(cache, 4, row_cost)
    clients = []
    for number, (begin, length, limit, logprobs) in enumerate(chats):
        client = Client(cache, number, [1, *range(1, 40)], limit)
        client.chat.constraint, client.chat.logprobs = Counting(begin, begin + length), 0 if logprobs else None
        clients.append(client)
        plan.submit(client.chat)
    finish(plan)
    for client, (begin, length, limit, _) in zip(clients, chats, strict=True):
        expected = [str(token) for token in range(begin, begin + min(length + 1, limit))]
        if "66" in expected or "77" in expected:
            assert client.error and client.end is None
            continue
        assert client.text.split() == expected
        # The token that ends it may be the last one that it may have.
        assert client.end and client.end[0] == ("stop" if limit > length else "length")
    # What each slot holds is what its chat has said.
    for slot in plan._slots.all:
        assert [token for token, _ in cache.cells.get(slot.sequence, [])] == slot.tokens[: slot.read]


def test_what_is_certain_costs_no_decode_of_its_own() -> None:
    cache = KvCache(4096)
    plan = scheduler(cache, 1)
    client = Client(cache, 1, [1], 100)
    client.chat.constraint = Counting(5, 24)
    plan.submit(client.chat)
    finish(plan)
    assert client.end == ("stop", Usage(1, 20))
    # 5 to 14 are drawn one by one, 15 to 19 come with 14, and behind them 20 to 24 are drawn.
    assert [len(batch) for batch in cache.batches] == [1] * 10 + [6] + [1] * 4


def test_a_failing_constraint_is_an_error_and_frees_the_slot() -> None:
    for begin, why in ((60, "cannot be followed"), (77, "no token may follow")):
        cache = KvCache(4096)
        plan = scheduler(cache, 1)
        client = Client(cache, 1, [1], 100)
        client.chat.constraint = Counting(begin, 100)
        plan.submit(client.chat)
        finish(plan)
        assert client.end is None and why in client.error
        other = Client(cache, 2, [1, 2], 1)
        plan.submit(other.chat)
        finish(plan)
        assert other.end
