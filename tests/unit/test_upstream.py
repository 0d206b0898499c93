"""What an upstream is asked, how its answers and refusals are read, and where a node may connect."""

from __future__ import annotations

import base64
import json
import math
from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.config import Network
from daemon.engine.codec import MAX_CALLS
from daemon.engine.interface import Candidate, ChatRequest, CompletionRequest, Delta, EmbeddingRequest, Request, Sampling, Tool, Usage
from daemon.engine.upstream import form
from daemon.engine.upstream.reach import allowed, open_session
from daemon.engine.upstream.reading import MAX_EVENT, AnswerReader, EventReader, embeddings, models
from daemon.errors import Busy, ContextOverflow, InferenceError, ModelLoadError, SwarmError, Unserved, UsageError
from registry.errors import Malformed
from tests.unit.strategies import REQUESTS

CHAT = ChatRequest(({"role": "user", "content": "hi"},))
KEY = "sk-very-secret"


# -- where ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "base"),
    [
        ("http://127.0.0.1:11434", "http://127.0.0.1:11434/v1"),
        ("http://127.0.0.1:11434/", "http://127.0.0.1:11434/v1"),
        ("https://api.example.com/v1/", "https://api.example.com/v1"),
        ("https://example.com/openai/deployments/x", "https://example.com/openai/deployments/x"),
        ("http://[::1]:8080/v1", "http://[::1]:8080/v1"),
    ],
)
def test_a_base_url(given_: str, base: str) -> None:
    assert form.base_url(given_) == base


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1:11434", "ftp://a/v1", "http://user:pass@a/v1", "http://a/v1?key=1", "http://a/v1#x", "http://a\\@b/", "http://127.1/",
     "http://0x7f000001/", "http://2130706433/", "http://a:0/", "http://a:99999/", "http://a/../v1", "http://a /v1", "http:///v1"],
)  # fmt: skip
def test_urls_that_are_refused(text: str) -> None:
    with pytest.raises(Malformed):
        form.base_url(text)


@pytest.mark.parametrize(
    ("address", "networks"),
    [
        ("127.0.0.1", "public lan loopback"), ("127.9.9.9", "public lan loopback"), ("::1", "public lan loopback"),
        ("::ffff:127.0.0.1", "public lan loopback"), ("10.1.2.3", "public lan"), ("192.168.0.9", "public lan"),
        ("172.16.0.1", "public lan"), ("fd00::1", "public lan"), ("::ffff:10.0.0.1", "public lan"), ("8.8.8.8", "public"),
        ("2606:4700::1111", "public"), ("172.32.0.1", "public"), ("::ffff:8.8.8.8", "public"),
        ("0.0.0.0", ""), ("::", ""), ("169.254.169.254", ""), ("fe80::1", ""), ("224.0.0.1", ""), ("255.255.255.255", ""),
        ("::ffff:169.254.169.254", ""), ("::ffff:0.0.0.0", ""),
    ],
)  # fmt: skip
def test_row_21_where_a_node_may_connect(address: str, networks: str) -> None:
    every: tuple[Network, ...] = ("public", "lan", "loopback")
    assert [network for network in every if allowed(address, network)] == networks.split()


async def test_an_address_outside_the_network_is_refused_at_once() -> None:
    for url, network, with_key in (
        ("http://8.8.8.8/v1", "loopback", False),
        ("http://8.8.8.8/v1", "public", True),
        ("http://[::]/v1", "public", False),
    ):
        with pytest.raises(UsageError, match="may not be connected to"):
            open_session(url, network, with_key=with_key)  # type: ignore[arg-type]  # one of the three
    for url in ("https://8.8.8.8/v1", "http://10.0.0.1/v1"):
        await open_session(url, "public", with_key=True).close()


# -- questions ------------------------------------------------------------------------------------------------------------


@given(request=REQUESTS)
def test_every_request_is_json_and_has_no_default_of_ours(request: Request | EmbeddingRequest) -> None:
    if isinstance(request, EmbeddingRequest):
        told = form.embedding_body("m", request)
    else:
        told = form.body("m", request, "max_tokens")
        bare = form.body("m", replace(request, sampling=Sampling()), "max_tokens")
        for name in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "stop", "logit_bias", "logprobs", "max_tokens"):
            assert name not in bare
            assert (name in told) == (getattr(request.sampling, name) != getattr(Sampling(), name))
    assert json.loads(json.dumps(told))["model"] == "m"


def test_a_chat_in_openais_fields() -> None:
    sampling = Sampling(7, 0.0, 0.5, 3, 0.1, 1.1, 0.2, 0.3, 42, ("x",), {5: -100.0}, 2)
    tools = (Tool("f", "does", {"type": "object", "properties": {"z": {}, "a": {}}}),)
    request = ChatRequest(CHAT.messages, sampling, tools, "required", "f", False, {"type": "object", "required": ["a"]})
    assert form.body("m", request, "max_completion_tokens") == {
        "model": "m", "stream": True, "stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "f", "description": "does", "parameters": tools[0].parameters}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": request.schema, "strict": True}},
        "temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repeat_penalty": 1.1, "frequency_penalty": 0.2,
        "presence_penalty": 0.3, "seed": 42, "stop": ["x"], "logit_bias": {"5": -100.0}, "logprobs": True, "top_logprobs": 2,
        "max_completion_tokens": 7,
    }  # fmt: skip
    assert form.body("m", replace(CHAT, schema={"type": "object"}), "max_tokens")["response_format"] == {"type": "json_object"}


def test_a_completion_in_openais_fields() -> None:
    told = form.body("m", CompletionRequest((1, 2), Sampling(max_tokens=3, logprobs=0)), "max_completion_tokens")
    assert told == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "prompt": [1, 2],
        "max_tokens": 3,
        "logprobs": 0,
    }


# -- events ---------------------------------------------------------------------------------------------------------------


@given(cut=st.integers(1, 40), crlf=st.booleans())
def test_events_are_read_however_they_are_cut(cut: int, crlf: bool) -> None:
    stream = b': comment\n\ndata: {"a":1}\n\nevent: x\nid: 7\ndata:two\ndata: lines\n\n\n\ndata: [DONE]'
    stream = stream.replace(b"\n", b"\r\n") if crlf else stream
    reader = EventReader()
    found = [event for at in range(0, len(stream), cut) for event in reader.feed(stream[at : at + cut])]
    assert [*found, *reader.end()] == [b'{"a":1}', b"two\nlines", b"[DONE]"]


@pytest.mark.parametrize("piece", [b"x" * 65536, b"data: " + b"x" * 65536 + b"\n", b"data:\n" * 10_000])
def test_an_event_without_end_is_refused(piece: bytes) -> None:
    reader = EventReader()
    with pytest.raises(Malformed):
        for _ in range(2 * MAX_EVENT // 10_000):
            reader.feed(piece)


# -- answers --------------------------------------------------------------------------------------------------------------


def read(*events: Any, request: Request = CHAT) -> list[Delta]:
    reader = AnswerReader(request)
    taken = [reader.take(json.dumps(event).encode(), KEY) for event in events]
    return [*(delta for delta in taken if delta is not None), reader.end()]


def chunk(delta: Any = None, finish: Any = None, **more: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish, **more}]}


def call(**fields: Any) -> dict[str, Any]:
    return chunk({"tool_calls": [fields]})


USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}}


def test_a_chat_answer() -> None:
    found = read(
        chunk({"role": "assistant", "content": ""}), chunk({"content": "a", "reasoning_content": "hm"}), chunk({"content": "b"}),
        chunk({}, "stop"), USAGE,
    )  # fmt: skip
    assert found == [Delta("a"), Delta("b"), Delta(finish="stop", usage=Usage(9, 2, 4))]
    assert read(chunk({"refusal": "no"}), chunk(None, "length")) == [Delta("no"), Delta(finish="length", usage=Usage(0, 0))]


def test_a_completion_answer() -> None:
    request = CompletionRequest("x", Sampling(logprobs=1))
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -2.0, "a": -0.5}], "text_offset": [0]}
    event = {"choices": [{"index": 0, "text": "a", "finish_reason": None, "logprobs": logprobs}]}
    first, last = read(event, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}, request=request)
    assert first.text == "a" and first.logprobs[0].likeliest == (Candidate(b"a", -0.5), Candidate(b"b", -2.0))
    assert last.finish == "length"


def test_logprobs_of_a_chat() -> None:
    likely = {"token": "\ufffd", "bytes": [226, 152], "logprob": -0.25}
    content = [{**likely, "top_logprobs": [likely, {"token": "no", "logprob": -9999}]}]
    asked = replace(CHAT, sampling=Sampling(logprobs=2))
    first, _ = read(chunk({"content": "x"}, logprobs={"content": content}), chunk(None, "stop"), request=asked)
    [one] = first.logprobs
    assert one.drawn == Candidate(b"\xe2\x98", -0.25) and one.likeliest == (one.drawn, Candidate(b"no", -9999.0))
    assert read(chunk({"content": "x"}, logprobs={"content": content}), chunk(None, "stop"))[0] == Delta("x")


def test_tool_calls() -> None:
    found = read(
        call(index=0, id="call_1", type="function", function={"name": "f", "arguments": ""}),
        call(index=0, function={"arguments": '{"a":'}),
        call(index=0, id="call_1", function={"name": "f", "arguments": "1}"}),
        call(index=1, function={"name": "g", "arguments": "{}"}),
        chunk(None, "stop"),
    )
    calls = [one for delta in found for one in delta.tool_calls]
    assert [(one.index, one.name, one.arguments) for one in calls] == [(0, "f", ""), (0, None, '{"a":'), (0, None, "1}"), (1, "g", "{}")]
    assert calls[0].id == "call_1" and calls[1].id is None and (calls[3].id or "").startswith("call_")
    assert found[-1].finish == "tool_calls"


def test_tool_calls_without_numbers() -> None:
    found = read(
        call(function={"name": "f", "arguments": "1"}), call(function={"arguments": "2"}), call(function={"name": "g"}), chunk(None, "stop")
    )
    assert [(one.index, one.name, one.arguments) for delta in found for one in delta.tool_calls] == [
        (0, "f", "1"),
        (0, None, "2"),
        (1, "g", ""),
    ]


@pytest.mark.parametrize(
    "event",
    [
        [], "text", {"choices": {}}, {"choices": [1]}, {"choices": [{"index": 1, "delta": {}}]}, {"choices": [{}, {}]},
        chunk({"content": 7}), chunk(["x"]), chunk(None, "sleepy"), chunk({"tool_calls": {}}), call(index=1, function={"name": "f"}),
        call(index=-1, function={"name": "f"}), call(index=0, function={"arguments": "x"}), call(index=0, function={"name": "../f"}),
        call(index=0, function={"name": "f", "arguments": {}}),
        call(index=0, id="x" * 65, function={"name": "f"}), call(index="0", function={"name": "f"}), call(index=0, function="f"),
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"name": "f"}}] * (MAX_CALLS + 1)}}]},
        chunk({"content": "x"}, logprobs={"content": [{"token": "x"}]}), chunk({"content": "x"}, logprobs={"content": [7]}),
        chunk({"content": "x"}, logprobs={"content": [{"token": "x", "logprob": -1, "bytes": [256]}]}),
        chunk({"content": "x"}, logprobs={"content": [{"token": "x", "logprob": -1, "bytes": 1 << 40}]}),
        chunk({"content": "x"}, logprobs={"tokens": ["a"], "token_logprobs": []}),
    ],
)  # fmt: skip
def test_events_of_another_form_are_refused(event: Any) -> None:
    with pytest.raises(Malformed):
        AnswerReader(replace(CHAT, sampling=Sampling(logprobs=1))).take(json.dumps(event).encode(), None)


def test_what_is_cut_off_or_withheld_is_no_end() -> None:
    with pytest.raises(InferenceError, match="without saying how"):
        read(chunk({"content": "a"}))
    with pytest.raises(InferenceError, match="content filter"):
        read(chunk({"content": "a"}), chunk(None, "content_filter"))


NAMES = ["choices", "delta", "usage", "error", "content", "tool_calls", "index", "function", "logprobs"]
noises = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner),
    max_leaves=12,
)


@given(noise=noises)
def test_noise_in_place_of_an_event_is_malformed_or_harmless(noise: Any) -> None:
    reader = AnswerReader(CHAT)
    try:
        reader.take(json.dumps(noise).encode("utf-8", "replace"), KEY)
    except (Malformed, SwarmError):
        pass
    else:
        assert reader.finish is None


# -- vectors and lists ----------------------------------------------------------------------------------------------------


def test_vectors_as_numbers_and_as_base64_are_of_length_1() -> None:
    coded = base64.b64encode(array("f", [0.0, 1.0]).tobytes()).decode()
    data = [{"index": 1, "embedding": coded}, {"index": 0, "embedding": [3, 4]}]
    found = embeddings({"data": data, "usage": {"prompt_tokens": 5}}, 2)
    assert found.prompt_tokens == 5
    for vector, expected in zip(found.vectors, ([0.6, 0.8], [0.0, 1.0]), strict=True):
        assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(array("f", vector), expected, strict=True))


def vector(index: int, value: Any) -> dict[str, Any]:
    return {"index": index, "embedding": value}


@pytest.mark.parametrize(
    "data",
    [
        None, [], [vector(0, [1])], [vector(0, [1]), vector(0, [1])], [vector(0, [1]), vector(2, [1])], [vector(0, [1]), vector(1, [1, 2])],
        [vector(0, []), vector(1, [])], [vector(0, "!"), vector(1, "!")], [vector(0, "AAA="), vector(1, "AAA=")], [7, 7],
        [vector(0, [1e999]), vector(1, [1])], [vector(0, ["1"]), vector(1, [1])], [vector(0, [1.0] * 65537), vector(1, [1.0] * 65537)],
    ],
)  # fmt: skip
def test_vectors_of_another_form_are_refused(data: Any) -> None:
    with pytest.raises(Malformed):
        embeddings({"data": data}, 2)


def test_a_list_of_models() -> None:
    assert models({"object": "list", "data": [{"id": "a"}, {"id": "b", "more": 1}]}) == ["a", "b"]
    # Another node lists codes; its models have names as well.
    named = [{"id": "pecbsxp", "name": "smol"}, {"id": "a", "name": "a"}, {"id": "b", "name": 7}]
    assert models({"data": named}) == ["pecbsxp", "a", "b", "smol"]
    for wrong in (None, {}, {"data": {}}, {"data": [{"id": 7}]}, {"data": ["a"]}, {"data": [{"id": "a"}] * 5000}):
        with pytest.raises(Malformed):
            models(wrong)


# -- refusals -------------------------------------------------------------------------------------------------------------


def error(message: str = "", **fields: Any) -> bytes:
    return json.dumps({"error": {"message": message, **fields}}).encode()


@pytest.mark.parametrize(
    ("status", "answer", "kind"),
    [
        (401, error("Incorrect API key provided"), InferenceError),
        (403, b"<html>", InferenceError),
        (404, error("no such model", code="model_not_found"), ModelLoadError),
        (404, b"404 page not found", ModelLoadError),
        (429, error("slow down"), Busy),
        (400, error("top_k is not known", type="invalid_request_error", param="top_k"), UsageError),
        (422, b'{"detail":"wrong"}', UsageError),
        (400, error("too long", code="context_length_exceeded"), ContextOverflow),
        (400, error("the request exceeds the available context size", type="exceed_context_size_error"), ContextOverflow),
        (400, error("This model's maximum context length is 4096 tokens."), ContextOverflow),
        (301, b"", InferenceError),
        (500, error("boom"), Unserved),
        (503, b"\xff\xfe", Unserved),
        (418, b"[" * 10_000, Unserved),
    ],
)
def test_refusals_are_typed(status: int, answer: bytes, kind: type[SwarmError]) -> None:
    assert type(form.failure(status, answer, KEY, "chat")) is kind


def test_a_missing_route_is_told_from_a_missing_model() -> None:
    for status, answer in (
        (404, b"404 page not found"),
        (404, b'{"detail":"Not Found"}'),
        (405, b""),
        (501, error("not supported", code=501)),
    ):
        missing = form.failure(status, answer, KEY, "embeddings")
        assert isinstance(missing, form.Lacking) and missing.capability == "embeddings"
    assert isinstance(form.failure(404, error("no such model"), KEY, "embeddings"), ModelLoadError)


@given(text=st.text(max_size=600))
def test_the_upstreams_words_are_short_harmless_and_without_the_key(text: str) -> None:
    told = form.failure(400, error(text + KEY + text), KEY, "chat")
    assert str(told).isprintable() and len(str(told)) < 2 * form.REASON
    assert KEY not in str(told)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"type": "invalid_request_error"}, UsageError),
        ({"code": "context_length_exceeded"}, ContextOverflow),
        ({"code": 429}, Busy),
        ({"type": "server_error"}, InferenceError),
        ({}, InferenceError),
    ],
)
def test_an_error_in_the_stream_is_typed(fields: dict[str, Any], kind: type[SwarmError]) -> None:
    with pytest.raises(SwarmError) as caught:
        AnswerReader(CHAT).take(error(f"it is {KEY}", **fields), KEY)
    assert type(caught.value) is kind and KEY not in str(caught.value)
