"""What stands inside a sealed chat, and how an answer ends."""

from __future__ import annotations

import json
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.answering.answers import Answers, Deltas
from daemon.answering.local import LocalModel
from daemon.engine.interface import Candidate, ChatRequest, Delta, Embeddings, Request, TokenLogprob, ToolCallDelta, Usage
from daemon.errors import (
    Busy,
    InferenceError,
    ModelLoadError,
    NoMemory,
    NotFound,
    Refused,
    SwarmError,
    Unavailable,
    Unserved,
    UsageError,
    VerificationError,
)
from daemon.gossip.exchange import BODY_LIMIT, BROUGHT, MAX_CODES, MAX_HAVE, MAX_WANT, Words, body, parse
from daemon.membership import OpenSwarm
from daemon.peerchat import wire
from daemon.peerchat.seal import FRAME_LIMIT
from registry import announcement, strictjson
from registry import codes as short_codes
from registry.cid import leaf_cid
from registry.errors import Malformed
from registry.records import Offer
from tests.unit.strategies import DELTAS, REQUESTS

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


@given(delta=DELTAS)
def test_a_delta_arrives_whole(delta: Delta) -> None:
    assert joined(wire.frames(delta)) == replace(delta, usage=(delta.usage or Usage(0, 0)) if delta.finish else None)


def test_a_delta_of_any_size_arrives_in_frames_that_can_be_sealed() -> None:
    candidate = Candidate(b"\xff" * 300, -1.5)
    delta = Delta(
        "\x01" * 50_000,
        (ToolCallDelta(0, "call_1", "f", "\x02" * 20_000), ToolCallDelta(1, "call_2", "g")),
        (TokenLogprob(candidate, (candidate,) * 20),) * 50,
        "tool_calls",
        Usage(3, 4, 2),
    )
    frames = wire.frames(delta)
    assert all(len(frame) <= FRAME_LIMIT for frame in frames)
    whole = joined(frames)
    assert (whole.text, whole.logprobs, whole.finish, whole.usage) == (delta.text, delta.logprobs, delta.finish, delta.usage)
    assert [(call.index, call.id, call.name) for call in whole.tool_calls if call.id] == [(0, "call_1", "f"), (1, "call_2", "g")]
    assert "".join(call.arguments for call in whole.tool_calls) == "\x02" * 20_000


def joined(frames: list[bytes]) -> Delta:
    parsed = [wire.parse_frame(frame) for frame in frames]
    deltas = [one for one in parsed if isinstance(one, Delta)]
    assert len(deltas) == len(parsed) and all(one.finish is None for one in deltas[:-1])
    return Delta(
        "".join(one.text for one in deltas),
        tuple(call for one in deltas for call in one.tool_calls),
        tuple(logprob for one in deltas for logprob in one.logprobs),
        deltas[-1].finish,
        deltas[-1].usage,
    )


@pytest.mark.parametrize(("count", "dimensions"), [(1, 1), (3, 40 << 8), (2048, 12), (2, 65536), (1, 10 << 10)])
def test_vectors_arrive_in_frames_that_can_be_sealed(count: int, dimensions: int) -> None:
    sent = Embeddings(tuple(bytes([number % 127]) * 4 * dimensions for number in range(count)), 77)
    frames = list(wire.vector_frames(sent))
    assert all(len(frame) <= FRAME_LIMIT for frame in frames)
    joiner = wire.VectorsJoiner()
    pieces = [wire.parse_frame(frame) for frame in frames]
    received = [joiner.take(piece) for piece in pieces if isinstance(piece, wire.Vectors)]
    assert received == [None] * (len(frames) - 1) + [sent]


@pytest.mark.parametrize(("size", "count"), [(9, 2), (6, 1), (0, 1), (1 << 19, 1)])
def test_vectors_of_no_possible_length_are_refused(size: int, count: int) -> None:
    with pytest.raises(VerificationError):
        wire.VectorsJoiner().take(wire.Vectors(b"x" * size, count, 1))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_vectors_that_no_json_could_say_are_refused(number: float) -> None:
    joiner = wire.VectorsJoiner()
    with pytest.raises(VerificationError):
        joiner.take(wire.Vectors(array("f", [0.5, number]).tobytes()))


def test_vectors_without_end_are_refused() -> None:
    joiner = wire.VectorsJoiner()
    with pytest.raises(VerificationError):
        for _ in range(wire.VECTORS_LIMIT // 65536 + 1):
            joiner.take(wire.Vectors(bytes(65536)))


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (Busy("chat", "all slots are taken"), Busy),
        (UsageError("chat", "it does not fit the context"), UsageError),
        (Refused("model", "not trusted"), Refused),
        (NoMemory("model", "/home/me/secret.gguf does not fit"), NoMemory),
        (ModelLoadError("model", "/home/me/secret.gguf is broken"), ModelLoadError),
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


VECTORS_OF_NONE = [
    b'{"data":"!"}', b'{"data":"AAAA","more":1}', b'{"data":"AAAA","count":0,"prompt_tokens":1}',
    b'{"data":"AAAA","count":1,"prompt_tokens":-1}', b'{"data":"AAAA","count":2049,"prompt_tokens":1}', b'{"data":"AAAA","count":1}',
]  # fmt: skip


@pytest.mark.parametrize(
    "frame",
    [b"[]", b'{"text":"x"}', b'{"delta":{"text":1}}', b'{"delta":{},"more":1}', b'{"vectors":{}}', b'{"error":"x"}']
    + [b'{"vectors":%s}' % made for made in VECTORS_OF_NONE],
)
def test_frames_of_unknown_form_are_refused(frame: bytes) -> None:
    with pytest.raises(VerificationError):
        wire.parse_frame(frame)


@given(sizes=st.lists(st.integers(1, 8000), max_size=80), known=st.sampled_from([0, 3, 5000]))
def test_an_exchange_never_exceeds_its_limit(sizes: list[int], known: int) -> None:
    envelopes = [b'"' * (size // 2) + b"x" * (size - size // 2) for size in sizes]
    have = {f"{number:016x}": announcement.MAX_SEQUENCE for number in range(known)}
    want = {node: range(announcement.MAX_PAGES) for node in have}
    codes = [short_codes.code_of_cid(leaf_cid(b"%d" % number))[:7] for number in range(known)]
    data = body(Words(envelopes, have, want, codes), BROUGHT, OpenSwarm())
    assert len(data) <= BODY_LIMIT
    said = parse(data, BROUGHT, OpenSwarm())
    assert said.envelopes == envelopes[: len(said.envelopes)]
    assert said.have == dict(list(have.items())[:MAX_HAVE])
    assert said.want == {node: list(pages) for node, pages in list(want.items())[:MAX_WANT]}
    assert said.codes == tuple(codes[:MAX_CODES])


FORGED = [
    strictjson.dumps({"envelopes": [], field: value})
    for field, value in [
        ("have", None), ("have", []), ("have", {"x": 1}), ("have", {"f" * 16: "1"}), ("have", {"f" * 16: -1}),
        ("have", {"f" * 16: 1 << 60}), ("have", {f"{number:016x}": 1 for number in range(MAX_HAVE + 1)}), ("want", None),
        ("want", {"../": [1]}), ("want", {"f" * 16: 1}), ("want", {"f" * 16: [64]}), ("want", {"f" * 16: [-1]}),
        ("want", {"f" * 16: [True]}), ("want", {"f" * 16: [0] * 65}), ("want", {f"{number:016x}": [] for number in range(MAX_WANT + 1)}),
        ("codes", None), ("codes", {}), ("codes", [1]), ("codes", ["abcdef"]), ("codes", ["abcdefgh"]), ("codes", ["abcdef1"]),
        ("codes", ["ABCDEFG"]), ("codes", ["abcdefg"] * (MAX_CODES + 1)),
    ]
]  # fmt: skip


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"envelopes":{}}', b'{"envelopes":[null]}', b'{"envelopes":[],"x":1}', *FORGED])
def test_exchanges_that_are_none(data: bytes) -> None:
    with pytest.raises(Malformed):
        parse(data, BROUGHT, OpenSwarm())


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


# -- who is asked -------------------------------------------------------------------------------------------------------


class Gone:
    """A table whose nodes offer and are not known any more."""

    def __init__(self, offers: list[Offer]) -> None:
        self._offers = offers

    def offers(self) -> list[Offer]:
        return self._offers

    def offers_about(self, wanted: str, local: Sequence[Offer]) -> list[Offer]:
        return self._offers

    def stats(self) -> dict[str, Any]:
        return {}

    def peer(self, node: str) -> None:
        return None


class Here:
    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        yield END


async def test_this_node_is_asked_however_many_serve_the_model_better() -> None:
    nodes = ["ed25519:" + f"{number:02x}" * 32 for number in range(20)]
    offers = [Offer(node, leaf_cid(b"x"), None, None, None, "tiny", 9, True, free_slots=9, seeders=30) for node in nodes]
    local = LocalModel(replace(offers[0], free_slots=0, seeders=1), Here())  # type: ignore[arg-type]  # only answers matter
    nothing: Any = None
    table: Any = Gone(offers[1:])
    answers = Answers(table, lambda: [local], lambda: [local.offer], ways=nothing, http=nothing, clock=lambda: 0.0, search=nothing)
    for model in ("tiny", None):
        answer = await answers.open(model, CHAT)
        assert answer.answered_by == nodes[0]
        await answer.deltas.aclose()


@pytest.mark.parametrize(
    ("via", "searched"), [("auto", 1), ("never", 1), ("ed25519:" + "ef" * 32, 0)]
)
async def test_who_names_a_relay_is_shown_to_nobody_by_a_search(via: str, searched: int) -> None:
    asked: list[str | None] = []

    async def search(ref: str | None, found: Callable[[], bool]) -> None:
        asked.append(ref)

    nothing: Any = None
    table: Any = Gone([])
    answers = Answers(table, lambda: [], lambda: [], ways=nothing, http=nothing, clock=lambda: 0.0, search=search)
    with pytest.raises(NotFound):
        await answers.open("abcdefg", CHAT, via=via)
    assert asked == ["abcdefg"] * searched
