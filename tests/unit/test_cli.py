"""How a line is understood; the commands as processes are in tests/functional/test_cli.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarmctl import cli, launch
from swarmctl.client import Client
from swarmctl.commands.chat import split
from swarmctl.commands.models import _absolute
from swarmctl.failure import Failure
from swarmctl.progress import describe


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("words", "prompt", "code"),
    [
        ((), None, None),
        (("hi",), "hi", None),
        (("-",), "-", None),
        (("#abc2def",), None, "#abc2def"),
        (("hi", "#abc2def"), "hi", "#abc2def"),
        (("#ABC2def", "hi"), "hi", "#ABC2def"),
        (("hi", "abc2def"), "hi", "abc2def"),
        (("hi", "tiny"), "hi", "tiny"),
        (("#hashtag!",), "#hashtag!", None),
        (("what is #1?",), "what is #1?", None),
    ],
)
def test_prompt_and_code(words: tuple[str, ...], prompt: str | None, code: str | None) -> None:
    assert split(words) == (prompt, code)


@pytest.mark.parametrize("words", [("a", "b", "c"), ("#abc2def", "#abc2deg")])
def test_what_is_no_prompt_and_code(words: tuple[str, ...]) -> None:
    with pytest.raises(Failure) as failed:
        split(words)
    assert failed.value.code == 2


def test_only_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _absolute("./m.gguf") == str(tmp_path / "m.gguf")
    for ref in ("#abc2def", "ipfs://x", "magnet:?xt=1", "/abs/m.gguf", "name", "hf:a/b"):
        assert _absolute(ref) == ref


@pytest.mark.parametrize(
    "words", [("nonsense",), ("pull",), ("ls", "--nonsense"), ("ask", "x", "--temperature", "9"), ("trust", "nonsense")]
)
def test_usage_errors_are_one_line_and_an_object(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words, "--json") == 2
    said = capsys.readouterr()
    assert (said.err.count("\n"), said.err.startswith("error: swarmctl")) == (1, True)
    assert set(json.loads(said.out)["error"]) == {"code", "message", "hint"}
    assert run(*words) == 2
    assert capsys.readouterr().out == ""


def test_json_behind_two_dashes_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pull", "--", "a", "--json") == 2
    assert capsys.readouterr().out == ""


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in cli.MODULE_OF)


def test_a_bug_is_told_without_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(home: Path) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(launch, "find", broken)
    assert run("status", "--home", str(tmp_path)) == 1
    said = capsys.readouterr()
    assert said.err == f"error: swarmctl: a bug; see {tmp_path}/logs/cli.log\n"
    assert "RuntimeError: secret" in (tmp_path / "logs" / "cli.log").read_text()


@pytest.mark.parametrize("url", ["", "127.0.0.1:8787", "ftp://127.0.0.1", "http://"])
def test_what_is_no_url_of_a_daemon(url: str) -> None:
    with pytest.raises(Failure) as failed:
        Client(url, "t")
    assert failed.value.code == 2


@pytest.mark.parametrize(
    ("error", "code"), [({"code": 5, "message": "m"}, 5), ({"code": 99, "message": "m"}, 1), ({}, 1), ("x", 1), (None, 1)]
)
def test_errors_of_a_strange_daemon(error: object, code: int) -> None:
    assert Failure.from_json(error).code == code


def test_a_line_of_progress() -> None:
    transfer = {
        "name": "m\x1b", "ref": "r", "state": "fetching", "size": 2048, "received": 1024, "rate": 512, "peers": 2,
        "sources": {"ipfs": 1024, "disk": 0},
    }  # fmt: skip
    assert describe(transfer) == "m\\x1b: fetching, 1.0 KiB of 2.0 KiB, 512 B/s, 2 peers (1.0 KiB by ipfs)"
    assert describe({**transfer, "size": None}) == "m\\x1b: fetching"
