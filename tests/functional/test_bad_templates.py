"""R13 and R14: chat templates that want out of their sandbox, or never end, on a real node beside a model that is served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional.asking import workers
from tests.functional.bad_http import CHAT, Server, serving
from tests.unit.gguf_files import METADATA, STRING, Entry, header, padded, with_template

RUN = "system('touch CANARY')"
ESCAPES = {
    "subclasses": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == 'catch_warnings' %}"
    "{{ c()._module.__builtins__['__import__']('os').RUN }}{% endif %}{% endfor %}",
    "self": "{{ self.__init__.__globals__.__builtins__.__import__('os').RUN }}",
    "cycler": "{{ cycler.__init__.__globals__.os.RUN }}",
    "lipsum": "{{ lipsum.__globals__['os'].RUN }}",
    "helper": "{{ raise_exception.__globals__['__builtins__']['__import__']('os').RUN }}",
    "attr": "{{ (messages | attr('__class__') | attr('__base__') | attr('__subclasses__'))()[0].RUN }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "generator": "{{ (range(1) | map('string')).gi_frame.f_globals['os'].RUN }}",
}
BOMBS = {
    "string": "{{ 'a' * 2**31 }}",
    "ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one range": "{% for a in range(2**40) %}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
    "number": "{{ 9 ** (9 ** 9) }}",
    "prompt": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "doubled": "{% set l = namespace(x='a') %}{% for i in range(64) %}{% set l.x = l.x + l.x %}{% endfor %}",
}


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory, kubo_binary: Path, model_file: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("templates"), kubo_binary, model_file) as server:
        yield server


@pytest.fixture
def server(one_server: Server) -> Server:
    one_server.serve()
    return one_server


def hostile(path: Path, template: str) -> Path:
    """A file with `template`, which is looked at before llama.cpp sees anything of the file."""
    metadata: list[Entry] = [(*entry[:2], template) if entry[0] == "tokenizer.chat_template" else entry for entry in METADATA]
    assert ("tokenizer.chat_template", STRING, template) in metadata
    path.write_bytes(padded(header(metadata, [("w", (64,), 24, 0)])) + bytes(64))
    return path


def is_not_served(server: Server, path: Path) -> str:
    """The error of serving `path`. Nothing is left of it, and the other model goes on."""
    code = server.node.run("publish", str(path))["code"]
    try:
        failed = server.node.fails("serve", code)
    finally:
        server.node.run("rm", code)
    assert failed.code == 7
    assert len(workers(server.node)) == 1
    server.answers()
    return failed.error


@pytest.mark.parametrize("kind", ESCAPES)
def test_r13_a_model_whose_template_wants_out_is_not_served(server: Server, tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    error = is_not_served(server, hostile(tmp_path / "escape.gguf", ESCAPES[kind].replace("RUN", RUN).replace("CANARY", str(canary))))
    assert "chat template cannot be used" in error
    assert not canary.exists()


@pytest.mark.parametrize("kind", BOMBS)
def test_r14_a_model_with_a_bomb_for_a_template_is_not_served(server: Server, tmp_path: Path, kind: str) -> None:
    assert "template" in is_not_served(server, hostile(tmp_path / "bomb.gguf", BOMBS[kind]))


def test_r13_r14_a_template_that_waits_for_its_word_costs_an_answer(server: Server, tmp_path: Path, model_file: Path) -> None:
    """It is harmless when it is loaded. `w` keeps the bombs from being worked out, and so found, before that."""
    canary = tmp_path / "canary"
    words = {
        "escape": ESCAPES["cycler"].replace("RUN", RUN).replace("CANARY", str(canary)),
        "string": "{{ 'a' * 2**(25 + w | length) }}",
        "ranges": BOMBS["ranges"],
        "macros": BOMBS["macro"],
        "number": "{{ 9 ** (9 ** (3 + w | length)) }}",
    }
    cases = "".join(f"{{% elif w == '{word}' %}}{what}" for word, what in words.items())
    template = "{% set w = messages[-1].content %}{% if w == 'Hello!' %}Hi{{ w }}" + cases + "{% endif %}"
    path = with_template(model_file, tmp_path / "patient.gguf", template)
    patient = Server(server.node, server.node.run("publish", str(path))["code"])
    try:
        for word in words:
            server.node.run("serve", patient.code, "--slots", "1", "--context", "512")  # a bomb may have cost the worker
            patient.answers()
            body = {"model": patient.code, "messages": [{"role": "user", "content": word}]}
            status, answer = server.post(CHAT, json.dumps(body).encode())
            assert status in (400, 500, 503), (word, answer)
            assert answer["error"]["message"], word
            server.answers()
    finally:
        server.node.run("rm", patient.code)
    assert not canary.exists()
