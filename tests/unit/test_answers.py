"""What stands inside a sealed chat, and how an answer ends."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.interface import ChatRequest, Delta, Request, Usage
from daemon.errors import (
    Busy,
    InferenceError,
    ModelLoadError,
    NoMemory,
    Refused,
    SwarmError,
    Unavailable,
    Unserved,
    UsageError,
    VerificationError,
)
from daemon.swarm import wire
from daemon.swarm.answers import Deltas
from daemon.swarm.exchange import BODY_LIMIT, body, parse
from daemon.swarm.seal import FRAME_LIMIT
from registry.errors import Malformed
from tests.unit.strategies import REQUESTS

CHAT = ChatRequest(({"role": "user", "content": "hi"},))


@given(request=REQUESTS)
def test_a_question_arrives_as_it_was_asked(request: Request) -> None:
    assert wire.parse_question(wire.question("bafy", request)) == ("bafy", request)


def test_a_schema_keeps_the_order_of_its_properties() -> None:
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    _, request = wire.parse_question(wire.question("bafy", ChatRequest(CHAT.messages, schema=schema)))
    assert isinstance(request, ChatRequest) and request.schema is not None
    assert list(request.schema["properties"]) == ["z", "a"]


@pytest.mark.parametrize("change", [{"cid": 7}, {"cid": ""}, {"more": 1}, {"request": None}, {"request": {"kind": "sum"}}])
def test_questions_that_no_node_of_ours_would_ask_are_refused(change: dict[str, object]) -> None:
    fields = json.loads(wire.question("bafy", CHAT)) | change
    with pytest.raises(UsageError):
        wire.parse_question(json.dumps(fields).encode())


@given(noise=st.binary(max_size=200))
def test_noise_is_no_question_and_no_frame(noise: bytes) -> None:
    with pytest.raises(UsageError):
        wire.parse_question(noise)
    with pytest.raises(VerificationError):
        wire.parse_frame(b"x" + noise)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30_000), finish=st.sampled_from([None, "stop", "length"]))
def test_deltas_arrive_in_frames_of_padded_length(text: str, finish: object) -> None:
    delta = Delta(text, finish=finish, usage=Usage(3, 4) if finish else None)  # type: ignore[arg-type]  # the strategy draws from its values
    frames = wire.frames(delta)
    assert all(len(frame) % 64 == 0 and len(frame) <= FRAME_LIMIT for frame in frames)
    parsed = [wire.parse_frame(frame) for frame in frames]
    assert all(isinstance(one, Delta) for one in parsed)
    assert "".join(one.text for one in parsed if isinstance(one, Delta)) == text
    last = parsed[-1]
    assert isinstance(last, Delta) and (last.finish, last.usage) == (delta.finish, delta.usage)


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (Busy("chat", "all slots are taken"), Busy),
        (UsageError("chat", "it does not fit the context"), UsageError),
        (Refused("model", "not trusted"), Refused),
        (NoMemory("model", "/home/me/secret.gguf does not fit"), NoMemory),
        (ModelLoadError("model", "/home/me/secret.gguf is broken"), InferenceError),
        (Unavailable("worker", "/home/me/secret.sock is gone"), InferenceError),
    ],
)
def test_a_failure_arrives_as_its_kind_without_our_paths(sent: SwarmError, received: type[SwarmError]) -> None:
    frame = wire.error_frame(sent)
    error = wire.parse_frame(frame)
    assert type(error) is received
    assert b"secret" not in frame


def test_text_of_a_peer_cannot_drive_the_terminal() -> None:
    error = wire.parse_frame(json.dumps({"error": {"kind": "Busy", "why": "\x1b[2J\u202e" + "x" * 999, "hint": "\n"}}).encode())
    assert isinstance(error, Busy)
    assert str(error).isprintable() and len(str(error)) < 400


@pytest.mark.parametrize(
    "frame", [b"[]", b'{"text":"x"}', b'{"delta":{"text":1}}', b'{"delta":{},"more":1}', b'{"embeddings":{}}', b'{"error":"x"}']
)
def test_frames_of_unknown_form_are_refused(frame: bytes) -> None:
    with pytest.raises(VerificationError):
        wire.parse_frame(frame)


@given(sizes=st.lists(st.integers(1, 8000), max_size=80))
def test_an_exchange_never_exceeds_its_limit(sizes: list[int]) -> None:
    envelopes = [b'"' * (size // 2) + b"x" * (size - size // 2) for size in sizes]
    data = body(envelopes)
    assert len(data) <= BODY_LIMIT
    assert parse(data) == envelopes[: len(parse(data))]


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"envelopes":{}}', b'{"envelopes":[null]}', b'{"envelopes":[],"x":1}'])
def test_exchanges_that_are_none(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse(data)


class Said:
    """The rest of an answer; notes whether it was closed."""

    def __init__(self, *deltas: Delta, then: Exception | None = None) -> None:
        self.closed = False
        self.verdicts: list[bool] = []
        self._deltas = deltas
        self._then = then

    async def _rest(self) -> AsyncGenerator[Delta, None]:
        try:
            for delta in self._deltas:
                yield delta
            if self._then is not None:
                raise self._then
        finally:
            self.closed = True

    async def begun(self) -> Deltas:
        rest = self._rest()
        return Deltas(await anext(rest), rest, self.verdicts.append)


END = Delta(finish="stop", usage=Usage(1, 1))


async def test_an_answer_that_ends_well() -> None:
    said = Said(Delta("a"), Delta("b"), END)
    assert [delta async for delta in await said.begun()] == [Delta("a"), Delta("b"), END]
    assert said.closed and said.verdicts == [True]


async def test_an_answer_that_stops_without_saying_how_is_an_error() -> None:
    said = Said(Delta("a"), Delta("b"))
    deltas = await said.begun()
    with pytest.raises(InferenceError):
        [delta async for delta in deltas]
    assert said.closed and said.verdicts == [False]


async def test_an_answer_that_fails() -> None:
    said = Said(Delta("a"), then=Unserved("peer", "gone"))
    deltas = await said.begun()
    assert await anext(deltas) == Delta("a")
    with pytest.raises(Unserved):
        await anext(deltas)
    assert said.verdicts == [False]


async def test_an_answer_that_nobody_wants_is_closed_even_before_it_was_read() -> None:
    said = Said(Delta("a"), END)
    deltas = await said.begun()
    await deltas.aclose()
    await deltas.aclose()
    assert said.closed and said.verdicts == []
    with pytest.raises(StopAsyncIteration):
        await anext(deltas)


async def test_one_word_answers_end_too() -> None:
    said = Said(replace(END, text="yes"))
    assert [delta.text async for delta in await said.begun()] == ["yes"]
    assert said.closed and said.verdicts == [True]
