"""`swarmctl chat` as a process: through pipes and on a terminal, against the API of api_server.py and on a real node."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.functional.api_server import CID2, OTHER
from tests.functional.asking import ENDLESS, call, free_slots
from tests.functional.nodes import SWARMCTL, Node, nodes, until
from tests.functional.terminal import CTRL_C, CTRL_D, ENTER, UP, Terminal, terminal
from tests.functional.test_cli import DEADLINE_S, child_environment, run, standing_in, start

WHO = f"tiny (#abc2def) on node {OTHER[8:16]}\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with standing_in(tmp_path_factory.mktemp("chat") / "home") as home:
        yield home


def chat(home: Path, *lines: str, words: tuple[str, ...] = ()) -> tuple[int, str, str]:
    return run(home, "chat", *words, text="".join(f"{line}\n" for line in lines))


# -- through a pipe -----------------------------------------------------------------------------------------------------


def test_each_line_is_a_turn_that_carries_what_was_said(home: Path) -> None:
    code, stdout, stderr = chat(home, "one", "", "two \\", "lines", "//three", "history", words=("--system", "be brief"))
    history = "system:be brief|user:one|assistant:one |user:two \nlines|assistant:two \nlines |user:/three|assistant:/three |user:history "
    assert (code, stdout) == (0, f"one \ntwo \nlines \n/three \n{history}\n")
    assert stderr == WHO  # once: nobody else answered


def test_orders_in_a_pipe(home: Path) -> None:
    lines = ("one", "/clear", "/system be brief", "two", "/retry", "/system", "/system -", "history", "/exit", "never")
    code, stdout, stderr = chat(home, *lines)
    assert (code, stdout) == (0, "one \ntwo \ntwo \nuser:two|assistant:two |user:history \n")
    assert "\nbe brief\n" in stderr
    assert chat(home, "/help")[2].startswith("/help ")


def test_the_model_can_be_listed_and_chosen(home: Path) -> None:
    code, stdout, stderr = chat(home, "/model", f"/model {CID2}", "/model", "one")
    assert (code, stdout) == (0, "one \n")
    before, chosen = (line for line in stderr.splitlines() if "evil" in line)
    assert (before[0], chosen[0]) == (" ", "*")
    assert "evil\\x1b[2J\\u202egguf" in chosen
    assert [line.split()[-2:] for line in stderr.splitlines() if " tiny " in line] == [["yes", "-"]] * 2  # loaded on first use
    code, stdout, stderr = chat(home, "one", words=("nobody",))
    assert (code, stdout, stderr.startswith("error: nobody: no node that is known has it; ")) == (3, "", True)
    code, stdout, stderr = chat(home, "one", words=("tiny",))
    assert (code, stdout, stderr) == (0, "one \n", WHO)


@pytest.mark.parametrize(
    ("line", "code"),
    [("/x", 2), ("/retry", 2), ("/save", 2), ("/model nobody", 3), ("busy", 5), ("fail at once", 2), ("fail later", 7), ("cut off", 5)],
)
def test_the_first_error_ends_it(home: Path, line: str, code: int) -> None:
    ended, stdout, stderr = chat(home, line, "never")
    assert (ended, "never" in stdout) == (code, False)
    assert [said.startswith("error: ") for said in stderr.splitlines() if said + "\n" != WHO] == [True]
    ended, stdout, _ = chat(home, line, "never", words=("--json",))
    assert (ended, json.loads(stdout)["error"]["code"]) == (code, code)


def test_as_json(home: Path) -> None:
    code, stdout, stderr = chat(home, "one", "two", "/help", words=("--json",))
    usage = {"prompt_tokens": 6, "completion_tokens": 10, "total_tokens": 16}
    messages = [{"role": role, "content": text} for role, text in
                (("user", "one"), ("assistant", "one "), ("user", "two"), ("assistant", "two "))]  # fmt: skip
    assert (code, json.loads(stdout)) == (0, {"model": "abc2def", "answered_by": OTHER, "messages": messages, "usage": usage})
    assert [json.loads(line)["text"] for line in stderr.splitlines() if "text" in json.loads(line)] == ["one ", "two "]
    code, stdout, _ = chat(home, words=("--json",))
    assert (code, json.loads(stdout)) == (0, {"model": None, "answered_by": None, "messages": [], "usage": {}})


def test_r16_no_escape_sequence_gets_through(home: Path) -> None:
    code, stdout, stderr = chat(home, "escape")
    assert (code, stdout) == (0, "a\\x1b]52;c;aGk=\\x07\nb\\u202ec\n")
    assert "\x1b" not in stderr


def test_what_is_no_text(home: Path) -> None:
    process = start(home, "chat", stdin=subprocess.PIPE, text=False, more={"PYTHONIOENCODING": "utf-8:strict"})
    stdout, stderr = process.communicate(b"\xff\n", timeout=DEADLINE_S)
    assert (process.returncode, stdout, stderr) == (2, b"", b"error: chat: standard input is not text; send UTF-8\n")


def test_ctrl_c_ends_a_pipe(home: Path) -> None:
    process = start(home, "chat", stdin=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("for ever\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, stderr) == (130, WHO + "error: swarmctl: interrupted\n")


# -- saved and resumed --------------------------------------------------------------------------------------------------


def test_saved_and_resumed(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    code, _, stderr = chat(home, "one", f"/save {path}", "\u6a21\u578b", "/save", words=("--system", "be brief"))
    assert (code, f"4 messages are in {path}\n" in stderr) == (0, True)
    saved = json.loads(path.read_text())
    assert (saved["model"], [message["content"] for message in saved["messages"]][:2]) == ("abc2def", ["be brief", "one"])
    assert saved["messages"][-1] == {"role": "assistant", "content": "\u6a21\u578b "}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    saved["model"] = None
    path.write_text(json.dumps(saved))
    code, stdout, _ = chat(home, "/retry", "history", "/save", words=("--resume", str(path)))
    history = "system:be brief|user:one|assistant:one |user:\u6a21\u578b|assistant:\u6a21\u578b |user:history "
    assert (code, stdout) == (0, f"\u6a21\u578b \n{history}\n")
    assert len(json.loads(path.read_text())["messages"]) == 7


def test_a_file_that_exists_is_not_overwritten(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("mine")
    code, _, stderr = chat(home, "one", f"/save {path}")
    assert (code, f"error: {path}: exists already; " in stderr, path.read_text()) == (2, True, "mine")
    assert chat(home, "one", f"/save {tmp_path}/no/such/folder")[0] == 7


@pytest.mark.parametrize(("text", "code"), [("not JSON", 2), ("[" * 100_000, 2), ("{}", 2), ('{"messages": [1]}', 2), (None, 3)])
def test_what_cannot_be_resumed(home: Path, tmp_path: Path, text: str | None, code: int) -> None:
    path = tmp_path / "talk.json"
    if text is not None:
        path.write_text(text)
    ended, stdout, stderr = chat(home, "one", words=("--resume", str(path)))
    assert (ended, stdout, stderr.startswith("error: "), stderr.count("\n")) == (code, "", True, 1)


# -- on a terminal ------------------------------------------------------------------------------------------------------


@contextmanager
def typing(home: Path, *words: str) -> Iterator[Terminal]:
    """A conversation whose prompt has come; it has to end well."""
    with terminal([sys.executable, "-m", "swarmctl", "chat", *words], child_environment(SWARMCTL_HOME=str(home))) as person:
        person.expect("> ")
        yield person
        person.type("/exit" + ENTER)
        assert person.ended() == 0
        assert "Traceback" not in person.shown


def say(person: Terminal, text: str, answer: str) -> str:
    """What came up to the next prompt."""
    person.type(text + ENTER)
    return person.expect(answer) + person.expect("> ")


def test_a_person_can_stop_an_answer_and_goes_on(home: Path) -> None:
    (home / "answer-closed").unlink(missing_ok=True)
    with typing(home) as person:
        person.type("for ever" + ENTER)
        person.expect("more more")
        person.type(CTRL_C)
        until((home / "answer-closed").exists, "the end of the answer")
        person.expect("> ")
        assert "more|user:history" in say(person, "history", "user:for ever|assistant:more more").replace(" ", "").replace("\r\n", "")
        assert person.shown.count("on node") == 1


def test_a_person_sees_errors_and_goes_on(home: Path) -> None:
    with typing(home) as person:
        for line, error in (("busy", "error: "), ("fail later", "error: "), ("cut off", "error: "), ("/nonsense", "error: /nonsense: ")):
            say(person, line, error)
        assert "user:history" in say(person, "history", "user:")  # nothing failed is in it
        say(person, "fail at once", "it does not fit")
        say(person, "/retry", "it does not fit")
        say(person, UP, "it does not fit")  # readline's history: /retry once more


def test_ctrl_c_at_the_prompt_drops_the_line(home: Path) -> None:
    with typing(home) as person:
        person.type("never said")
        person.expect("never said")
        person.interrupt()
        person.expect("> ")
        person.type('"""never' + ENTER)
        person.expect("... ")
        person.interrupt()
        person.expect("> ")
        person.interrupt()
        assert "leaves" in person.expect("> ")
        assert "never" not in say(person, "history", "user:history ")


def test_several_lines_that_are_pasted_are_one_turn(home: Path) -> None:
    with typing(home) as person:
        say(person, "\x1b[200~one\rtwo\x1b[201~", "two")
        say(person, "history", "user:one\r\ntwo|assistant:one\r\ntwo |user:history")


def test_r16_on_a_terminal(home: Path) -> None:
    with typing(home) as person:
        shown = say(person, "escape", "\\u202ec")
        assert "a\\x1b]52;c;aGk=\\x07\r\nb\\u202ec" in shown
        assert "\x1b]" not in person.shown and "\x07" not in person.shown and "\u202e" not in person.shown
        assert "\\x1b[2J" in say(person, "/model", "evil")
        assert "\x1b[2J" not in person.shown


def test_ctrl_d_leaves(home: Path) -> None:
    with terminal([sys.executable, "-m", "swarmctl", "chat"], child_environment(SWARMCTL_HOME=str(home))) as person:
        person.expect("> ")
        person.type('"""open' + ENTER)
        person.expect("... ")
        person.type(CTRL_D)
        person.expect("> ")
        person.type(CTRL_D)
        assert person.ended() == 0


# -- a real node --------------------------------------------------------------------------------------------------------


CONTEXT = 512  # tokens


def serve(node: Node, code: str) -> None:
    call(node, "POST", "/api/ai/serve", {"modelId": code, "slots": 1, "contextSize": CONTEXT})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, kubo_binary: Path, model_file: Path) -> Iterator[tuple[Node, str]]:
    with contextmanager(nodes)(tmp_path_factory.mktemp("real"), kubo_binary) as node:
        a = node("a").up("--ipfs-enabled", "false")
        code = a.run("publish", str(model_file))["code"]
        serve(a, code)
        yield a, code


def real(node: Node, *lines: str) -> Any:
    talk = node.start("chat", "--json", "--temperature", "0", "--max-tokens", "8", stdin=subprocess.PIPE)
    stdout, stderr = talk.communicate("".join(f"{line}\n" for line in lines), timeout=60)
    assert talk.returncode == 0, stderr
    return json.loads(stdout)


def test_a_real_model_is_told_the_whole_conversation(served: tuple[Node, str]) -> None:
    node, code = served
    alone = real(node, "Thank you.")
    both = real(node, "Name three colours.", "Thank you.")
    assert both["model"] == code and both["answered_by"] == node.status["node"]
    assert [message["role"] for message in both["messages"]] == ["user", "assistant"] * 2
    assert all(message["content"].strip() for message in both["messages"])
    assert both["usage"]["completion_tokens"] <= 16
    first = real(node, "Name three colours.")
    # The second question was sent with all that came before it.
    assert both["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"] + first["usage"]["prompt_tokens"]


def test_a_person_and_a_real_model(served: tuple[Node, str], tmp_path: Path) -> None:
    node, code = served
    path = tmp_path / "talk.json"
    words = [*SWARMCTL, "chat", "#" + code, "--temperature", "0"]
    with terminal(words, node.environment) as person:
        person.expect("> ")
        person.type(ENDLESS + ENTER)
        person.expect(f"(#{code}) on node")
        until(lambda: free_slots(node) == 0, "the answer")
        person.expect(" the ")
        person.type(CTRL_C)
        person.expect("> ")
        until(lambda: free_slots(node) == 1, "the end of the answer")
        say(person, f"/save {path}", "2 messages are in")
        stopped = json.loads(path.read_text())["messages"]
        assert stopped[1]["content"].strip()
        # Too long for the context: an error before any work, and the question is gone from the conversation.
        say(person, "word " * CONTEXT, "error: the conversation: ")
        assert "/clear" in person.shown
        say(person, "/save", "2 messages are in")
        assert json.loads(path.read_text())["messages"] == stopped
        # A daemon that comes back, at another address, is told everything again.
        node.stop()
        node.up("--ipfs-enabled", "false")
        serve(node, code)
        say(person, "Thank you.", "\n")
        say(person, "/save", "4 messages are in")
        assert json.loads(path.read_text())["messages"][:2] == stopped
        person.type("/clear" + ENTER + CTRL_D)
        assert person.ended() == 0
