"""R25: a field is honoured, harmless, or refused; nothing is silently dropped."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.api.body import Fields
from daemon.api.openai import IGNORED, NEUTRAL, Asked, parse
from daemon.engine.interface import ChatRequest, Sampling
from daemon.errors import UsageError

USER = {"role": "user", "content": "hi"}


def asked(**fields: Any) -> Asked:
    return parse(Fields({"model": "m", "messages": [USER], **fields}))


def test_what_is_not_given_is_as_the_engine_has_it() -> None:
    assert asked().request == ChatRequest(messages=(USER,))
    assert asked(temperature=None, max_tokens=None, stop=None, tools=None, stream=None).request == ChatRequest(messages=(USER,))


def test_every_field_arrives() -> None:
    given = {
        "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "frequency_penalty": -2, "presence_penalty": 2, "seed": 3,
        "stop": ["a", "b"],
    }  # fmt: skip
    request = asked(max_tokens=5, **given).request
    assert request == ChatRequest((USER,), Sampling(max_tokens=5, **{**given, "stop": ("a", "b")}))
    assert asked(max_tokens=5, max_completion_tokens=4).request.sampling.max_tokens == 4
    assert (asked(stream=True).stream, asked(stream=True, stream_options={"include_usage": True}).include_usage) == (True, True)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 2**63}, {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": "5"}, {"max_tokens": True},
        {"temperature": -1}, {"temperature": 2.1}, {"temperature": float("inf")}, {"temperature": float("nan")}, {"temperature": 10**400},
        {"temperature": "0"}, {"top_p": 2}, {"seed": 2**63}, {"seed": 1.0}, {"stop": ""}, {"stop": ["a"] * 5}, {"stop": [1]}, {"stop": {}},
        {"stream": 1}, {"stream_options": {}}, {"stream": True, "stream_options": {"x": 1}}, {"stream": True, "stream_options": []},
        {"model": ""}, {"model": 1}, {"model": "a\0b"}, {"model": "m" * 5000}, {"surprise": 1}, {"n": 2}, {"n": True}, {"logprobs": True},
        {"tools": [{"type": "function"}]}, {"tool_choice": "required"}, {"response_format": {"type": "json_object"}},
        {"logit_bias": {"1": 1}}, {"modalities": ["audio"]}, {"reasoning_effort": "high"},
    ],
)  # fmt: skip
def test_refused_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        asked(**fields)


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "hi", {}, [1], [{}], [{"role": "user"}], [{"role": "user", "content": ""}], [{"role": "user", "content": "  \n"}],
        [{"role": "tool", "content": "x"}], [{"role": ["user"], "content": "x"}], [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "x", "surprise": 1}], [{"role": "assistant", "content": "x", "tool_calls": [1]}], [USER] * 5000,
    ],
)  # fmt: skip
def test_refused_messages(messages: Any) -> None:
    with pytest.raises(UsageError):
        parse(Fields({"model": "m", "messages": messages}))


def test_messages() -> None:
    given = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []},
        USER,
    ]
    expected = (("system", "d"), ("user", "ab"), ("assistant", ""), ("user", "hi"))
    assert [(m["role"], m["content"]) for m in parse(Fields({"model": "m", "messages": given})).request.messages] == list(expected)


def test_harmless_fields_change_nothing() -> None:
    everything = {name: {"a": "b"} for name in IGNORED} | {name: values[0] for name, values in NEUTRAL.items()}
    assert asked(**everything) == asked()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(st.dictionaries(st.sampled_from(["messages", "temperature", "stop", "stream", "stream_options", "seed", "n", "x"]), json_values))
def test_anything_else_is_an_error_of_the_caller(fields: dict[str, Any]) -> None:
    try:
        parse(Fields({"model": "m", **fields}))
    except UsageError as error:
        assert error.http_status == 400
        assert error.message.isascii()
