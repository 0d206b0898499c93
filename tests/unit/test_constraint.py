"""Grammars and what holds an answer to them, on a vocabulary of bytes. R: a bad grammar is an error, and never the end of a worker."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
from llguidance import LLTokenizer, TokenizerWrapper

from daemon.engine.interface import ChatRequest, Tool, ToolChoice
from daemon.engine.worker.answering import Constraint, Unanswerable
from daemon.engine.worker.constraint import Compiler, check, constrain
from daemon.engine.worker.grammar import GrammarRefused, Plan, plan
from daemon.engine.worker.tools import DEEPSEEK_3, DEEPSEEK_31, HERMES, LLAMA_3, MISTRAL, MISTRAL_ARGS, Format

END, MARK = 256, 257  # behind the 256 bytes: the end of an answer, and [TOOL_CALLS] as a control token
SIZE = 258


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = END
    bos_token_id = None
    tokens: ClassVar = [*(bytes([i]) for i in range(256)), b"\xff<end>", b"\xff[TOOL_CALLS]"]
    special_token_ids: ClassVar = [END, MARK]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def piece(token: int) -> bytes:
    return b"[TOOL_CALLS]" if token == MARK else bytes([token])


def compiler_with(check: Callable[[str], None]) -> Compiler:
    return Compiler(lambda: LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=SIZE), check, threading.Lock())


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    """Without the child process, which takes a moment and changes nothing for grammars that are no trouble."""
    return compiler_with(lambda grammar: None)


@pytest.fixture(scope="module")
def careful() -> Compiler:
    return compiler_with(check)


def constraint(
    compiler: Compiler, request: ChatRequest, style: Format = HERMES, control: Mapping[str, int] | None = None, thinking: bool = False
) -> Constraint:
    made = plan(request, style, control or {})
    assert made is not None
    return constrain(made, compiler.compile(made.grammar), style, control or {}, piece, compiler.tokenise, thinking)


def schema(compiler: Compiler, given: Mapping[str, Any]) -> Constraint:
    return constraint(compiler, ChatRequest((), schema=given))


def write(held: Constraint, text: str, *more: int) -> bool:
    """Whether `text` is allowed token by token; both ways to ask must agree."""
    for token in [*text.encode(), *more]:
        if held.done():
            return False
        if held.active():
            logits = np.zeros(SIZE, np.float32)
            held.mask(logits)
            assert bool(logits[token] == 0) == held.allowed(token)
            if not held.allowed(token):
                return False
        if token != END:
            held.accept(token)
    return True


def ended(held: Constraint) -> bool:
    return held.done() or held.allowed(END)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name"],
    "additionalProperties": False,
}


def test_an_answer_follows_its_schema_and_ends(compiler: Compiler) -> None:
    held = schema(compiler, PERSON)
    assert held.active() and not held.done() and not held.allowed(END)
    assert write(held, '{"name": "Anna", "age": 42') and not ended(held)
    assert write(held, "}") and held.done()
    for wrong in ('{"age"', '{"name": "Annabel', '{"name": 1', '{"name": "A", "age": 151', " {", "[", '{"name": "A", "x"'):
        assert not write(schema(compiler, PERSON), wrong)


def test_any_object_is_an_object(compiler: Compiler) -> None:
    assert write(schema(compiler, {"type": "object"}), '{"a": [1, {"b": null}], "ü": "\\n"}')
    assert write(schema(compiler, {"type": "object"}), "{}")
    assert not write(schema(compiler, {"type": "object"}), "[")


def test_whitespace_is_as_models_like_it_and_not_endless(compiler: Compiler) -> None:
    assert write(schema(compiler, {"type": "object"}), '{\n    "a": [\n        1,\n        2\n    ]\n}')
    assert write(schema(compiler, {"type": "object"}), '{"a":1,"b":2}')
    assert not write(schema(compiler, {"type": "object"}), "{  ")
    assert not write(schema(compiler, {"type": "object"}), "{\n\n")
    assert not write(schema(compiler, {"type": "object"}), "{\n" + " " * 33)


def test_what_is_certain_is_told(compiler: Compiler) -> None:
    held = schema(
        compiler, {"type": "object", "properties": {"long name": {"const": "x"}}, "required": ["long name"], "additionalProperties": False}
    )
    assert bytes(held.forced()) == b"{"
    assert write(held, '{"')
    assert bytes(held.forced()) == b'long name"'


def test_references_may_go_in_circles(compiler: Compiler) -> None:
    tree = {"$defs": {"n": {"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}}, "$ref": "#/$defs/n"}
    assert write(schema(compiler, tree), '{"c": [{"c": []}, {}]}')


DEEP: Any = {}
for _ in range(200):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"]}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"type": "nonsense"}, "Invalid type: nonsense"),
        ({"$ref": "#/$defs/nowhere"}, "does not exist"),
        ({"$ref": "https://example.com/schema"}, "not fetch"),
        ({"$ref": 3}, "must be a string"),
        ({"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}, "nothing can follow"),
        ({"allOf": [{"type": "string"}, {"type": "number"}]}, "Unsatisfiable"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "Unsatisfiable"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "Unsatisfiable"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "object", "properties": []}, "must be an object"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "null"}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "format": "nonsense"}, "Unknown format"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "uniqueItems"),
        (DEEP, "recursion limit"),
        ({"allOf": [{"type": "string", "pattern": f".*a{{{i}}}b.*c"} for i in range(2, 60)]}, "too complex"),
        ({"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": 1}}}, {"properties": {f"b{i}": {}}}]} for i in range(20)]}, ""),
    ],
)
def test_r_a_broken_schema_is_refused_with_a_reason(careful: Compiler, given: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(GrammarRefused) as caught:
        schema(careful, given)
    assert reason in str(caught.value)
    assert not re.search(r"[\n|^]|x-guidance|^at ", str(caught.value)) and len(str(caught.value)) <= 400


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"type": "array", "minItems": 10**9, "items": {"type": "integer"}}, "[1, 2, 3"),
        ({"type": "string", "minLength": 10**6}, '"abc'),
        ({"type": "string", "maxLength": 10**9}, '"abc"'),
        ({"enum": [f"x{i}" for i in range(5000)]}, '"x4999"'),
        ({"type": "string", "pattern": "^(a+)+$"}, '"' + "a" * 100),
        ({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}, '{"p7": "x", "p1400": ""}'),
        ({"type": "array", "items": {"type": "array", "items": {"type": "array", "items": {}}}}, "[[[[[[]]]]]]"),
    ],
)
def test_r_a_large_schema_is_followed(careful: Compiler, given: Mapping[str, Any], text: str) -> None:
    assert write(schema(careful, given), text)


@pytest.mark.parametrize("pattern", ["(((a{1,1000}){1,1000}){1,1000}){1,1000}", "(.*a.{200}.*b.{200}){9}", "(a|aa)+b{9999}(.*x){50}"])
def test_r_a_pattern_that_explodes_ends_that_answer_only(careful: Compiler, pattern: str) -> None:
    try:
        held = schema(careful, {"type": "string", "pattern": pattern})
        write(held, '"' + "aab" * 400)
    except (GrammarRefused, Unanswerable) as error:
        assert "\n" not in str(error)
    assert write(schema(careful, PERSON), '{"name": "A"}')


def test_half_a_character_in_a_schema_is_refused(compiler: Compiler) -> None:
    with pytest.raises(GrammarRefused):
        schema(compiler, {"const": "\ud800"})


# --- calls ---

CITY = {"properties": {"city": {"$ref": "#/$defs/c"}}, "$defs": {"c": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
WEATHER = Tool("weather", "", {"type": "object", **CITY})
TOOLS = (WEATHER, Tool("now"), Tool("any.thing-2", "", {"additionalProperties": True}))


def wide(text: str) -> str:
    """DeepSeek's bars."""
    return text.replace("|", "\uff5c")


WRITTEN = {
    "hermes": (
        HERMES,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        '\n<tool_call>{"name":"now","arguments":{}}</tool_call>',
    ),
    "llama 3": (LLAMA_3, '{"name": "weather", "parameters": {"city": "Rome"}}', ""),
    "mistral": (MISTRAL, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}', ', {"name": "now", "arguments": {}}'),
    "mistral with args": (MISTRAL_ARGS, '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}', "[TOOL_CALLS]now[ARGS]{}"),
    "deepseek 3": (
        DEEPSEEK_3,
        wide('<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>weather\n```json\n{"city": "Rome"}\n```<|tool▁call▁end|>'),
        wide("\n<|tool▁call▁begin|>function<|tool▁sep|>now\n```json\n{}\n```<|tool▁call▁end|>"),
    ),
    "deepseek 3.1": (
        DEEPSEEK_31,
        wide('<|tool▁calls▁begin|><|tool▁call▁begin|>weather<|tool▁sep|>{"city": "Rome"}<|tool▁call▁end|>'),
        wide("<|tool▁call▁begin|>now<|tool▁sep|>{}<|tool▁call▁end|>"),
    ),
}


def asked(choice: ToolChoice, *, parallel: bool = True, forced: str | None = None, follow: Mapping[str, Any] | None = None) -> ChatRequest:
    return ChatRequest((), tools=TOOLS, tool_choice=choice, forced_tool=forced, parallel_tool_calls=parallel, schema=follow)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_calls_in_every_format(compiler: Compiler, name: str, choice: ToolChoice) -> None:
    style, first, second = WRITTEN[name]
    end = "".join(style.end)
    held = constraint(compiler, asked(choice), style)
    assert held.active() == (choice == "required")
    assert write(held, first + second + end)
    assert ended(held)
    one = constraint(compiler, asked(choice, parallel=False), style)
    assert write(one, first + end) and one.done()
    wrong = constraint(compiler, asked(choice), style)
    assert not write(wrong, first.replace("Rome", "Nome"))
    assert not write(constraint(compiler, asked(choice), style), first.replace("weather", "wet"))


def test_only_the_forced_tool_is_called(compiler: Compiler) -> None:
    assert not write(constraint(compiler, asked("required", forced="now")), WRITTEN["hermes"][1])
    assert write(constraint(compiler, asked("required", forced="weather")), WRITTEN["hermes"][1])
    assert bytes(constraint(compiler, asked("required", forced="now")).forced()) == b"<tool_call>"


def test_a_tool_without_parameters_gets_none_and_others_what_their_schema_says(compiler: Compiler) -> None:
    call = '<tool_call>{"name": "%s", "arguments": %s}</tool_call>'
    assert not write(constraint(compiler, asked("required")), call % ("now", '{"a": 1}'))
    assert write(constraint(compiler, asked("required")), call % ("any.thing-2", '{"a": 1}'))
    assert not write(constraint(compiler, asked("required")), call % ("any.thing-2", "1"))


def test_free_text_is_free_until_a_call_begins_and_behind_it(compiler: Compiler) -> None:
    held = constraint(compiler, asked("auto"))
    text = f"<tool, maybe? {json.dumps(PERSON)} <tool_cal l> no ü </tool_call>\n"
    assert write(held, text) and not held.active() and held.forced() == []
    assert write(held, WRITTEN["hermes"][1]) and not held.active() and not held.done()
    assert write(held, "That was it. <tool_call>\n{") and held.active()
    assert not held.allowed(END) and bytes(held.forced()) == b""
    assert write(held, '"name": "now", "arguments": {}}</tool_call>') and not held.active()


def test_a_mark_that_is_a_control_token_is_that_token(compiler: Compiler) -> None:
    control = {"[TOOL_CALLS]": MARK}
    held = constraint(compiler, asked("required"), MISTRAL, control)
    assert held.forced()[0] == MARK and not held.allowed(ord("["))
    free = constraint(compiler, asked("auto"), MISTRAL, control)
    assert write(free, "So: ", MARK) and free.active()
    assert write(free, '[{"name": "now", "arguments": {}}]') and free.done()


def test_a_thought_is_free(compiler: Compiler) -> None:
    held = constraint(compiler, asked("auto"), thinking=True)
    assert write(held, "I could <tool_call> here</think>") and not held.active()
    assert write(held, "<tool_call>") and held.active()


@pytest.mark.parametrize("name", [name for name in WRITTEN if not WRITTEN[name][0].alone])
def test_with_a_schema_an_answer_is_a_call_or_follows_it(compiler: Compiler, name: str) -> None:
    style, first, second = WRITTEN[name]
    assert write(constraint(compiler, asked("auto", follow=PERSON), style), '{"name": "Anna", "age": 7}')
    assert write(constraint(compiler, asked("auto", follow=PERSON), style), first + second + "".join(style.end))
    assert not write(constraint(compiler, asked("auto", follow=PERSON), style), "Hello")


def test_calls_that_cannot_be_told_from_an_answer_in_json_are_not_mixed_with_it(compiler: Compiler) -> None:
    with pytest.raises(GrammarRefused, match="tool_choice"):
        constraint(compiler, asked("auto", follow=PERSON), LLAMA_3)


def test_tools_that_are_not_offered_do_not_constrain(compiler: Compiler) -> None:
    assert plan(asked("none"), HERMES, {}) is None
    assert plan(ChatRequest(()), HERMES, {}) is None
    assert plan(asked("none", follow=PERSON), HERMES, {}) == plan(ChatRequest((), schema=PERSON), HERMES, {})


def test_a_keyword_of_a_tool_that_cannot_be_followed_is_left_out_but_a_wrong_schema_is_refused(compiler: Compiler) -> None:
    lax = Tool("f", "", {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}})
    made = ChatRequest((), tools=(lax,), tool_choice="required")
    assert write(constraint(compiler, made), '<tool_call>{"name": "f", "arguments": {"a": [1]}}</tool_call>')
    for parameters in ({"type": "nonsense"}, {"type": "string"}, {"type": "object", "properties": {"a": {"$ref": "#/x"}}}):
        wrong = ChatRequest((), tools=(Tool("f", "", parameters),), tool_choice="auto")
        with pytest.raises(GrammarRefused):
            constraint(compiler, wrong)


def test_the_compiler_works_beside_its_caller_and_keeps_what_it_made(compiler: Compiler) -> None:
    found: list[object] = []
    over = threading.Event()
    made = plan(ChatRequest((), schema=PERSON), HERMES, {})
    assert made == Plan(made.grammar if made else "")

    def done(result: object) -> None:
        found.append(result)
        if len(found) == 3:
            over.set()

    for grammar in (made.grammar, "start: %json {}}", made.grammar):
        compiler.start(grammar, lambda: True, done)
    assert over.wait(60)
    assert isinstance(found[1], GrammarRefused)
    assert found[0] is not found[2] and type(found[0]) is type(found[2])


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled() -> None:
    tried: list[str] = []
    busy, over = threading.Event(), threading.Event()

    def check(grammar: str) -> None:
        tried.append(grammar)
        assert busy.wait(60)

    beside = compiler_with(check)
    wanted = {name: True for name in "abc"}
    for name in wanted:
        beside.start(f'start: "{name}"', lambda name=name: wanted[name], lambda found, name=name: over.set() if name == "c" else None)  # type: ignore[misc]
    wanted["b"] = False
    busy.set()
    assert over.wait(60)
    assert len(tried) == 2
