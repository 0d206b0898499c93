"""OpenAI's own client against the API, with answers made up by the stand-in: every shape, whole and streamed, and every error."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import aiohttp
import openai
import pytest
from pydantic import BaseModel

from daemon.api import asking
from daemon.engine.interface import ChatRequest, CompletionRequest, EmbeddingRequest, Sampling, ServeOptions
from tests.functional.api_server import CID, CID2, MODEL, OTHER, TOKEN, World, running

MESSAGES: Any = [{"role": "user", "content": "one two three"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def tool(name: str) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA}}


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


@pytest.fixture
async def url(world: World) -> AsyncIterator[str]:
    async with running(world) as url:
        yield url


@pytest.fixture
async def ai(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


@pytest.fixture
async def api(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {TOKEN}"}) as session:
        yield session


async def events(response: aiohttp.ClientResponse) -> list[Any]:
    lines = (await response.text()).splitlines()
    return [line[6:] if line[6:] == "[DONE]" else json.loads(line[6:]) for line in lines if line.startswith("data: ")]


# -- models -------------------------------------------------------------------------------------------------------------


async def test_models_are_all_that_can_be_asked(ai: openai.AsyncOpenAI, world: World) -> None:
    for _ in range(2):  # a model that is here is loaded when somebody asks
        listed = {model.id: model.model_dump() async for model in await ai.models.list()}
        assert {model["cid"] for model in listed.values()} == {CID, CID2}
        await world.serving.serve(MODEL, ServeOptions())
    code = next(model["id"] for model in listed.values() if model["cid"] == CID)
    for name in (code, f"#{code}", CID, "tiny", code.upper()):
        assert (await ai.models.retrieve(name)).id == code
    for name in ("nobody", "owner/model", "gpt-4o"):
        with pytest.raises(openai.NotFoundError) as missing:
            await ai.models.retrieve(name)
        assert missing.value.code == "model_not_found"


async def test_what_somebody_only_holds_cannot_be_asked(api: aiohttp.ClientSession, world: World) -> None:
    world.library.held = []
    listed = await (await api.get("/v1/models")).json()
    assert [model["cid"] for model in listed["data"]] == [CID2]
    assert (await api.get(f"/v1/models/{quote('#' + listed['data'][0]['id'])}")).status == 200
    assert (await api.get(f"/v1/models/{CID}")).status == 404


# -- chats --------------------------------------------------------------------------------------------------------------


async def test_a_whole_chat(ai: openai.AsyncOpenAI, world: World) -> None:
    answer = await ai.chat.completions.create(
        model="tiny", max_tokens=9, temperature=0, stop="x", seed=1,
        messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "one two"}]}],
        user="me", metadata={"a": "b"}, store=False, n=1, logprobs=False, response_format={"type": "text"},
        extra_body={"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1},
    )  # fmt: skip
    assert (answer.object, answer.id[:9], answer.model, answer.model_dump()["answered_by"]) == (
        "chat.completion",
        "chatcmpl-",
        "abc2def",
        OTHER,
    )
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason, choice.logprobs, choice.message.tool_calls) == ("one two ", "stop", None, None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    used = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert (*used, answer.usage.prompt_tokens_details.cached_tokens) == (3, 5, 8, 2)
    ((model, asked),) = world.answers.requests
    assert isinstance(asked, ChatRequest)
    sampling = Sampling(max_tokens=9, temperature=0.0, stop=("x",), seed=1, top_k=5, min_p=0.1, repeat_penalty=1.1)
    assert (model, asked.sampling) == ("tiny", sampling)
    assert [message["role"] for message in asked.messages] == ["system", "user"]
    # The client's own answer goes back as it came.
    history: Any = [choice.message.model_dump(), *said("more")]
    assert (await ai.chat.completions.create(model="tiny", messages=history)).choices[0].message.content == "more "


@pytest.mark.parametrize("include_usage", [True, False])
async def test_a_streamed_chat(ai: openai.AsyncOpenAI, include_usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = [chunk async for chunk in await ai.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **options)]
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == "one two three "
    assert [choice.delta.role for choice in choices] == ["assistant", None, None, None]
    assert [choice.finish_reason for choice in choices] == [None, None, None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.model_dump()["answered_by"] == OTHER for chunk in chunks)
    assert (chunks[-1].usage is not None) is include_usage
    assert all(chunk.usage is None for chunk in chunks if chunk.choices)


async def test_several_choices_are_merged_by_index(ai: openai.AsyncOpenAI, world: World) -> None:
    answer = await ai.chat.completions.create(model="tiny", messages=MESSAGES, n=3, seed=5)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(index, "one two three ") for index in range(3)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 15)
    assert [request.sampling.seed for _, request in world.answers.requests if isinstance(request, ChatRequest)] == [5, 6, 7]
    texts, ended, used = ["", ""], [], []
    options: Any = {"include_usage": True}
    async for chunk in await ai.chat.completions.create(model="tiny", messages=MESSAGES, n=2, stream=True, stream_options=options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ended += [choice.index] if choice.finish_reason else []
        used += [chunk.usage.total_tokens] if chunk.usage else []
    assert (texts, sorted(ended), used) == (["one two three "] * 2, [0, 1], [13])


@pytest.mark.parametrize("stream", [True, False])
async def test_one_choice_that_fails_fails_them_all(api: aiohttp.ClientSession, world: World, stream: bool) -> None:
    question = {"model": "tiny", "messages": said("fail later"), "n": 3, "stream": stream}
    answer = await api.post("/v1/chat/completions", json=question)
    assert answer.status == (200 if stream else 500)
    assert "[DONE]" not in await answer.text()


async def test_who_goes_away_ends_all_choices(api: aiohttp.ClientSession, world: World) -> None:
    answer = await api.post("/v1/chat/completions", json={"model": "tiny", "messages": said("for ever"), "n": 4, "stream": True})
    await answer.content.readline()
    answer.close()
    async with asyncio.timeout(10):
        while True:
            text = await (await api.get("/metrics")).text()
            if 'answers_total{outcome="cancelled"} 0' not in text and "\nswarmctl_answers_running 0\n" in text:
                break
            await asyncio.sleep(0.01)
    assert "\nswarmctl_answers_waiting 0\n" in text


@pytest.mark.parametrize("top", [0, 2])
async def test_logprobs_of_a_chat(ai: openai.AsyncOpenAI, top: int) -> None:
    answer = await ai.chat.completions.create(model="tiny", messages=said("né"), logprobs=True, top_logprobs=top)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert [(bytes(token.bytes or []), token.logprob) for token in found.content] == [
        (b"n", -0.5), (b"\xc3", -0.5), (b"\xa9", -0.5), (b" ", -0.5),
    ]  # fmt: skip
    assert [one.token for one in found.content[0].top_logprobs] == ["n", "?"][:top]
    pieces = []
    async for chunk in await ai.chat.completions.create(model="tiny", messages=said("né"), logprobs=True, stream=True):
        pieces += [token.token for choice in chunk.choices if choice.logprobs for token in choice.logprobs.content or []]
    assert pieces == ["n", "\ufffd", "\ufffd", " "]


# -- tools and schemas --------------------------------------------------------------------------------------------------


async def test_tool_calls(ai: openai.AsyncOpenAI, world: World) -> None:
    answer = await ai.chat.completions.create(model="tiny", messages=MESSAGES, tools=[tool("weather"), tool("time")])
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    called = [
        (call.id, call.type, call.function.name, call.function.arguments)
        for call in choice.message.tool_calls or []
        if call.type == "function"
    ]
    assert called == [(f"call_{i}", "function", name, '{"city": "Ghent"}') for i, name in enumerate(("weather", "time"))]
    # The conversation goes on with what the tools gave.
    history: Any = [*MESSAGES, choice.message.model_dump(exclude_none=True)]
    history += [{"role": "tool", "tool_call_id": call[0], "content": "sunny"} for call in called]
    after = await ai.chat.completions.create(model="tiny", messages=history, tools=[tool("weather")], tool_choice="none")
    assert after.choices[0].message.content == "sunny "
    asked = world.answers.requests[-1][1]
    assert isinstance(asked, ChatRequest)
    assert [message["role"] for message in asked.messages] == ["user", "assistant", "tool", "tool"]
    assert [call["function"]["name"] for call in asked.messages[1]["tool_calls"]] == ["weather", "time"]


async def test_tool_calls_as_they_are_streamed(api: aiohttp.ClientSession) -> None:
    question = {"model": "tiny", "messages": MESSAGES, "tools": [tool("weather")], "stream": True}
    *chunks, done = await events(await api.post("/v1/chat/completions", json=question))
    assert done == "[DONE]"
    first = {"index": 0, "id": "call_0", "type": "function", "function": {"name": "weather", "arguments": ""}}
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": None, "tool_calls": [first]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Ghent"}'}}]},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "tool_calls"]


async def test_the_stream_helper_puts_text_and_calls_together(ai: openai.AsyncOpenAI) -> None:
    async with ai.chat.completions.stream(model="tiny", messages=said("say it"), tools=[tool("weather"), tool("time")]) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "I ask."
    assert [call.function.arguments for call in final.choices[0].message.tool_calls or []] == ['{"city": "Ghent"}'] * 2
    assert kinds.count("tool_calls.function.arguments.done") == 2


class City(BaseModel):
    city: str


async def test_the_parse_helper(ai: openai.AsyncOpenAI, world: World) -> None:
    parsed = await ai.chat.completions.parse(model="tiny", messages=said('{"city":"Ghent"}'), response_format=City)
    assert parsed.choices[0].message.parsed == City(city="Ghent")
    asked = world.answers.requests[-1][1]
    assert isinstance(asked, ChatRequest)
    assert asked.schema is not None
    assert asked.schema["properties"] == {"city": {"title": "City", "type": "string"}}
    called = await ai.chat.completions.parse(model="tiny", messages=MESSAGES, tools=[openai.pydantic_function_tool(City, name="go")])
    assert [call.function.parsed_arguments for call in called.choices[0].message.tool_calls or []] == [City(city="Ghent")]


# -- completions and embeddings -----------------------------------------------------------------------------------------


async def test_completions(ai: openai.AsyncOpenAI, world: World) -> None:
    answer = await ai.completions.create(model="tiny", prompt=["a b", "c"], n=2, seed=1, echo=True, logit_bias={"5": -100})
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [
        (0, "a ba b ", "stop"), (1, "a ba b ", "stop"), (2, "cc ", "stop"), (3, "cc ", "stop"),
    ]  # fmt: skip
    assert (answer.object, answer.id[:5]) == ("text_completion", "cmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 20)
    asked = [request for _, request in world.answers.requests if isinstance(request, CompletionRequest)]
    assert all((one.sampling.logit_bias, one.sampling.max_tokens) == ({5: -100}, 16) for one in asked)
    tokens = await ai.completions.create(model="tiny", prompt=[7, 8])
    assert tokens.choices[0].text == "7 8 "


async def test_streamed_completions(ai: openai.AsyncOpenAI, api: aiohttp.ClientSession) -> None:
    options: Any = {"include_usage": True}
    texts, used = {0: "", 1: ""}, []
    stream = await ai.completions.create(model="tiny", prompt=["a b", "c"], echo=True, stream=True, stream_options=options)
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        used += [chunk.usage.total_tokens] if chunk.usage else []
    assert (texts, used) == ({0: "a ba b ", 1: "cc "}, [16])
    assert (await events(await api.post("/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True})))[-1] == "[DONE]"


async def test_logprobs_of_a_completion(ai: openai.AsyncOpenAI) -> None:
    found = (await ai.completions.create(model="tiny", prompt="né", logprobs=2)).choices[0].logprobs
    assert found is not None
    assert (found.tokens, found.token_logprobs) == (["n", "bytes:\\xc3", "bytes:\\xa9", " "], [-0.5] * 4)
    assert found.text_offset == [0, 1, 1, 2]
    assert found.top_logprobs is not None
    assert found.top_logprobs[0] == {"n": -0.5, "?": -1.5}
    offsets = []
    async for chunk in await ai.completions.create(model="tiny", prompt="a b", logprobs=0, stream=True):
        offsets += [offset for choice in chunk.choices if choice.logprobs for offset in choice.logprobs.text_offset or []]
    assert offsets == [0, 1, 2, 3]


async def test_embeddings(ai: openai.AsyncOpenAI, api: aiohttp.ClientSession) -> None:
    found = await ai.embeddings.create(model="tiny", input=["four", "a"])  # the client asks for base64
    assert [(one.index, one.embedding) for one in found.data] == [(0, [4.0, 1.0]), (1, [1.0, 1.0])]
    assert (found.model, found.usage.prompt_tokens, found.usage.total_tokens) == ("abc2def", 5, 5)
    assert (await ai.embeddings.create(model="tiny", input=[[1, 2], [3]], encoding_format="float")).data[0].embedding == [2.0, 1.0]
    raw = await (await api.post("/v1/embeddings", json={"model": "tiny", "input": "ab", "encoding_format": "base64"})).json()
    assert (raw["object"], raw["answered_by"]) == ("list", OTHER)
    assert struct.unpack("<2f", base64.b64decode(raw["data"][0]["embedding"])) == (2.0, 1.0)
    assert len((await ai.embeddings.create(model="tiny", input=["x"] * 2048, dimensions=2)).data) == 2048
    with pytest.raises(openai.BadRequestError, match="must be 2") as refused:
        await ai.embeddings.create(model="tiny", input="x", dimensions=1)
    assert refused.value.param == "dimensions"


async def test_a_node_that_forgets_a_vector_is_not_believed(ai: openai.AsyncOpenAI, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world.answers.embed
    monkeypatch.setattr(world.answers, "embed", lambda model, request: whole(model, EmbeddingRequest(request.inputs[1:])))
    with pytest.raises(openai.InternalServerError):
        await ai.embeddings.create(model="tiny", input=["a", "b"])


async def test_a_node_whose_answer_never_ends_is_given_up(ai: openai.AsyncOpenAI, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MAX_ANSWER", 1 << 20)
    with pytest.raises(openai.InternalServerError, match="no end"):
        await ai.chat.completions.create(model="tiny", messages=said("flood"))
    assert world.answers.closed.is_set()


# -- errors -------------------------------------------------------------------------------------------------------------


async def test_errors(ai: openai.AsyncOpenAI, url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as unknown:
            await stranger.models.list()
    assert (unknown.value.code, unknown.value.type) == ("invalid_api_key", "authentication_error")
    create: Any = ai.chat.completions.create
    for stream in (True, False):
        with pytest.raises(openai.NotFoundError) as missing:
            await create(model="nobody", messages=MESSAGES, stream=stream)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError):
            await create(model="tiny", messages=said("fail at once"), stream=stream)
        with pytest.raises(openai.BadRequestError) as long:
            await create(model="tiny", messages=said("too long"), stream=stream)
        assert (long.value.code, long.value.type) == ("context_length_exceeded", "invalid_request_error")
        with pytest.raises(openai.RateLimitError) as busy:
            await create(model="tiny", messages=said("busy"), stream=stream)
        assert int(busy.value.response.headers["Retry-After"]) > 0
        with pytest.raises(openai.InternalServerError) as bug:
            await create(model="tiny", messages=said("bug"), stream=stream)
        assert "secret" not in str(bug.value)
    with pytest.raises(openai.BadRequestError) as wrong:
        await create(model="tiny", messages=[{"role": "user", "content": "x", "surprise": 1}])
    assert (wrong.value.param, wrong.value.code) == ("messages[0].surprise", None)


@pytest.mark.parametrize("prompt", ["fail later", "cut off"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_an_answer_that_fails_never_looks_finished(
    api: aiohttp.ClientSession, ai: openai.AsyncOpenAI, prompt: str, path: str
) -> None:
    question = {"messages": said(prompt)} if "chat" in path else {"prompt": prompt}
    found = await events(await api.post(path, json={"model": "tiny", "stream": True, **question}))
    assert set(found[-1]) == {"error"}
    assert set(found[-1]["error"]) == {"message", "type", "param", "code"}
    assert not any(choice["finish_reason"] for event in found[:-1] for choice in event["choices"])
    create: Any = ai.chat.completions.create if "chat" in path else ai.completions.create
    with pytest.raises(openai.APIError):
        async for _ in await create(model="tiny", stream=True, **question):
            pass
