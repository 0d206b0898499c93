"""OpenAI's own client against a real node and a real model, which is loaded by the first question."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import openai
import pytest
from pydantic import BaseModel

from tests.functional.asking import ENDLESS, call, request, token, workers
from tests.functional.nodes import Node, until

DOCS = Path(__file__).parent.parent.parent / "docs" / "http.md"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, kubo_binary: Path, model_file: Path) -> Iterator[Node]:
    node = Node(tmp_path_factory.mktemp("openai") / "node", kubo_binary)
    try:
        node.up("--ipfs-enabled", "false", "--engine-context", "2048")
        node.run("publish", str(model_file), "--name", "smol")
        yield node
    finally:
        node.stop()


@pytest.fixture
def ai(node: Node) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{node.status['api']}/v1", api_key=token(node), max_retries=0) as client:
        yield client


# -- models -------------------------------------------------------------------------------------------------------------


def test_a_model_is_found_by_everything_it_is_called(node: Node, ai: openai.OpenAI) -> None:
    (model,) = ai.models.list()
    known = model.model_dump()
    for name in (model.id, f"#{model.id}", known["cid"], "smol"):
        assert ai.models.retrieve(name).id == model.id
        assert call(node, "GET", f"/v1/models/{quote(name, safe='')}")["cid"] == known["cid"]
        assert ai.chat.completions.create(model=name, messages=QUESTION, max_tokens=1).model == model.id
    with pytest.raises(openai.NotFoundError) as missing:
        ai.chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert missing.value.code == "model_not_found"


# -- chats --------------------------------------------------------------------------------------------------------------


def test_a_chat_whole_and_streamed(ai: openai.OpenAI) -> None:
    whole = ai.chat.completions.create(model="smol", messages=QUESTION, max_tokens=12, temperature=0)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (12, whole.usage.prompt_tokens + 12)
    texts, used = [], []
    for chunk in ai.chat.completions.create(
        model="smol", messages=QUESTION, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        texts += [choice.delta.content for choice in chunk.choices if choice.delta.content]
        used += [chunk.usage] if chunk.usage else []
    assert "".join(texts) == whole.choices[0].message.content
    assert len(texts) > 3
    assert [(one.prompt_tokens, one.completion_tokens) for one in used] == [(whole.usage.prompt_tokens, 12)]
    assert used[0].prompt_tokens_details is not None
    assert (used[0].prompt_tokens_details.cached_tokens or 0) > 10  # the prompt was read already


def test_several_choices(ai: openai.OpenAI) -> None:
    one = ai.chat.completions.create(model="smol", messages=QUESTION, max_tokens=1)
    wild: Any = {"temperature": 2, "top_p": 1, "extra_body": {"min_p": 0, "top_k": 0}}
    several = ai.chat.completions.create(model="smol", messages=QUESTION, max_tokens=12, n=5, seed=1, **wild)
    assert [choice.index for choice in several.choices] == list(range(5))
    assert len({choice.message.content for choice in several.choices}) > 1
    assert one.usage is not None
    assert several.usage is not None
    assert several.usage.prompt_tokens == one.usage.prompt_tokens
    assert several.usage.completion_tokens > 12
    seen: dict[int, int] = {}
    for chunk in ai.chat.completions.create(model="smol", messages=QUESTION, max_tokens=6, n=3, stream=True):
        for choice in chunk.choices:
            seen[choice.index] = seen.get(choice.index, 0) + bool(choice.finish_reason)
    assert seen == {0: 1, 1: 1, 2: 1}


def test_logprobs(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(
        model="smol", messages=QUESTION, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    ).choices[0]
    assert answer.logprobs is not None
    tokens = answer.logprobs.content or []
    assert b"".join(bytes(one.bytes or []) for one in tokens).decode("utf-8", "replace") == answer.message.content
    for one in tokens:
        assert one.top_logprobs[0].bytes == one.bytes  # temperature 0 takes the likeliest
        assert len(one.top_logprobs) == 3
        likeliest = [other.logprob for other in one.top_logprobs]
        assert likeliest == sorted(likeliest, reverse=True)
        assert sum(map(math.exp, likeliest)) < 1.001


def test_logit_bias(ai: openai.OpenAI) -> None:
    tokens = []
    for bias in (100, -100):
        answer = ai.completions.create(
            model="smol", prompt="Once upon a", max_tokens=4, temperature=0, logit_bias={"655": bias}, logprobs=0
        )
        assert answer.choices[0].logprobs is not None
        tokens.append(answer.choices[0].logprobs.tokens or [])
    forced, forbidden = tokens
    assert len(set(forced)) == 1
    assert forced[0] not in forbidden


def test_tools_that_must_be_called(ai: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    more: Any
    for more in ({"tool_choice": "required", "parallel_tool_calls": False}, {"tool_choice": named}):
        answer = ai.chat.completions.create(model="smol", messages=QUESTION, tools=[WEATHER], temperature=0, max_tokens=200, **more)
        assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", None)
        [called] = [call for call in answer.choices[0].message.tool_calls or [] if call.type == "function"]
        arguments = json.loads(called.function.arguments)
        assert (called.function.name, arguments["city"] in ("Paris", "Rome"), 1 <= arguments["days"] <= 9) == ("get_weather", True, True)
    history: Any = [*QUESTION, answer.choices[0].message.model_dump(exclude_none=True)]
    history.append({"role": "tool", "tool_call_id": called.id, "content": "sunny"})
    after = ai.chat.completions.create(model="smol", messages=history, tools=[WEATHER], tool_choice="none", max_tokens=8)
    assert after.choices[0].message.content
    assert after.choices[0].message.tool_calls is None


def test_tool_calls_are_streamed_in_pieces(ai: openai.OpenAI) -> None:
    pieces, ended = [], []
    stream = ai.chat.completions.create(
        model="smol", messages=QUESTION, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=200, stream=True,
        parallel_tool_calls=False,
    )  # fmt: skip
    for chunk in stream:
        pieces += chunk.choices[0].delta.tool_calls or []
        ended += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    functions = [piece.function for piece in pieces if piece.function is not None]
    assert ended == ["tool_calls"]
    assert [(bool(piece.id), piece.type) for piece in pieces[:1]] == [(True, "function")]
    assert not any(piece.id or piece.type for piece in pieces[1:])
    assert functions[0].name == "get_weather"
    assert set(json.loads("".join(function.arguments or "" for function in functions))) == {"city", "days"}
    assert len(pieces) > 3


class Capital(BaseModel):
    city: Literal["Paris", "Rome"]
    certain: bool


def test_answers_that_follow_a_schema(ai: openai.OpenAI) -> None:
    parsed = ai.chat.completions.parse(model="smol", messages=QUESTION, response_format=Capital, temperature=0, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Capital)
    with ai.chat.completions.stream(model="smol", messages=QUESTION, response_format=Capital, temperature=0, max_tokens=200) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Capital)
    anything = ai.chat.completions.create(
        model="smol", messages=[{"role": "user", "content": "A JSON object with one name."}], response_format={"type": "json_object"},
        temperature=0, max_tokens=300,
    ).choices[0]  # fmt: skip
    assert (anything.message.content or "").lstrip().startswith("{")
    if anything.finish_reason == "stop":
        assert isinstance(json.loads(anything.message.content or ""), dict)


# -- completions and embeddings -----------------------------------------------------------------------------------------


def test_completions(ai: openai.OpenAI) -> None:
    prompts = ["Once upon a", "The sky is"]
    answer = ai.completions.create(model="smol", prompt=prompts, max_tokens=6, n=2, echo=True)
    assert [choice.text.startswith(prompts[choice.index // 2]) for choice in answer.choices] == [True] * 4
    streamed: dict[int, str] = {}
    for chunk in ai.completions.create(model="smol", prompt=prompts, max_tokens=6, temperature=0, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert all(streamed[index] for index in (0, 1))
    assert ai.completions.create(model="smol", prompt=[504, 655], max_tokens=3).choices[0].text
    found = ai.completions.create(model="smol", prompt="The sky is", max_tokens=6, temperature=0, logprobs=2).choices[0]
    assert found.logprobs is not None
    names, offsets = found.logprobs.tokens or [], found.logprobs.text_offset or []
    assert all(found.text[at:].startswith(name) for name, at in zip(names, offsets, strict=True))
    assert all(first < second for first, second in itertools.pairwise(offsets))


def test_embeddings(ai: openai.OpenAI) -> None:
    texts = ["A cat sleeps on the sofa.", "A kitten is asleep on the couch.", "The stock market fell by three percent."]
    packed = ai.embeddings.create(model="smol", input=texts)
    plain = ai.embeddings.create(model="smol", input=texts, encoding_format="float")
    vectors = [one.embedding for one in packed.data]
    assert vectors == [pytest.approx(one.embedding, abs=1e-3) for one in plain.data]
    assert [math.hypot(*vector) for vector in vectors] == pytest.approx([1, 1, 1], abs=1e-4)
    assert _product(vectors[0], vectors[1]) > _product(vectors[0], vectors[2])
    assert packed.usage.prompt_tokens > len(texts)
    with pytest.raises(openai.BadRequestError) as refused:
        ai.embeddings.create(model="smol", input="x", dimensions=64)
    assert refused.value.param == "dimensions"


def _product(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_the_example_of_the_documentation_runs(node: Node) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    for stands, here in (("http://127.0.0.1:8787", node.status["api"]), ("~/.local/share/swarmctl", str(node.home))):
        assert stands in example
        example = example.replace(stands, here)
    said = subprocess.run([sys.executable, "-c", example], check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
    assert said[0]
    assert said[1:] == ["2 vectors of 576"]


# -- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_what_does_not_fit_is_refused_before_the_work(ai: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        ai.chat.completions.create(model="smol", messages=[{"role": "user", "content": "word " * 4000}], stream=stream)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as long:
        ai.completions.create(model="smol", prompt="word " * 4000, stream=stream)
    assert long.value.code == "context_length_exceeded"


def test_a_worker_that_is_killed_is_an_error_and_no_end(node: Node, ai: openai.OpenAI) -> None:
    finishes = []
    with pytest.raises(openai.APIError):
        for chunk in ai.chat.completions.create(model="smol", messages=[{"role": "user", "content": ENDLESS}], temperature=0, stream=True):
            if len(finishes) == 5:
                workers(node)[0].send_signal(signal.SIGKILL)
            finishes.append(chunk.choices[0].finish_reason)
    assert set(finishes) == {None}

    def again() -> bool:
        try:
            return bool(ai.chat.completions.create(model="smol", messages=QUESTION, max_tokens=1).choices)
        except openai.APIStatusError:
            return False  # it is being loaded

    until(again, "the model coming back")


# -- sessions -----------------------------------------------------------------------------------------------------------


def test_a_session_goes_on_with_the_whole_conversation(node: Node) -> None:
    session = call(node, "POST", "/api/ai/sessions", {"modelId": "smol", "system": "Answer in one word."})
    used = []
    for text in ("What is the capital of France?", "And of Italy?"):
        question = {"sessionId": session["id"], "messages": [{"role": "user", "content": text}], "maxTokens": 8, "temperature": 0}
        used.append(call(node, "POST", "/api/ai/chat", question)["usage"]["prompt_tokens"])
    assert used[1] > used[0] + 8
    kept = call(node, "GET", f"/api/ai/sessions/{session['id']}")["messages"]
    assert [message["role"] for message in kept] == ["system", *["user", "assistant"] * 2]
    assert call(node, "DELETE", f"/api/ai/sessions/{session['id']}")["id"] == session["id"]


def test_metrics_of_the_answers(node: Node) -> None:
    with request(node, "GET", "/metrics") as response:
        lines = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if not line.startswith("#"))
    assert int(lines['swarmctl_answer_tokens_total{kind="completion"}']) > 0
    assert (lines["swarmctl_answers_running"], lines["swarmctl_answers_waiting"]) == ("0", "0")
