"""Calls of tools and answers that follow a schema, by a real small model whose template knows no tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from daemon.config import Engine as Settings
from daemon.engine.host import EngineHost
from daemon.engine.interface import ChatRequest, Delta, Provider, Sampling, Tool
from daemon.errors import UsageError
from tests.functional.engines import KEY, alive, ask, load, nothing

WEATHER = Tool(
    "get_weather",
    "The weather in a city",
    {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
    },
)
TIME = Tool("get_time", "The time of day")
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[EngineHost]:
    host = EngineHost(Settings(threads=1, context=2048), tmp_path / "logs", nothing)
    yield host
    await host.close()


class Answer:
    """The deltas of one answer, put together as a client does."""

    def __init__(self, deltas: list[Delta]) -> None:
        self.deltas = deltas
        self.text = "".join(delta.text for delta in deltas)
        self.finish = deltas[-1].finish
        self.calls: list[dict[str, str]] = []
        self.pieces = 0
        for call in (call for delta in deltas for call in delta.tool_calls):
            if call.id is not None:
                assert call.name is not None and call.index == len(self.calls)
                self.calls.append({"id": call.id, "name": call.name, "arguments": ""})
            self.calls[call.index]["arguments"] += call.arguments
            self.pieces += bool(call.arguments)


async def hear(provider: Provider, request: ChatRequest) -> Answer:
    return Answer([delta async for delta in provider.generate(request)])


def question(content: str, tools: tuple[Tool, ...] = (WEATHER, TIME), **options: Any) -> ChatRequest:
    sampling = Sampling(temperature=options.pop("temperature", 0.0), max_tokens=options.pop("max_tokens", 200), seed=3)
    return ChatRequest(({"role": "user", "content": content},), sampling, tools=tools, **options)


def follows(arguments: Mapping[str, Any]) -> bool:
    return arguments.keys() == {"city", "days"} and arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_a_forced_call_has_arguments_that_follow_the_schema(engine: EngineHost, model_file: Path, temperature: float) -> None:
    provider = await load(engine, model_file, slots=2)
    asked = question("How is Rome?", tool_choice="required", forced_tool="get_weather", parallel_tool_calls=False, temperature=temperature)
    answer = await hear(provider, asked)
    assert answer.text == "" and answer.finish == "tool_calls"
    assert [call["name"] for call in answer.calls] == ["get_weather"]
    assert follows(json.loads(answer.calls[0]["arguments"]))
    assert answer.calls[0]["id"].startswith("call_") and answer.pieces > 1


async def test_one_of_several_tools_is_called_when_one_must_be(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file, slots=2)
    answers = [await hear(provider, question("What time is it?", tool_choice="required", temperature=1.2)) for _ in range(2)]
    for answer in answers:
        assert answer.calls and answer.finish in ("tool_calls", "length")
        for call in answer.calls[: len(answer.calls) - (answer.finish == "length")]:
            assert call["name"] in ("get_weather", "get_time")
            arguments = json.loads(call["arguments"])
            assert arguments == {} if call["name"] == "get_time" else follows(arguments)


async def test_with_tools_an_answer_may_be_text(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)
    with_tools = await hear(provider, question("Write one sentence about the sea.", max_tokens=24))
    assert with_tools.finish in ("stop", "length", "tool_calls")
    assert with_tools.text or with_tools.calls
    without = await hear(provider, question("Write one sentence about the sea.", tool_choice="none", max_tokens=24))
    plain = await hear(provider, question("Write one sentence about the sea.", tools=(), max_tokens=24))
    assert without.text == plain.text and without.calls == []


async def test_a_model_that_sees_how_calls_are_made_begins_one_by_itself(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)
    talk: list[dict[str, Any]] = []
    for city, days in (("Oslo", 1), ("Rome", 2), ("Oslo", 3)):
        function = {"name": "get_weather", "arguments": json.dumps({"city": city, "days": days})}
        talk += [
            {"role": "user", "content": f"How is {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": f"c{days}", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": f"c{days}", "content": "sunny"},
            {"role": "assistant", "content": f"It is sunny in {city}."},
        ]
    talk.append({"role": "user", "content": "How is Rome?"})
    asked = ChatRequest(tuple(talk), Sampling(temperature=0, max_tokens=80), tools=(WEATHER, TIME))
    answer = await hear(provider, asked)
    assert [call["name"] for call in answer.calls] == ["get_weather"] and answer.finish == "tool_calls"
    assert follows(json.loads(answer.calls[0]["arguments"])) and answer.pieces > 1
    assert "<tool_call>" not in answer.text
    silent = await hear(provider, ChatRequest(asked.messages, asked.sampling, tools=asked.tools, tool_choice="none"))
    assert silent.calls == []


async def test_a_result_goes_back_to_the_model(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)
    asked = question("How is Rome?", tool_choice="required", forced_tool="get_weather", parallel_tool_calls=False)
    call = (await hear(provider, asked)).calls[0]
    told = {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
    back = (
        *asked.messages,
        {"role": "assistant", "content": "", "tool_calls": [told]},
        {"role": "tool", "tool_call_id": call["id"], "content": "It is sunny in Rome, 31 degrees."},
    )
    answer = await hear(provider, ChatRequest(back, Sampling(temperature=0, max_tokens=40)))
    assert answer.finish in ("stop", "length")
    assert "31" in answer.text or "sunny" in answer.text


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_an_answer_follows_a_schema(engine: EngineHost, model_file: Path, temperature: float) -> None:
    provider = await load(engine, model_file)
    answer = await hear(provider, question("Who is Anna?", (), schema=PERSON, temperature=temperature))
    person = json.loads(answer.text)
    assert answer.finish == "stop" and person.keys() == {"name", "age"}
    assert len(person["name"]) <= 20 and 0 <= person["age"] <= 120


async def test_an_answer_is_some_object_or_is_cut_off(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)
    answer = await hear(provider, question("Describe Rome as JSON.", (), schema={"type": "object"}, max_tokens=300))
    assert answer.text.startswith("{")
    assert answer.finish == "length" or isinstance(json.loads(answer.text), dict)
    short = await hear(provider, question("Describe Rome as JSON.", (), schema={"type": "object"}, max_tokens=3))
    assert short.finish == "length" and short.deltas[-1].usage is not None and short.deltas[-1].usage.completion_tokens == 3


async def test_constrained_answers_and_free_ones_run_side_by_side(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file, slots=4)
    alone = await hear(provider, ask(max_tokens=24))
    free, person, call, other = await asyncio.gather(
        hear(provider, ask(max_tokens=24)),
        hear(provider, question("Who is Anna?", (), schema=PERSON)),
        hear(provider, question("How is Oslo?", tool_choice="required", parallel_tool_calls=False)),
        hear(provider, question("Who is Bob?", (), schema=PERSON, temperature=1.0)),
    )
    assert free.text[:10] == alone.text[:10]
    assert json.loads(person.text) and json.loads(other.text) and call.calls


async def test_with_logprobs_every_token_of_a_constrained_answer_is_named(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)
    sampling = Sampling(temperature=0, max_tokens=100, logprobs=1)
    answer = await hear(provider, ChatRequest(({"role": "user", "content": "Who is Anna?"},), sampling, schema=PERSON))
    named = b"".join(one.drawn.bytes for delta in answer.deltas for one in delta.logprobs)
    assert named.decode() == answer.text and json.loads(answer.text)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "nonsense"}, "Invalid type"),
        ({"$ref": "#/$defs/x"}, "does not exist"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"allOf": [{"type": "string", "pattern": f".*a{{{i}}}b.*c"} for i in range(2, 40)]}, "too complex"),
    ],
)
async def test_r_a_bad_schema_is_an_error_and_the_worker_lives(
    engine: EngineHost, model_file: Path, schema: Mapping[str, Any], why: str
) -> None:
    provider = await load(engine, model_file)
    before = engine.models()[KEY].pid
    with pytest.raises(UsageError, match=f"response_format: .*{why}"):
        await hear(provider, question("x", (), schema=schema))
    with pytest.raises(UsageError, match=f"tools: .*{'' if 'uniqueItems' in why else 'no object|' + why}"):
        await hear(provider, question("x", (Tool("f", "", {**schema, "type": "nonsense"}),)))
    assert (await hear(provider, question("Who is Anna?", (), schema=PERSON))).finish == "stop"
    assert engine.models()[KEY].pid == before and alive(before)


async def test_a_cut_call_ends_by_length_with_what_there_is(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file)
    answer = await hear(provider, question("How is Rome?", (WEATHER,), tool_choice="required", max_tokens=20))
    assert answer.finish == "length" and not answer.text and "".join(call["arguments"] for call in answer.calls)


async def test_an_answer_that_is_cancelled_while_its_grammar_is_made_never_begins(engine: EngineHost, model_file: Path) -> None:
    provider = await load(engine, model_file, slots=1)
    answers = provider.generate(question("Who is Anna?", (), schema=PERSON))
    first = asyncio.ensure_future(anext(answers))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await answers.aclose()  # type: ignore[attr-defined]  # every async generator has it
    assert engine.models()[KEY].free_slots == 1
    assert (await hear(provider, question("Who is Anna?", (), schema=PERSON))).finish == "stop"
