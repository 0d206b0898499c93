"""Requests and answers cross pipes and nodes unchanged, and nothing else is taken for one."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine import codec
from daemon.engine.interface import CompletionRequest, Delta, EmbeddingRequest, Embeddings, Request, Tool
from registry.errors import Malformed
from tests.unit.strategies import DELTAS, REQUESTS

CHAT = {"kind": "chat", "messages": [{"role": "user", "content": "hi"}]}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"name": "f", "description": "", "parameters": {}}


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@given(request=REQUESTS)
def test_requests_arrive_as_they_were_asked(request: Request) -> None:
    assert codec.load_request(through_json(codec.dump_request(request))) == request


@given(delta=DELTAS)
def test_deltas_arrive_as_they_were_said(delta: Delta) -> None:
    assert codec.load_delta(through_json(codec.dump_delta(delta))) == delta


@given(vectors=st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=3), max_size=4), count=st.integers(0, 99))
def test_vectors_arrive_bit_by_bit(vectors: list[list[float]], count: int) -> None:
    embeddings = Embeddings(tuple(struct.pack("<3f", *vector) for vector in vectors), count)
    assert codec.load_embeddings(through_json(codec.dump_embeddings(embeddings))) == embeddings


def test_texts_and_tokens_are_told_apart() -> None:
    for request in (CompletionRequest((1, 2)), CompletionRequest("1"), EmbeddingRequest(("a", (7,)))):
        assert codec.load_request(through_json(codec.dump_request(request))) == request


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": {"max_tokens": 1 << 63}},
        {"sampling": {"max_tokens": 0}},
        {"sampling": {"max_tokens": True}},
        {"sampling": {"temperature": -1}},
        {"sampling": {"temperature": "hot"}},
        {"sampling": {"temperature": float("nan")}},
        {"sampling": {"top_p": 2}},
        {"sampling": {"top_k": 1.5}},
        {"sampling": {"stop": ["x" * 257]}},
        {"sampling": {"stop": [""]}},
        {"sampling": {"logit_bias": [[1, 101]]}},
        {"sampling": {"logit_bias": [[-1, 1]]}},
        {"sampling": {"logit_bias": {"1": 1}}},
        {"sampling": {"logprobs": 21}},
        {"sampling": {"more": 1}},
        {"sampling": []},
        {"messages": []},
        {"messages": [{"role": "root", "content": "x"}]},
        {"messages": [{"role": "user", "content": ["x"]}]},
        {"messages": [{"role": "user", "content": "x", "more": 1}]},
        {"messages": [{"role": ["user"], "content": "x"}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
        {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": {"name": "a b", "arguments": ""}}]}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{**CALL, "more": 1}]}]},
        {"tools": [{**TOOL, "name": "no spaces"}]},
        {"tools": [TOOL, TOOL]},
        {"tools": [{**TOOL, "parameters": {"description": "x" * codec.MAX_SCHEMA}}]},
        {"tool_choice": "required"},
        {"tools": [TOOL], "forced_tool": "g", "tool_choice": "required"},
        {"tools": [TOOL], "forced_tool": "f"},
        {"schema": []},
        {"kind": "sum"},
        {"more": 1},
    ],
)
def test_what_is_no_request_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        codec.load_request({**CHAT, **change})


@pytest.mark.parametrize(
    "given", [None, [], 7, {"kind": "completion"}, {"kind": "embedding", "inputs": []}, {"kind": "completion", "prompt": [-1]}]
)
def test_neither_is_this(given: Any) -> None:
    with pytest.raises(Malformed):
        codec.load_request(given)


@pytest.mark.parametrize(
    "delta",
    [
        [],
        {"text": 1},
        {"text": "x", "finish": "nonsense", "usage": [1, 2, 3]},
        {"finish": "stop"},
        {"finish": "stop", "usage": [1, 2]},
        {"tool_calls": [[0, None, "no spaces", ""]]},
        {"tool_calls": [[-1, None, None, ""]]},
        {"logprobs": [[["", 1.0], []]]},
        {"logprobs": [[["*", -1.0], []]]},
        {"more": 1},
    ],
)
def test_what_is_no_delta_is_refused(delta: Any) -> None:
    with pytest.raises(Malformed):
        codec.load_delta(delta)


@pytest.mark.parametrize("vectors", [["AAA="], [""], ["AAAAAAAAAAA=", "AAAAAA=="], "AAAA", [1]])
def test_what_is_no_vector_is_refused(vectors: Any) -> None:
    with pytest.raises(Malformed):
        codec.load_embeddings({"vectors": vectors, "prompt_tokens": 1})


def test_a_tool_may_take_nothing() -> None:
    assert codec.load_request({**CHAT, "tools": [TOOL]}).tools == (Tool("f", "", {}),)  # type: ignore[union-attr]  # it is a chat
