"""Conversations that the daemon remembers, over HTTP and with a clock that the test moves."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from daemon.api import sessions
from tests.functional.api_server import World

Json = dict[str, Any]


async def begin(api: aiohttp.ClientSession, **fields: Any) -> Json:
    answer = await api.post("/api/ai/sessions", json=fields)
    assert answer.status == 201
    found: Json = await answer.json()
    return found


async def ask(api: aiohttp.ClientSession, session: Json, text: str, path: str = "/api/ai/chat", **more: Any) -> aiohttp.ClientResponse:
    return await api.post(path, json={"sessionId": session["id"], "messages": [{"role": "user", "content": text}], **more})


async def remembered(api: aiohttp.ClientSession, session: Json) -> list[tuple[str, str]]:
    found = await (await api.get(f"/api/ai/sessions/{session['id']}")).json()
    return [(message["role"], message["content"]) for message in found["messages"]]


async def test_a_session_remembers_question_and_answer(api: aiohttp.ClientSession, world: World) -> None:
    session = await begin(api, modelId="tiny", system="be kind")
    assert session["messages"] == [{"role": "system", "content": "be kind"}]
    first = await (await ask(api, session, "one")).json()
    assert first["content"] == "one "
    second = await (await ask(api, session, "history", "/api/swarm/relay/chat")).json()
    assert second["content"] == "system:be kind|user:one|assistant:one |user:history "
    streamed = await (await ask(api, session, "two", "/api/swarm/relay/chat", stream=True)).text()
    assert '"finish_reason":"stop"' in streamed
    assert (await remembered(api, session))[-2:] == [("user", "two"), ("assistant", "two ")]
    assert len(await remembered(api, session)) == 7
    # A session is asked by the full code of its model: a name may mean another one tomorrow.
    assert {len(model or "") for model, _ in world.answers.requests} == {52}
    (listed,) = await (await api.get("/api/ai/sessions")).json()
    assert (listed["id"], listed["modelId"], listed["messages"]) == (session["id"], session["modelId"], 7)


async def test_a_session_keeps_to_the_model_that_answered_first(api: aiohttp.ClientSession, world: World) -> None:
    session = await begin(api)
    assert session["modelId"] is None
    await (await ask(api, session, "one")).read()
    await (await ask(api, session, "two")).read()
    await (await ask(api, session, "three", modelId="tiny")).read()
    models = [model for model, _ in world.answers.requests]
    assert (models[0], len(models[1] or ""), models[2]) == (None, 52, "tiny")
    assert (await (await api.get(f"/api/ai/sessions/{session['id']}")).json())["modelId"] == "abc2def"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("text", ["fail later", "cut off", "busy", "too long", "bug"])
async def test_a_question_that_failed_is_taken_back(api: aiohttp.ClientSession, text: str, stream: bool) -> None:
    session = await begin(api, modelId="tiny")
    await (await ask(api, session, "one")).read()
    await (await ask(api, session, text, "/api/swarm/relay/chat", stream=stream)).read()
    assert await remembered(api, session) == [("user", "one"), ("assistant", "one ")]
    assert (await ask(api, session, "two")).status == 200


async def test_a_question_that_was_given_up_is_taken_back(api: aiohttp.ClientSession, world: World) -> None:
    session = await begin(api, modelId="tiny")
    answer = await ask(api, session, "for ever", "/api/swarm/relay/chat", stream=True)
    await answer.content.readline()
    assert (await ask(api, session, "one")).status == 409
    answer.close()
    async with asyncio.timeout(10):
        while (await ask(api, session, "one")).status == 409:
            await asyncio.sleep(0.01)
    assert await remembered(api, session) == [("user", "one"), ("assistant", "one ")]


async def test_idle_sessions_expire_and_a_question_renews(api: aiohttp.ClientSession, world: World) -> None:
    short, long = await begin(api, modelId="tiny", timeout=100), await begin(api, modelId="tiny")
    world.passed = 90
    assert (await ask(api, short, "one")).status == 200
    world.passed = 180
    assert len(await remembered(api, short)) == 2  # looking does not renew
    world.passed = 195
    answer = await ask(api, short, "two")
    assert (answer.status, (await answer.json())["error"]) == (
        404, {"code": 3, "message": "session: it has expired", "hint": "POST /api/ai/sessions begins one"},
    )  # fmt: skip
    assert [one["id"] for one in await (await api.get("/api/ai/sessions")).json()] == [long["id"]]
    assert "there is no such session" in await (await api.get("/api/ai/sessions/nope")).text()
    world.passed = 1800
    assert await (await api.get("/api/ai/sessions")).json() == []


async def test_a_session_that_waits_does_not_expire(api: aiohttp.ClientSession, world: World) -> None:
    session = await begin(api, modelId="tiny", timeout=100)
    asking = asyncio.create_task(ask(api, session, "wait"))
    async with asyncio.timeout(10):
        while not world.answers.requests:
            await asyncio.sleep(0.01)
    world.passed = 1000
    assert len(await (await api.get("/api/ai/sessions")).json()) == 1
    world.answers.gate.set()
    assert (await asking).status == 200
    assert len(await remembered(api, session)) == 2


async def test_a_deleted_session_is_gone(api: aiohttp.ClientSession) -> None:
    session = await begin(api)
    path = f"/api/ai/sessions/{session['id']}"
    assert (await (await api.delete(path)).json())["id"] == session["id"]
    assert ((await api.get(path)).status, (await api.delete(path)).status, (await ask(api, session, "one")).status) == (404, 404, 404)


async def test_sessions_have_ceilings(api: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 3)
    monkeypatch.setattr(sessions, "MAX_SIZE", 1000)
    monkeypatch.setattr(sessions, "MAX_SIZE_OF_ALL", 2000)
    one, two, three = [await begin(api, modelId="tiny") for _ in range(3)]
    full = await api.post("/api/ai/sessions", json={})
    assert (full.status, "Retry-After" in full.headers) == (429, True)
    assert (await ask(api, one, "x" * 2000)).status == 400
    for session in (one, two):
        assert (await ask(api, session, "x" * 400)).status == 200
    assert (await ask(api, two, "x" * 400)).status == 400
    assert (await ask(api, three, "x" * 400)).status == 429
    assert (await ask(api, three, "x")).status == 200  # what is small fits
    assert len(await remembered(api, two)) == 2


@pytest.mark.parametrize(
    "fields",
    [{"modelId": "nobody"}, {"modelId": 1}, {"timeout": 0}, {"timeout": 10**9}, {"timeout": "1"}, {"system": ""}, {"surprise": 1}],
)
async def test_bad_sessions(api: aiohttp.ClientSession, fields: Json) -> None:
    assert (await api.post("/api/ai/sessions", json=fields)).status == (404 if fields.get("modelId") == "nobody" else 400)
