"""R25: a field is honoured, harmless, or refused; nothing is silently dropped. What is let in, every node understands."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.api.body import Fields
from daemon.api.openai.requests import (
    IGNORED,
    LEGACY_MAX_TOKENS,
    MAX_CHOICES,
    NEUTRAL,
    AskedChat,
    AskedCompletion,
    AskedEmbeddings,
    chat,
    completion,
    embeddings,
)
from daemon.engine.codec import dump_request, load_request
from daemon.engine.interface import ChatRequest, CompletionRequest, EmbeddingRequest, Request, Sampling, Tool
from daemon.errors import UsageError

USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA, "strict": True}}
OTHER = {"type": "function", "function": {"name": "time"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}


def asked(**fields: Any) -> AskedChat:
    return chat(Fields({"model": "m", "messages": [USER], **fields}))


def request(**fields: Any) -> ChatRequest:
    """The only request; it comes over the wire as it went."""
    (found,) = asked(**fields).requests
    assert understood(found) == found
    return found


def text(**fields: Any) -> AskedCompletion:
    return completion(Fields({"model": "m", "prompt": "once", **fields}))


def vectors(**fields: Any) -> AskedEmbeddings:
    return embeddings(Fields({"model": "m", "input": "once", **fields}))


def understood(sent: Request | EmbeddingRequest) -> Request | EmbeddingRequest:
    return load_request(json.loads(json.dumps(dump_request(sent))))


# -- chats --------------------------------------------------------------------------------------------------------------


def test_what_is_not_given_is_as_the_engine_has_it() -> None:
    assert request() == ChatRequest(messages=(USER,))
    assert request(temperature=None, max_tokens=None, stop=None, tools=None, stream=None) == ChatRequest(messages=(USER,))
    assert request(n=1, logprobs=False, top_logprobs=0, tools=[], tool_choice="none", logit_bias={}, response_format={"type": "text"}) == (
        ChatRequest(messages=(USER,))
    )


def test_every_field_arrives() -> None:
    given = {
        "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repeat_penalty": 1.5, "frequency_penalty": -2, "presence_penalty": 2,
        "seed": 3, "stop": ["a", "b"],
    }  # fmt: skip
    found = request(max_tokens=5, logit_bias={"7": -100, "8": 0.5}, logprobs=True, top_logprobs=20, **given)
    expected = Sampling(max_tokens=5, logit_bias={7: -100, 8: 0.5}, logprobs=20, **{**given, "stop": ("a", "b")})
    assert found == ChatRequest((USER,), expected)
    assert request(max_tokens=5, max_completion_tokens=4).sampling.max_tokens == 4
    assert request(logprobs=True).sampling.logprobs == 0
    streaming = asked(stream=True, stream_options={"include_usage": True}).streaming
    assert (streaming.wanted, streaming.include_usage) == (True, True)


def test_every_choice_has_its_own_seed() -> None:
    assert [one.sampling.seed for one in asked(n=3, seed=7).requests] == [7, 8, 9]
    assert [one.sampling.seed for one in asked(n=2, seed=2**63 - 1).requests] == [2**63 - 1, -(2**63)]
    assert [one.sampling.seed for one in asked(n=MAX_CHOICES).requests] == [None] * MAX_CHOICES


def test_tools() -> None:
    found = request(tools=[FUNCTION, OTHER], parallel_tool_calls=False)
    assert found.tools == (Tool("weather", "of a city", SCHEMA), Tool("time"))
    assert (found.tool_choice, found.forced_tool, found.parallel_tool_calls) == ("auto", None, False)
    for choice in ("auto", "none", "required"):
        assert request(tools=[FUNCTION], tool_choice=choice).tool_choice == choice
    named = request(tools=[FUNCTION, OTHER], tool_choice={"type": "function", "function": {"name": "time"}})
    assert (named.tool_choice, named.forced_tool, named.parallel_tool_calls) == ("required", "time", False)


def test_response_format() -> None:
    assert request(response_format={"type": "json_object"}).schema == {"type": "object"}
    for more in ({}, {"strict": True}, {"strict": False, "description": "d"}):
        assert request(response_format={"type": "json_schema", "json_schema": {"name": "a-B_9", "schema": SCHEMA, **more}}).schema == SCHEMA
    assert request(response_format={"type": "json_schema", "json_schema": {"name": "n"}}).schema == {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": 2**63}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"), ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"), ({"temperature": 2.1}, "temperature"), ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"), ({"temperature": 10**400}, "temperature"), ({"temperature": "0"}, "temperature"),
        ({"top_p": 2}, "top_p"), ({"repeat_penalty": 0}, "repeat_penalty"), ({"seed": 2**63}, "seed"), ({"seed": 1.0}, "seed"),
        ({"stop": ""}, "stop"), ({"stop": ["a"] * 17}, "stop"), ({"stop": [1]}, "stop"), ({"stop": {}}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stream": 1}, "stream"), ({"stream_options": {}}, "stream_options"), ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"model": ""}, "model"), ({"model": 1}, "model"), ({"model": "a\0b"}, "model"), ({"model": "m" * 5000}, "model"),
        ({"surprise": 1}, "surprise"), ({"n": 0}, "n"), ({"n": 9}, "n"), ({"n": True}, "n"),
        ({"logprobs": 1}, "logprobs"), ({"top_logprobs": 1}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": [1]}, "logit_bias"), ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"), ({"logit_bias": {"1": None}}, "logit_bias.1"),
        ({"logit_bias": {str(2**31): 1}}, "logit_bias"), ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
        ({"tools": {}}, "tools"), ({"tools": [1]}, "tools[0]"), ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"), ({"tools": [FUNCTION, FUNCTION]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": "x"}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"x": "y" * 70_000}}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "surprise": 1}}]}, "tools[0].function.surprise"),
        ({"tool_choice": "required"}, "tool_choice"), ({"tools": [FUNCTION], "tool_choice": "weather"}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"response_format": "json"}, "response_format"), ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a.b"}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}}, "response_format.json_schema.schema"),
        ({"functions": [{"name": "x"}]}, "functions"), ({"function_call": {"name": "x"}}, "function_call"),
        ({"modalities": ["audio"]}, "modalities"), ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)  # fmt: skip
def test_refused_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as refused:
        asked(**fields)
    assert refused.value.what == named


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "hi", {}, [1], [{}], [{"role": "user"}], [{"role": "user", "content": ""}], [{"role": "user", "content": "  \n"}],
        [{"role": "tool", "content": "x"}], [{"role": ["user"], "content": "x"}], [{"role": "user", "content": None}],
        [{"role": "function", "name": "f", "content": "x"}], [{"role": "user", "content": "x", "tool_calls": [CALL]}],
        [{"role": "user", "content": "x", "tool_call_id": "c1"}], [{"role": "tool", "content": "x", "tool_call_id": 1}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": []}]}],
        [{"role": "user", "content": "x", "surprise": 1}], [{"role": "assistant", "content": "x", "tool_calls": [1]}], [USER] * 5000,
        [{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, USER],
        [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {}}}]}, USER],
        [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "a b", "arguments": ""}}]}, USER],
        [{"role": "assistant", "tool_calls": [CALL] * 129}, USER],
    ],
)  # fmt: skip
def test_refused_messages(messages: Any) -> None:
    with pytest.raises(UsageError) as refused:
        asked(messages=messages)
    assert refused.value.what.startswith("messages")


def test_what_a_model_of_text_cannot_see_is_refused_by_its_type() -> None:
    with pytest.raises(UsageError, match="image_url"):
        asked(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}])


def test_messages() -> None:
    given = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": None, "refusal": "no", "tool_calls": None, "annotations": []},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
        {"role": "assistant", "content": ""},
    ]
    assert request(messages=given).messages == (
        {"role": "system", "content": "d"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "no"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
        {"role": "assistant", "content": ""},
    )


def test_harmless_fields_change_nothing() -> None:
    everything = {name: {"a": "b"} for name in IGNORED} | {name: values[0] for name, values in NEUTRAL.items()}
    assert asked(**everything) == asked()


# -- completions --------------------------------------------------------------------------------------------------------


def test_completions() -> None:
    assert text().requests == (CompletionRequest("once", Sampling(max_tokens=LEGACY_MAX_TOKENS)),)
    assert [one.prompt for one in text(prompt=["a", "b"]).requests] == ["a", "b"]
    assert [one.prompt for one in text(prompt=[1, 2]).requests] == [(1, 2)]
    found = text(prompt=[[1], [2]], n=2, best_of=2, seed=5, logprobs=5, max_tokens=3, stop="x", suffix="", user="me")
    assert [(one.prompt, one.sampling.seed) for one in found.requests] == [((1,), 5), ((1,), 6), ((2,), 5), ((2,), 6)]
    assert all(understood(one) == one for one in found.requests)
    assert (found.n, found.requests[0].sampling) == (2, Sampling(max_tokens=3, stop=("x",), seed=5, logprobs=5))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": None}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [""]}, "prompt[0]"),
        ({"prompt": [[]]}, "prompt[0]"), ({"prompt": [1, "a"]}, "prompt"), ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"), ({"prompt": [2**31]}, "prompt"), ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 33, "n": 2}, "n"), ({"best_of": 2}, "best_of"), ({"n": 2, "best_of": 1}, "best_of"),
        ({"logprobs": 6}, "logprobs"), ({"logprobs": True}, "logprobs"), ({"suffix": "x"}, "suffix"), ({"echo": 1}, "echo"),
        ({"echo": True, "logprobs": 1}, "echo"), ({"echo": True, "prompt": [1]}, "echo"), ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)  # fmt: skip
def test_refused_completions(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as refused:
        text(**fields)
    assert refused.value.what == named


# -- embeddings ---------------------------------------------------------------------------------------------------------


def test_embeddings() -> None:
    assert vectors().request == EmbeddingRequest(("once",))
    assert vectors(input=[[1, 2], [3]], encoding_format="base64", dimensions=8, user="me") == AskedEmbeddings(
        "m", EmbeddingRequest(((1, 2), (3,))), "base64", 8
    )
    many = vectors(input=["x"] * 2048).request
    assert understood(many) == many


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": ["a"] * 2049}, "input"), ({"input": ["a", ""]}, "input[1]"),
        ({"encoding_format": "int8"}, "encoding_format"), ({"encoding_format": []}, "encoding_format"), ({"dimensions": 0}, "dimensions"),
        ({"surprise": 1}, "surprise"),
    ],
)  # fmt: skip
def test_refused_embeddings(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as refused:
        vectors(**fields)
    assert refused.value.what == named


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
NAMES = [
    "messages", "temperature", "stop", "stream", "stream_options", "seed", "n", "tools", "tool_choice", "response_format", "logit_bias",
    "prompt", "input", "x",
]  # fmt: skip


@pytest.mark.parametrize("parse", [chat, completion, embeddings])
@given(fields=st.dictionaries(st.sampled_from(NAMES), json_values))
def test_anything_else_is_an_error_of_the_caller(parse: Any, fields: dict[str, Any]) -> None:
    try:
        parse(Fields({"model": "m", **fields}))
    except UsageError as error:
        assert error.http_status == 400
        assert error.message.isascii()
