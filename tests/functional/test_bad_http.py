"""R23 to R26 and other HTTP that no proper client sends, on a real node with a real model; and a worker that is killed in an answer."""

from __future__ import annotations

import gzip
import json
import selectors
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.functional.asking import completion, ended, free_slots, token, workers
from tests.functional.bad_http import CHAT, HELLO, Server, answer, serving
from tests.functional.nodes import until

MIB = 1 << 20


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory, kubo_binary: Path, model_file: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("http"), kubo_binary, model_file) as server:
        yield server


@pytest.fixture
def server(one_server: Server) -> Server:
    one_server.serve()
    return one_server


def official(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.node.status["api"] + "/v1", api_key=token(server.node), max_retries=0)


def refused(given: tuple[int, Any], status: int, param: str | None = None) -> None:
    """An error in OpenAI's shape that blames the caller."""
    assert given[0] == status, given
    error = given[1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error


# -- R23, R24: more than there should be --------------------------------------------------------------------------------


@pytest.mark.parametrize("codings", [["gzip"], ["GZIP"], ["deflate"], ["br"], ["zstd"], ["identity", "gzip"], ["gzip, gzip"]])
def test_r23_a_coded_body_is_refused_and_never_unpacked(server: Server, codings: list[str]) -> None:
    bomb = gzip.compress(bytes(64 * MIB))
    daemon = psutil.Process(server.node.status["pid"])
    before = daemon.memory_info().rss
    lines = [f"Content-Encoding: {coding}" for coding in codings]
    refused(server.raw(server.head(CHAT, *lines, f"Content-Length: {len(bomb)}") + bomb), 415)
    assert daemon.memory_info().rss - before < 32 * MIB
    server.answers()


def test_r24_a_header_or_an_address_that_is_too_long(server: Server) -> None:
    for line, status in (("X: " + "x" * MIB, 431), ("x" * MIB + ": x", 431), ("Authorization: Bearer " + "x" * 20_000, 431)):
        found, body = server.raw(server.head("/api/status", line, method="GET"))
        assert (found, body["error"]["code"]) == (status, 2)
        assert "xxx" not in body["error"]["message"]
    found, body = server.raw(server.head("/api/status?" + "x" * MIB, method="GET"))
    assert (found, body["error"]["code"]) == (414, 2)
    found, body = server.raw(server.head("/api/status", *(f"X-{number}: x" for number in range(1000)), method="GET"))
    assert (found, body["error"]["code"]) == (400, 2)
    server.answers()


def test_r24_a_prompt_of_100_mb_is_refused_by_its_length_alone(server: Server) -> None:
    for length in (100 * MIB, 2**63, 2**64 - 1):
        refused(server.raw(server.head(CHAT, f"Content-Length: {length}")), 413)  # none of it was sent


def test_r24_a_prompt_of_100_mb_in_chunks_is_refused_before_its_end(server: Server) -> None:
    (worker,) = workers(server.node)
    before = worker.cpu_times().user
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    sent = 0
    with server.connect() as connection, selectors.DefaultSelector() as ready:
        connection.sendall(server.head(CHAT, "Transfer-Encoding: chunked"))
        connection.sendall(b'16\r\n{"messages": [{"role":\r\n')
        ready.register(connection, selectors.EVENT_READ)
        while not ready.select(0) and sent < 100 * MIB:
            connection.sendall(chunk)
            sent += len(chunk)
        refused(answer(connection), 413)
    assert sent < 100 * MIB
    assert worker.cpu_times().user - before < 1  # the tokens of 4 MiB alone would take longer


def test_r24_what_is_too_large_for_the_official_client(server: Server) -> None:
    with official(server) as ai, pytest.raises(openai.APIStatusError) as caught:
        ai.chat.completions.create(model=server.code, messages=[{"role": "user", "content": "x" * (8 * MIB)}])
    assert caught.value.status_code == 413


# -- R25, R26: fields and JSON --------------------------------------------------------------------------------------------

NUMBERS = ("-1", "1e999", "-1e999", '"5"', "true", "[]", "{}", str(2**63), "9" * 400)
FIELDS = {
    "max_tokens": (*NUMBERS, "0", "1.5"), "max_completion_tokens": (*NUMBERS, "0"), "temperature": NUMBERS, "top_p": (*NUMBERS, "1.01"),
    "min_p": NUMBERS, "top_k": (*NUMBERS[:-1], "0.5"), "frequency_penalty": ("-2.1", *NUMBERS[1:]), "presence_penalty": NUMBERS[1:],
    "seed": ("1e999", '"5"', "true", "9" * 400), "stop": ("5", '[""]', "[1]"), "stream": ("1", '"yes"'), "n": ("0", "true", str(2**63)),
    "model": ("5", '""', '"a\\u0000b"'), "messages": ("null", "[]", '"hi"', "{}"),
    # What other servers act on, and what nobody knows.
    "modelId": ('"x"',), "path": ('"/etc/passwd"',), "file": ('"/etc/passwd"',), "url": ('"http://127.0.0.1:5001"',), "lora": ('"/tmp/x"',),
    "keep_alive": ("-1",), "options": ('{"num_ctx": 1}',), "grammar_file": ('"/etc/passwd"',), "__proto__": ("{}",), "": ("1",),
}  # fmt: skip


ROUTES: dict[str, dict[str, Any]] = {CHAT: {"messages": HELLO}}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("route", ROUTES)
def test_r25_a_field_that_cannot_be_is_refused_by_name(server: Server, route: str, field: str) -> None:
    for value in FIELDS[field]:
        base = {name: json.dumps(given) for name, given in {"model": server.code, **ROUTES[route]}.items()} | {field: value}
        body = "{" + ",".join(f"{json.dumps(name)}:{text}" for name, text in base.items()) + "}"
        refused(server.post(route, body.encode()), 400, field)


@pytest.mark.parametrize("content", ['""', '" \\n\\t"', "null", "[]", '[{"type": "text", "text": ""}]'])
def test_r25_an_empty_prompt_is_refused(server: Server, content: str) -> None:
    status, found = server.post(CHAT, f'{{"model":"{server.code}","messages":[{{"role":"user","content":{content}}}]}}'.encode())
    assert (status, found["error"]["type"]) == (400, "invalid_request_error")
    assert found["error"]["param"].startswith("messages")


JSONS = {
    "nothing": b"", "array": b"[]", "number": b"1", "half": b'{"model":', "two": b"{}{}", "text after": b"{} x", "NUL": b"{}\0",
    "NaN": b'{"max_tokens":NaN}', "Infinity": b'{"temperature":-Infinity}', "long number": b'{"seed":' + b"9" * 10_000 + b"}",
    "duplicate": b'{"model":"a","model":"b"}', "duplicate, escaped": b'{"model":"a","m\\u006fdel":"b"}',
    "duplicate within": b'{"messages":[{"role":"user","role":"system"}]}', "surrogate": b'{"model":"\\ud800"}',
    "surrogate in a name": b'{"\\udfff":1}', "raw surrogate": b'{"model":"\xed\xa0\x80"}', "not UTF-8": b'{"model":"\xff"}',
    "overlong": b'{"model":"\xc0\xaf"}', "BOM": b"\xef\xbb\xbf{}", "UTF-16": '{"model":"a"}'.encode("utf-16"),
    "control": b'{"model":"\n"}', "comment": b"{/**/}", "single quotes": b"{'model':'a'}", "comma": b'{"model":"a",}',
    "deep": b'{"a":' * 500 + b"1" + b"}" * 500, "deep and half": b'{"a":' * 100_000,
    "very deep": b'{"a":' + b"[" * 99_999 + b"]" * 99_999 + b"}",
}  # fmt: skip


@pytest.mark.parametrize("kind", JSONS)
def test_r26_json_that_two_parsers_could_read_differently(server: Server, kind: str) -> None:
    status, found = server.post(CHAT, JSONS[kind])
    assert (status, found["error"]["type"]) == (400, "invalid_request_error")
    if kind != "nothing":  # which is an object without fields
        assert found["error"]["message"].startswith("request: ")
    status, found = server.post("/api/trust", JSONS[kind])
    if len(JSONS[kind]) > 64 * 1024:
        assert status == 413
    else:
        assert (status, found["error"]["code"]) == (400, 2)


# -- HTTP that two servers could read differently -------------------------------------------------------------------------

OWN = "Content-Length: 2"
SMUGGLED = {
    "two lengths": [OWN, "Content-Length: 3"], "same length twice": [OWN, OWN], "a list of lengths": ["Content-Length: 2, 2"],
    "signed length": ["Content-Length: +2"], "negative length": ["Content-Length: -1"], "hexadecimal length": ["Content-Length: 0x2"],
    "length of 2^70": [f"Content-Length: {2**70}"], "length and chunks": [OWN, "Transfer-Encoding: chunked"],
    "chunks twice": ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], "chunks of another name": ["Transfer-Encoding: xchunked"],
    "chunks, then not": ["Transfer-Encoding: chunked, identity"], "space before the colon": ["Transfer-Encoding : chunked"],
    "folded line": ["X: a", " Transfer-Encoding: chunked"], "NUL": ["X: a\0b"], "bare CR": ["X: a\rTransfer-Encoding: chunked"],
    "second Host": ["Host: evil.example"],
}  # fmt: skip


@pytest.mark.parametrize("kind", SMUGGLED)
def test_a_request_that_two_servers_could_read_differently(server: Server, kind: str) -> None:
    status, found = server.raw(server.head("/api/trust", *SMUGGLED[kind]) + b"2\r\n{}\r\n0\r\n\r\n")
    assert (status, found["error"]["code"]) == (400, 2)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET http://evil.example/api/status HTTP/1.1", 421), ("CONNECT evil.example:80 HTTP/1.1", 421),
        ("GET //evil.example/ HTTP/1.1", 404), ("OPTIONS * HTTP/1.1", 404), ("TRACE /api/status HTTP/1.1", 405),
        ("NONSENSE /api/status HTTP/1.1", 400), ("GET /api/status HTTP/9.9", 400), ("GET /healthz/../api/v0/id HTTP/1.1", 404),
        ("GET /%2e%2e/etc/passwd HTTP/1.1", 404), ("PRI * HTTP/2.0", 400), ("\x16\x03\x01\x02", 400),
    ],
)  # fmt: skip
def test_a_request_for_somebody_else(server: Server, line: str, status: int) -> None:
    _, _, rest = server.head("/").partition(b"\r\n")
    found, body = server.raw(line.encode() + b"\r\n" + rest)
    assert (found, "error" in body) == (status, True)


def test_a_thousand_requests_at_once_on_one_connection_are_all_answered(server: Server) -> None:
    with server.connect() as connection:
        one = server.head("/healthz", method="GET").replace(b"\r\n\r\n", b"\r\nX: " + b"x" * 1000 + b"\r\n\r\n")
        connection.sendall(one * 1000)
        found = b""
        while found.count(b'{"status": "ok"}') < 1000:
            data = connection.recv(65536)
            assert data, found[-300:]
            found += data


# -- kill -9 --------------------------------------------------------------------------------------------------------------


def test_a_worker_killed_in_the_middle_is_an_error_for_the_official_client(server: Server) -> None:
    """Of the two that wait for an answer, one gets it as it comes and one whole."""
    (worker,) = workers(server.node)
    asked: Any = completion(server.code, stream=False)
    finishes = []
    with official(server) as ai, ThreadPoolExecutor() as pool:
        whole = pool.submit(lambda: ai.chat.completions.create(**asked))
        chunks = ai.chat.completions.create(**{**asked, "stream": True})
        assert next(chunks).choices[0].finish_reason is None
        until(lambda: free_slots(server.node) == 0, "both answers")
        worker.kill()
        with pytest.raises(openai.APIError, match="SIGKILL"):
            for chunk in chunks:
                finishes += [choice.finish_reason for choice in chunk.choices]
        with pytest.raises(openai.InternalServerError, match="SIGKILL"):
            whole.result(60)
    assert set(finishes) <= {None}
    until(lambda: ended(worker), "the end of the worker")
    server.serve()
    server.answers()
