"""The HTTP API over real sockets: who is let in, what is refused, and our own routes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from daemon import config
from daemon.api.limits import Limits
from daemon.engine.interface import Sampling
from registry.records import Address, Peer
from tests.functional.api_server import CID, CID2, EXPIRES, MODEL, NODE, OTHER, RELAY, TOKEN, World, running

TOKENS = {"Authorization": f"Bearer {TOKEN}"}

MESSAGES = [{"role": "user", "content": "one two three"}]
QUESTION = {"modelId": "tiny", "messages": MESSAGES, "maxTokens": 9, "temperature": 0, "topP": 0.5, "seed": 3, "stop": "x"}


async def raw(world: World, data: bytes) -> tuple[int, bytes]:
    """What comes back for bytes that no proper client would send."""
    port = int(world.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data.replace(b"PORT", str(port).encode()).replace(b"TOKEN", TOKEN.encode()))
        answer = await reader.read(65536)
    finally:
        writer.close()
        await writer.wait_closed()
    return int(answer.split()[1]), answer


async def sse(response: aiohttp.ClientResponse) -> list[Any]:
    lines = (await response.text()).splitlines()
    return [line[6:] if line[6:] == "[DONE]" else json.loads(line[6:]) for line in lines if line.startswith("data: ")]


# -- who is let in ------------------------------------------------------------------------------------------------------


async def test_health_needs_no_token_and_everything_else_does(api: aiohttp.ClientSession, world: World) -> None:
    async with aiohttp.ClientSession(world.url) as anybody:
        assert (await anybody.get("/healthz")).status == 200
        for path in ("/api/status", "/v1/models", "/metrics", "/no/such"):
            assert (await anybody.get(path)).status == 401
        for header in ("", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer \xff"):
            answer = await anybody.get("/api/status", headers={"Authorization": header})
            assert answer.status == 401
            assert (await answer.json())["error"]["code"] == 2
    assert (await api.get("/api/status")).status == 200


@pytest.mark.parametrize(
    "hosts", [["evil.example"], ["evil.example:PORT"], ["127.0.0.1"], ["127.0.0.1:1"], ["0.0.0.0:PORT"], ["127.0.0.1:PORT", "evil"], []]
)
async def test_r18_only_a_loopback_host_with_our_port(api: aiohttp.ClientSession, world: World, hosts: list[str]) -> None:
    lines = "".join(f"Host: {host}\r\n" for host in hosts)
    status, _ = await raw(world, f"GET /healthz HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
    # aiohttp's own parser may refuse a request without one Host first.
    assert status == 421 or (len(hosts) != 1 and status == 400)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]"])
async def test_loopback_hosts_are_let_in(api: aiohttp.ClientSession, world: World, host: str) -> None:
    status, _ = await raw(world, f"GET /healthz HTTP/1.1\r\nHost: {host}:PORT\r\nConnection: close\r\n\r\n".encode())
    assert status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1", "https://localhost:1", ""])
async def test_r19_a_foreign_origin_is_refused(api: aiohttp.ClientSession, origin: str) -> None:
    answer = await api.get("/api/status", headers={"Origin": origin})
    assert answer.status == 403
    assert "Access-Control-Allow-Origin" not in answer.headers


async def test_our_own_origin_is_let_in(api: aiohttp.ClientSession, world: World) -> None:
    assert (await api.get("/api/status", headers={"Origin": world.url})).status == 200


async def test_r19_a_body_is_json_or_refused(api: aiohttp.ClientSession) -> None:
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        assert (await api.post("/api/trust", data=b"{}", headers=headers)).status == 415
        assert (await api.delete("/api/trust?key=x", data=b"{}", headers=headers)).status == 415


async def test_r20_nothing_of_kubo_is_passed_on(api: aiohttp.ClientSession, world: World) -> None:
    for path in ("/api/v0/id", "/api/v0", "/api/v0/config/show"):
        assert (await api.post(path)).status == 404
    async with aiohttp.ClientSession(world.url) as anybody:
        assert (await anybody.post("/api/v0/id")).status == 404


async def test_unknown_routes_and_methods(api: aiohttp.ClientSession) -> None:
    answer = await api.get("/no/such")
    assert (answer.status, (await answer.json())["error"]["code"]) == (404, 3)
    answer = await api.get("/api/stop")
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    answer = await api.post("/v1/responses", json={})
    error = (await answer.json())["error"]
    assert (answer.status, error["type"], error["code"]) == (404, "invalid_request_error", None)  # no model is missing


# -- our own routes -----------------------------------------------------------------------------------------------------


async def test_lists(api: aiohttp.ClientSession) -> None:
    (model,) = await (await api.get("/api/ai/list")).json()
    assert set(model) >= {
        "name", "size", "code", "cid", "infohash", "infohash_v2", "magnet", "manifest", "blake3", "sha256", "path", "signed_by", "trust",
        "serving", "seeders", "peers", "local", "state", "added",
    }  # fmt: skip
    assert (model["cid"], len(model["code"]), model["seeders"], model["serving"]) == (CID, 7, 3, False)
    swarm = await (await api.get("/api/swarm/models")).json()
    seen = [(entry["cid"], entry["nodes"], entry["local"], entry["serving"]) for entry in swarm]
    assert seen == [(CID2, 1, False, True), (CID, 2, True, False)]
    peer, relay = await (await api.get("/api/swarm/peers")).json()
    assert (peer["node"], peer["models"], len(peer["serving"]), peer["expires"]) == (OTHER, 2, 1, "2030-03-17T17:46:40Z")
    assert (peer["relays"], peer["relay"], peer["via"]) == ([RELAY], False, RELAY)
    assert (relay["relays"], relay["relay"], relay["via"]) == ([], True, None)
    assert (peer["seen"], relay["seen"]) == ("2027-01-15T08:00:00Z", None)


async def test_publish_whole_and_streamed(api: aiohttp.ClientSession) -> None:
    answer = await api.post("/api/ai/publish", json={"path": "/x/tiny.gguf"})
    assert (answer.status, (await answer.json())["cid"]) == (201, CID)
    events = await sse(await api.post("/api/ai/publish", json={"path": "/x/tiny.gguf"}, headers={"Accept": "text/event-stream"}))
    assert [event["state"] for event in events] == ["resolving", "fetching", "done"]
    assert events[-1]["model"]["cid"] == CID
    answer = await api.post("/api/ai/publish", json={"path": "/x/broken.gguf"})
    assert answer.status == 400
    assert await answer.json() == {"error": {"code": 2, "message": "broken: it is not a GGUF", "hint": "give another"}}
    assert (await api.post("/api/ai/publish", json={"path": "relative.gguf"})).status == 400


@pytest.mark.parametrize("field", ["ref", "url", "magnetUri"])
async def test_download_and_its_events(api: aiohttp.ClientSession, field: str) -> None:
    answer = await api.post("/api/ai/download", json={field: "tiny"})
    assert answer.status == 202
    transfer = await answer.json()
    events = await sse(await api.get(f"/api/transfers/{transfer['id']}/events"))
    assert events[-1]["state"] == "done"
    assert events[-1]["sources"] == {"ipfs": 50, "bittorrent": 50, "https": 0, "disk": 0}
    assert [item["id"] for item in await (await api.get("/api/transfers")).json()] == [transfer["id"]]


async def test_download_needs_exactly_one_ref(api: aiohttp.ClientSession) -> None:
    for body in ({}, {"ref": "a", "url": "b"}, {"ref": ""}, {"ref": 1}, {"ref": "a", "x": 1}, {"ref": "nonsense!"}):
        assert (await api.post("/api/ai/download", json=body)).status == 400


async def test_who_stops_watching_a_pull_does_not_end_it(api: aiohttp.ClientSession, world: World) -> None:
    transfer = await (await api.post("/api/ai/download", json={"ref": "slow"})).json()
    watching = await api.get(f"/api/transfers/{transfer['id']}/events")
    await watching.content.readline()
    watching.close()
    assert (await (await api.get(f"/api/transfers/{transfer['id']}")).json())["state"] != "cancelled"
    cancelled = await (await api.delete(f"/api/transfers/{transfer['id']}")).json()
    assert (cancelled["state"], world.transfers.cancelled) == ("cancelled", [transfer["id"]])
    for path in ("/api/transfers/nope", "/api/transfers/nope/events"):
        assert (await api.get(path)).status == 404


async def test_serve_stop_and_remove(api: aiohttp.ClientSession) -> None:
    served = await (await api.post("/api/ai/serve", json={"modelId": "tiny", "contextSize": 512})).json()
    assert (served["serving"], served["context"], served["slots"]) == (True, 512, 4)
    assert [m["id"] for m in (await (await api.get("/v1/models")).json())["data"]].count(served["code"]) == 1
    stopped = await (await api.delete("/api/ai/serve", params={"modelId": CID})).json()
    assert stopped["serving"] is False
    removed = await (await api.delete("/api/ai/model", params={"modelId": "tiny"})).json()
    assert removed["local"] is False
    assert await (await api.get("/api/ai/list")).json() == []
    assert (await api.delete("/api/ai/model", params={"modelId": "tiny"})).status == 404
    assert (await api.delete("/api/ai/model")).status == 400
    for bad in ({"contextSize": -1}, {"threads": 2**63}, {"gpuLayers": "all"}, {"slots": True}, {"surprise": 1}):
        assert (await api.post("/api/ai/serve", json={"modelId": "tiny", **bad})).status == 400


async def test_a_model_of_another_server_is_served_and_stopped_as_any(api: aiohttp.ClientSession, world: World) -> None:
    upstream = {"url": "http://127.0.0.1:1/v1", "model": "great-1", "key": "sk-secret"}
    answer = await api.post("/api/ai/serve", json={"upstream": upstream, "slots": 2})
    served = await answer.json()
    assert "sk-secret" not in await answer.text() and "127.0.0.1" not in await answer.text()
    assert (served["name"], served["serving"], served["upstream"], served["slots"]) == ("great-1", True, True, 2)
    assert (served["infohash"], served["magnet"], served["seeders"]) == (None, None, 0)
    assert world.upstreams.asked == [("http://127.0.0.1:1/v1", "great-1", "sk-secret")]
    models = await (await api.get("/api/swarm/models")).json()
    assert [model["code"] for model in models if model["upstream"]] == [served["code"]]
    assert served["code"] in [model["id"] for model in (await (await api.get("/v1/models")).json())["data"]]
    for method, path, body in (
        ("DELETE", "/api/ai/model", None), ("GET", "/api/ai/verify", None),
        ("POST", "/api/ai/serve", {"modelId": "great-1"}), ("POST", "/api/ai/download", {"ref": "great-1"}),
    ):  # fmt: skip
        refused = await api.request(method, path, params=None if body else {"modelId": "great-1"}, json=body)
        assert refused.status == 400 and "another server answers for it" in (await refused.json())["error"]["message"]
    stopped = await (await api.delete("/api/ai/serve", params={"modelId": "great-1"})).json()
    assert (stopped["code"], stopped["serving"]) == (served["code"], False) and world.upstreams.running == []
    assert (await api.delete("/api/ai/serve", params={"modelId": "great-1"})).status == 404


async def test_a_name_that_a_model_here_and_one_of_another_server_share(api: aiohttp.ClientSession, world: World) -> None:
    await api.post("/api/ai/serve", json={"modelId": "tiny"})
    await api.post("/api/ai/serve", json={"upstream": {"url": "http://127.0.0.1:1/v1", "model": "tiny"}})
    refused = await api.delete("/api/ai/serve", params={"modelId": "tiny"})
    assert refused.status == 409 and "use its code" in (await refused.json())["error"]["hint"]
    assert len(world.upstreams.running) == len(world.serving.running) == 1
    assert (await api.delete("/api/ai/serve", params={"modelId": CID})).status == 200
    assert (await api.delete("/api/ai/serve", params={"modelId": world.upstreams.running[0].offer.cid})).status == 200
    assert world.upstreams.running == [] and world.serving.running == {}


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"upstream": {"url": "http://a", "model": "unlisted"}}, 404), ({"upstream": {"url": "http://a"}}, 400),
        ({"upstream": {"model": "m"}}, 400),
        ({"upstream": "http://a"}, 400), ({"upstream": {"url": "http://a", "model": "m", "x": 1}}, 400),
        ({"upstream": {"url": "http://a", "model": "m"}, "modelId": "tiny"}, 400), ({"upstream": []}, 400),
        ({"upstream": {"url": "http://a", "model": "m"}, "contextSize": 512}, 400), ({"upstream": {"url": 7, "model": "m"}}, 400),
        ({"upstream": {"url": "http://a", "model": "m"}, "slots": 0}, 400),
    ],
)  # fmt: skip
async def test_another_server_that_is_not_asked_for_properly(api: aiohttp.ClientSession, more: dict[str, Any], status: int) -> None:
    assert (await api.post("/api/ai/serve", json=more)).status == status


async def test_verify_and_fsck(api: aiohttp.ClientSession, world: World) -> None:
    assert (await (await api.get("/api/ai/verify", params={"modelId": "tiny"})).json())["verified"] is True
    world.library.held = [replace(MODEL, name="rotten")]
    assert [model["state"] for model in await (await api.post("/api/fsck")).json()] == ["quarantined"]


async def test_trust(api: aiohttp.ClientSession) -> None:
    entry = {"key": NODE, "state": "trusted", "name": "me"}
    assert await (await api.post("/api/trust", json=entry)).json() == entry
    assert await (await api.get("/api/trust")).json() == [entry]
    assert await (await api.delete("/api/trust", params={"key": NODE})).json() == entry
    assert (await api.delete("/api/trust", params={"key": NODE})).status == 404


async def test_join_and_register(api: aiohttp.ClientSession) -> None:
    address = "swarmctl://" + "cd" * 32 + "?http=http://127.0.0.1:9"
    assert (await (await api.post("/api/swarm/join", json={"address": address})).json())["node"] == OTHER
    assert (await api.post("/api/swarm/join", json={"address": "nowhere"})).status == 400
    assert (await (await api.post("/api/swarm/register", json={"node": OTHER})).json())["node"] == OTHER
    for wrong, status, code in (("malformed", 400, 2), ("forged", 400, 4), ("again", 409, 2)):
        refused = await api.post("/api/swarm/register", json={"node": wrong})
        assert (refused.status, (await refused.json())["error"]["code"]) == (status, code)


async def test_metrics(api: aiohttp.ClientSession) -> None:
    await (await api.get("/no/such")).read()
    text = await (await api.get("/metrics")).text()
    assert "\nswarmctl_models 1\n" in text
    assert '\nswarmctl_http_requests_total{route="",status="404"} 1\n' in text
    for prompt in ("two words", "fail later", "busy"):
        await (await api.post("/api/ai/chat", json={"modelId": "tiny", "messages": [{"role": "user", "content": prompt}]})).read()
    await (await api.post("/v1/embeddings", json={"model": "tiny", "input": "four"})).read()
    text = await (await api.get("/metrics")).text()
    for line in (
        'http_requests_total{route="/api/ai/chat",status="200"} 1', 'answers_total{outcome="done"} 2', 'answers_total{outcome="failed"} 1',
        'answers_total{outcome="refused"} 1', 'answers_total{outcome="cancelled"} 0', "answers_running 0", "answers_waiting 0",
        'answer_tokens_total{kind="prompt"} 7', 'answer_tokens_total{kind="completion"} 5', 'answer_tokens_total{kind="cached"} 2',
    ):  # fmt: skip
        assert f"\nswarmctl_{line}\n" in text
    assert float(text.rpartition("\nswarmctl_loop_delay_p99_seconds ")[2]) >= 0


async def test_stop(api: aiohttp.ClientSession, world: World) -> None:
    assert (await api.post("/api/stop")).status == 202
    assert world.stopped.is_set()


async def test_chats_in_our_own_words(api: aiohttp.ClientSession, world: World) -> None:
    whole = await (await api.post("/api/ai/chat", json=QUESTION)).json()
    assert (whole["content"], whole["answered_by"], whole["code"]) == ("one two three ", OTHER, "abc2def")
    (_, asked) = world.answers.requests[-1]
    assert asked.sampling == Sampling(max_tokens=9, temperature=0.0, top_p=0.5, seed=3, stop=("x",))
    events = await sse(await api.post("/api/swarm/relay/chat", json={"messages": MESSAGES, "stream": True}))
    assert events[0] == {"answered_by": OTHER, "via": None, "code": "abc2def", "name": "tiny"}
    assert "".join(event.get("text", "") for event in events) == "one two three "
    assert (events[-1]["finish_reason"], events[-1]["usage"]["total_tokens"]) == ("stop", 8)
    failing = [{"role": "user", "content": "fail later"}]
    later = await sse(await api.post("/api/swarm/relay/chat", json={"messages": failing, "stream": True}))
    assert later[-1]["error"]["code"] == 7
    cut = await api.post("/api/swarm/relay/chat", json={"messages": [{"role": "user", "content": "cut off"}]})
    assert cut.status == 503


@pytest.mark.parametrize("path", ["/api/ai/chat", "/api/swarm/relay/chat"])
@pytest.mark.parametrize(("via", "through"), [("auto", None), ("never", None), (RELAY, RELAY), ("1A2b3C4d", RELAY)])
async def test_the_relay_may_be_named(api: aiohttp.ClientSession, path: str, via: str, through: str | None) -> None:
    answer = await (await api.post(path, json={**QUESTION, "via": via})).json()
    assert (answer["answered_by"], answer["via"]) == (OTHER, through)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("via", "status", "code"),
    [("ffffffff", 404, 3), ("1a2b3c4d", 409, 3), ("nearby", 400, 2), ("x" * 80, 400, 2), (7, 400, 2)],
)
async def test_a_relay_that_cannot_be_told(
    api: aiohttp.ClientSession, world: World, via: Any, status: int, code: int, stream: bool
) -> None:
    twin = "ed25519:1a2b3c4d" + "00" * 28
    world.peers.rows.append(Peer(twin, None, Address(twin), 1, EXPIRES))
    body = {"messages": MESSAGES, "via": via, "stream": stream}
    answer = await api.post("/api/swarm/relay/chat", json=body)
    assert (answer.status, (await answer.json())["error"]["code"]) == (status, code)
    assert world.answers.requests == []


async def test_privacy_follows_settings_and_state(api: aiohttp.ClientSession, world: World) -> None:
    quiet = await (await api.get("/api/privacy")).json()
    assert all(set(told) == {"who", "learns", "because", "change"} for told in quiet)
    world.config = config.load(Path("/nonexistent"), {}, {})
    world.standing["relays"] = [RELAY]
    async with running(world) as url, aiohttp.ClientSession(url, headers=TOKENS) as anew:
        loud = await (await anew.get("/api/privacy")).json()
    names = {told["who"] for told in loud}
    assert names > {"the node that carries for this one", "the bootstrap hosts"}
    assert not names & {"nodes of this machine that were joined"}


@pytest.mark.parametrize("prompt", ["for ever", "flood"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/swarm/relay/chat"])
async def test_who_goes_away_cancels_the_generation(world: World, prompt: str, path: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "stream": True}
    async with running(world) as url, aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {TOKEN}"}) as session:
        answer = await session.post(path, json={**body, "model": "tiny"} if path.startswith("/v1") else body)
        await answer.content.readline()
        assert not world.answers.closed.is_set()
        answer.close()
        async with asyncio.timeout(10):
            await world.answers.closed.wait()


async def test_silence_is_filled(world: World) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with running(world, Limits(first_s=0.05, silence_s=0.05)) as url, aiohttp.ClientSession(url, headers=headers) as api:
        transfer = await (await api.post("/api/ai/download", json={"ref": "slow"})).json()
        watching = await api.get(f"/api/transfers/{transfer['id']}/events")
        while not (line := await watching.content.readline()).startswith(b":"):
            assert line
        await (await api.delete(f"/api/transfers/{transfer['id']}")).read()
        assert b'"cancelled"' in await watching.content.read()
