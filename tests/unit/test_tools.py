"""Calls of tools in every format: the parser against any cut of the text, and the ways conversations are told."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.engine.interface import Tool
from daemon.engine.worker.toolparse import ToolParser
from daemon.engine.worker.tools import (
    DEEPSEEK_3,
    DEEPSEEK_31,
    HERMES,
    LLAMA_3,
    MISTRAL,
    MISTRAL_ARGS,
    Format,
    format_of,
    instructions,
    native,
    plain,
    without_system,
)

ARGUMENTS = '{"city": "São \\"Paulo\\" }]", "days": [1, {"a": null}]}'
FORMATS = {
    "hermes": HERMES,
    "llama 3": LLAMA_3,
    "mistral": MISTRAL,
    "mistral with args": MISTRAL_ARGS,
    "deepseek 3": DEEPSEEK_3,
    "deepseek 3.1": DEEPSEEK_31,
}


def wide(text: str) -> str:
    """DeepSeek's bars."""
    return text.replace("|", "\uff5c")


# What a model writes for two calls (or the one that its format has), without spaces that do not matter.
ONE = f'{{"name":"weather","parameters":{ARGUMENTS}}}'
CALLS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>\n'
    '<tool_call>\n{"name": "f.x-2", "arguments": {}}\n</tool_call>',
    "llama 3": '{"name": "weather", "parameters": %s}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": %s}, {"name": "f.x-2", "arguments": {}}]',
    "mistral with args": "[TOOL_CALLS]weather[ARGS]%s[TOOL_CALLS]f.x-2[ARGS]{}",
    "deepseek 3": wide(
        "<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>weather\n```json\n%s\n```<|tool▁call▁end|>\n"
        "<|tool▁call▁begin|>function<|tool▁sep|>f.x-2\n```json\n{}\n```<|tool▁call▁end|><|tool▁calls▁end|>"
    ),
    "deepseek 3.1": wide(
        "<|tool▁calls▁begin|><|tool▁call▁begin|>weather<|tool▁sep|>%s<|tool▁call▁end|>"
        "<|tool▁call▁begin|>f.x-2<|tool▁sep|>{}<|tool▁call▁end|><|tool▁calls▁end|>"
    ),
}
NAMES = ("weather", "f.x-2")


class Answer:
    """What a client puts together from the deltas of one answer."""

    def __init__(self, style: Format, pieces: Sequence[str], thinking: bool = False) -> None:
        numbers = itertools.count()
        self.parser = ToolParser(style, NAMES, thinking, lambda: f"call_{next(numbers)}")
        self.text = ""
        self.calls: list[dict[str, Any]] = []
        self.steps: list[tuple[str, str]] = []
        for piece in [*pieces, None]:
            delta = self.parser.finish() if piece is None else self.parser.push(piece)
            self.text += delta.text
            for call in delta.tool_calls:
                if call.id is not None:
                    assert call.index == len(self.calls) and call.arguments == ""
                    self.calls.append({"id": call.id, "name": call.name, "arguments": ""})
                assert call.index == len(self.calls) - 1
                self.calls[call.index]["arguments"] += call.arguments
            self.steps.append((delta.text, "".join(call.arguments for call in delta.tool_calls)))


def told(answer: Answer) -> list[tuple[str, str]]:
    return [(call["name"], call["arguments"]) for call in answer.calls]


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_read_byte_for_byte_however_the_text_is_cut(name: str) -> None:
    text = CALLS[name] % ARGUMENTS
    expected = [("weather", ARGUMENTS), ("f.x-2", "{}")][: text.count("{}") + 1]
    for size in (1, 2, 3, 7, len(text)):
        answer = Answer(FORMATS[name], [text[at : at + size] for at in range(0, len(text), size)])
        assert (answer.text, told(answer)) == ("", expected)
        assert json.loads(answer.calls[0]["arguments"])["city"] == 'São "Paulo" }]'


@pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name].alone])
def test_text_before_and_behind_calls_is_text(name: str) -> None:
    answer = Answer(FORMATS[name], list(f"Let me see: <b>\n{CALLS[name] % ARGUMENTS}\n So be it."))
    assert answer.text == "Let me see: <b>\n So be it."
    assert len(answer.calls) == 2


def test_arguments_come_as_they_grow_and_text_as_soon_as_it_is_certain() -> None:
    answer = Answer(HERMES, ["Yes, <", "b>", "<tool_", 'call>{"name":"weather","arguments":{"ci', 'ty":"', 'Rome"}', "}</tool_call>"])
    assert answer.steps == [("Yes,", ""), (" <b>", ""), ("", ""), ("", '{"ci'), ("", 'ty":"'), ("", 'Rome"}'), ("", ""), ("", "")]


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (HERMES, "<tool_call>weather</tool_call>"),
        (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": "x"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "wea'),
        (HERMES, "<tool_call>" + " " * 99 + '{"name": "weather", "arguments": {}}</tool_call>'),
        (HERMES, "a < b <tool <<tool_call"),
        (LLAMA_3, '{"name": "Anna", "age": 3}'),
        (LLAMA_3, f"Here you are: {ONE}"),
        (LLAMA_3, '{"nam'),
        (MISTRAL, '[TOOL_CALLS] {"name": 1}'),
        (DEEPSEEK_3, wide("<|tool▁calls▁begin|> none")),
    ],
)
def test_what_only_looks_like_a_call_is_given_back_as_text(style: Format, text: str) -> None:
    for size in (1, 5, len(text)):
        answer = Answer(style, [text[at : at + size] for at in range(0, len(text), size)])
        assert (answer.text, answer.calls) == (text, [])


def test_a_call_behind_something_broken_is_still_found() -> None:
    answer = Answer(HERMES, list("<tool_call> so <tool_call>" + CALLS["hermes"] % "{}"))
    assert answer.text == "<tool_call> so <tool_call>"
    assert told(answer) == [("weather", "{}"), ("f.x-2", "{}")]


def test_an_answer_that_was_cut_off_has_the_calls_that_began() -> None:
    text = CALLS["mistral"] % ARGUMENTS
    assert told(Answer(MISTRAL, [text[: text.index("São")]])) == [("weather", '{"city": "')]
    assert told(Answer(MISTRAL, [text[: text.index("f.x-2")]])) == [("weather", ARGUMENTS)]


@pytest.mark.parametrize("text", ["<tool_call>\n", '<tool_call>{"na', '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n\n<tool'])
def test_of_an_answer_held_to_calls_that_was_cut_off_no_mark_becomes_text(text: str) -> None:
    parser = ToolParser(HERMES, ["f"], only=True)
    deltas = [*map(parser.push, text), parser.finish()]
    assert "".join(delta.text for delta in deltas) == ""
    assert parser.calls == text.count("arguments")


def test_what_a_model_thinks_is_no_call() -> None:
    call = CALLS["hermes"] % "{}"
    thought = '<think>maybe <tool_call>{"name": "weather", "arguments": {}}</tool_call>?</think>'
    answer = Answer(HERMES, list(f"{thought}\n\n{call}"))
    assert answer.text == thought and len(answer.calls) == 2
    begun = Answer(HERMES, list(f"{thought[7:]}\n\n{call}"), thinking=True)
    assert begun.text == thought[7:] and len(begun.calls) == 2
    alone = Answer(LLAMA_3, list(f"hm, {{}}</think>\n{ONE}"), thinking=True)
    assert alone.text == "hm, {}</think>" and told(alone) == [("weather", ARGUMENTS)]


_MARKS = sorted({mark for style in FORMATS.values() for mark in (*style.head, *style.middle, *style.tail, *style.more, *style.end)})
_WRITTEN = [CALLS[name] % ARGUMENTS for name in CALLS]
_TEXTS = st.lists(
    st.sampled_from([*_MARKS, *NAMES, "<think>", "</think>", *_WRITTEN, "{", "}", '"', "\\", " ", "\n", "x", "ü"]),
    max_size=12,
).map("".join)


@given(st.sampled_from(sorted(FORMATS)), _TEXTS, st.lists(st.integers(1, 40), max_size=60), st.booleans())
def test_any_cut_gives_the_same_text_and_calls(name: str, text: str, sizes: list[int], thinking: bool) -> None:
    whole = Answer(FORMATS[name], [text], thinking)
    pieces, at = [], 0
    for size in [*sizes, len(text)]:
        pieces.append(text[at : at + size])
        at += size
    cut = Answer(FORMATS[name], pieces, thinking)
    assert (cut.text, cut.calls) == (whole.text, whole.calls)
    if not whole.calls:
        assert whole.text == text


# --- formats and conversations ---

TOOLS = (Tool("weather", "Tells the weather", {"type": "object", "properties": {"city": {"type": "string"}}}), Tool("f.x-2"))
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
TALK: tuple[dict[str, Any], ...] = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
    {"role": "tool", "content": "warm", "tool_call_id": "call_2"},
    {"role": "user", "content": "Thanks"},
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, None),
        ("{{ messages }}", None),
        ("{{ toolsmith }} <tool_call> arguments", None),
        ("{% if tools %}<tool_call>{{ arguments }}", HERMES),
        ("{% if tools %}<tool_call><function={{ name }}>{{ arguments }}", None),
        ("{% if tools %}<tool_call>{{ name }}<arg_key>{{ arguments }}", None),
        ("{% if tools %}[AVAILABLE_TOOLS][TOOL_CALLS]", MISTRAL),
        ("{% if tools %}[TOOL_CALLS]{{ name }}[ARGS]", MISTRAL_ARGS),
        ("{% if tools is not none %}<|start_header_id|>ipython parameters", LLAMA_3),
        (wide("{% if tools %}<|tool▁calls▁begin|>```json"), DEEPSEEK_3),
        (wide("{% if tools %}<|tool▁calls▁begin|>"), DEEPSEEK_31),
        ("{% if tools %}<|channel|>commentary to=functions", None),
    ],
)
def test_a_template_tells_its_format(template: str | None, expected: Format | None) -> None:
    assert format_of(template) == expected


def test_without_help_from_the_template_all_becomes_text() -> None:
    told = plain(TALK, TOOLS)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user", "user"]
    assert told[0]["content"] == "Be brief.\n\n" + instructions(TOOLS)
    assert told[2]["content"].count('<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>') == 2
    assert told[3]["content"] == "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwarm\n</tool_response>"
    assert all(message.keys() == {"role", "content"} for message in told)
    assert plain(TALK[1:], ())[0] == TALK[1]
    assert plain(TALK[1:2], TOOLS)[0] == {"role": "system", "content": instructions(TOOLS)}
    assert TALK[0]["content"] == "Be brief."


def test_the_instructions_name_every_tool_on_a_line_of_json() -> None:
    lines = [json.loads(line) for line in instructions(TOOLS).split("<tools>\n")[1].split("\n</tools>")[0].splitlines()]
    assert [line["function"]["name"] for line in lines] == ["weather", "f.x-2"]
    assert lines[0]["function"]["parameters"] == TOOLS[0].parameters


def test_where_no_system_message_is_allowed_the_user_says_it() -> None:
    assert without_system(TALK[:2]) == [{"role": "user", "content": "Be brief.\n\nHow is Rome?"}]
    assert without_system(TALK[1:2]) == [TALK[1]]


def test_templates_get_arguments_as_objects_and_the_names_of_results() -> None:
    told = native(TALK, HERMES)
    assert told[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert told[3] == {"role": "tool", "content": "sunny", "tool_call_id": "call_1", "name": "weather"}
    assert native(TALK, HERMES, parsed=False)[2]["tool_calls"][0]["function"] == CALL["function"]
    damaged = {**CALL, "function": {"name": "weather", "arguments": "{"}}
    assert native([{"role": "assistant", "content": "", "tool_calls": [damaged]}], HERMES)[0]["tool_calls"][0] == damaged


def test_mistral_gets_ids_that_it_accepts() -> None:
    told = native(TALK, MISTRAL)
    ids = [call["id"] for call in told[2]["tool_calls"]]
    assert all(len(one) == 9 and one.isalnum() for one in ids) and len(set(ids)) == 2
    assert [told[3]["tool_call_id"], told[4]["tool_call_id"]] == ids
    assert native([{"role": "tool", "content": "", "tool_call_id": "abc123DEF"}], MISTRAL)[0]["tool_call_id"] == "abc123DEF"
