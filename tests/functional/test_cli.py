"""The command line as a process, against the API of tests/functional/api_server.py where a real daemon would be."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from swarmctl import launch
from tests.functional.api_server import CID, NODE, OTHER, RELAY, TOKEN

ROOT = Path(__file__).parent.parent.parent
SERVER = str(Path(__file__).with_name("api_server.py"))
DEADLINE_S = 60


def until(probe: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + DEADLINE_S
    while not (found := probe()):
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.02)
    return found


def child_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **more}


def start(home: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    environment = child_environment(SWARMCTL_HOME=str(home), **settings.pop("more", {}))
    return subprocess.Popen([sys.executable, "-m", "swarmctl", *words], env=environment, cwd=ROOT, **settings)


def run(home: Path, *words: str, text: str | None = None, **options: Any) -> tuple[int, str, str]:
    process = start(home, *words, **({"stdin": subprocess.PIPE} if text is not None else {}), **options)
    stdout, stderr = process.communicate(text, timeout=DEADLINE_S)
    assert "Traceback" not in stderr
    return process.returncode, stdout, stderr


def document(home: Path, *words: str) -> Any:
    code, stdout, stderr = run(home, *words, "--json")
    assert code == 0, stderr
    return json.loads(stdout)


@contextmanager
def standing_in(home: Path) -> Iterator[Path]:
    """A data folder with the API of api_server.py in the place of its daemon."""
    server = subprocess.Popen([sys.executable, SERVER, "--home", str(home)], env=child_environment(), stdin=subprocess.DEVNULL)
    try:
        until((home / "daemon.json").exists, "the API")
        yield home
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder of a daemon that runs."""
    with standing_in(tmp_path_factory.mktemp("node") / "home") as home:
        yield home


# -- listing and changing -----------------------------------------------------------------------------------------------


def test_the_fields_that_others_script_against(node: Path) -> None:
    (model,) = document(node, "ls")
    assert (model["name"], model["cid"], model["local"], len(model["code"])) == ("tiny", CID, True, 7)
    assert {entry["name"] for entry in document(node, "models")} >= {"tiny"}
    assert [(peer["node"], peer["relays"], peer["relay"]) for peer in document(node, "peers")] == [
        (OTHER, [RELAY], False),
        (RELAY, [], True),
    ]
    assert {"who", "learns", "because", "change"} == set(document(node, "privacy")[0])
    assert document(node, "status")["node"] == NODE
    assert document(node, "key") == {"node": NODE}
    assert document(node, "join", "swarmctl://" + "cd" * 32)["node"] == OTHER
    assert document(node, "verify", "tiny")["verified"] is True
    assert [model["state"] for model in document(node, "fsck")] == ["ready"]
    served = document(node, "serve", "tiny", "--context", "512", "--slots", "2")
    assert (served["serving"], served["context"], served["slots"]) == (True, 512, 2)
    assert document(node, "stop", "tiny")["serving"] is False
    assert document(node, "trust", "add", NODE, "--name", "me") == {"key": NODE, "state": "trusted", "name": "me"}
    assert document(node, "trust", "block", NODE)["state"] == "blocked"
    assert len(document(node, "trust", "list")) == 1
    assert document(node, "trust", "remove", NODE)["key"] == NODE


@pytest.mark.parametrize("words", [("--json", "ls"), ("ls", "--json"), ("--json", "ls", "--json")])
def test_json_may_stand_anywhere(node: Path, words: tuple[str, ...]) -> None:
    code, stdout, _ = run(node, *words)
    assert (code, json.loads(stdout)[0]["name"]) == (0, "tiny")


def test_home_as_a_flag_wins(node: Path, tmp_path: Path) -> None:
    for words in (("--home", str(node), "ls"), ("ls", "--home", str(node))):
        assert run(tmp_path / "nowhere", *words)[0] == 0


def test_a_daemon_elsewhere(node: Path, tmp_path: Path) -> None:
    url = json.loads((node / "daemon.json").read_text())["url"]
    code, stdout, _ = run(tmp_path, "ls", "--json", more={"SWARMCTL_API": url, "SWARMCTL_TOKEN": TOKEN})
    assert (code, len(json.loads(stdout))) == (0, 1)
    code, stdout, stderr = run(tmp_path, "ls", "--json", more={"SWARMCTL_API": url, "SWARMCTL_TOKEN": "wrong"})
    assert (code, json.loads(stdout)["error"]["code"], stderr.startswith("error: token: ")) == (2, 2, True)
    code, _, stderr = run(tmp_path, "ls", more={"SWARMCTL_API": "http://127.0.0.1:1", "SWARMCTL_TOKEN": TOKEN})
    assert (code, stderr.count("\n")) == (7, 1)


@pytest.mark.parametrize("word", ["up", "down"])
def test_a_daemon_elsewhere_is_not_ours_to_start_or_stop(node: Path, tmp_path: Path, word: str) -> None:
    url = json.loads((node / "daemon.json").read_text())["url"]
    code, stdout, stderr = run(tmp_path / "none", word, more={"SWARMCTL_API": url, "SWARMCTL_TOKEN": TOKEN})
    assert (code, stdout, stderr.startswith("error: SWARMCTL_API: ")) == (2, "", True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("words", [("trust",), ("trust", "--json"), ("--json",)])
def test_a_group_alone_is_one_line(node: Path, words: tuple[str, ...]) -> None:
    code, stdout, stderr = run(node, *words)
    assert (code, stderr.count("\n"), "Missing command" in stderr) == (2, 1, True)
    assert bool(stdout) == ("--json" in words)


def test_a_daemon_that_does_not_start_says_why_in_json(tmp_path: Path) -> None:
    code, stdout, stderr = run(tmp_path / "home", "daemon", "--no-such-setting", "1", "--json")
    assert (code, json.loads(stdout)["error"]["code"]) == (2, 2)
    assert stderr == "error: --no-such-setting: no such setting; docs/settings.md lists them\n"


def test_for_people_names_are_escaped(node: Path) -> None:
    code, stdout, stderr = run(node, "models")
    assert (code, stderr) == (0, "")
    assert "evil\\x1b[2J\\u202egguf" in stdout
    assert stdout.splitlines()[0].split() == ["code", "name", "size", "nodes", "serving", "seeders/peers", "local"]
    assert "\nipfs        off\n" in run(node, "status")[1]
    assert "\nnetwork     loopback\n" in run(node, "status")[1]
    peer, relay = run(node, "peers")[1].splitlines()[1:]
    assert peer.split()[3:6] == ["1a2b3c4d", "-", "1a2b3c4d"]
    assert relay.split()[3:6] == ["-", "yes", "-"]
    assert "\n  learns   the prompt and the answer\n" in run(node, "privacy")[1]
    for words in (("ls",), ("fsck",), ("verify", "tiny"), ("trust", "list")):
        code, stdout, _ = run(node, *words)
        assert code == 0
        assert stdout.strip()


def test_env_is_what_a_shell_can_eval(node: Path) -> None:
    _, stdout, _ = run(node, "env")
    shown = subprocess.run(["sh", "-c", f'{stdout}\necho "$OPENAI_BASE_URL $OPENAI_API_KEY"'], capture_output=True, text=True, check=True)
    url, key = shown.stdout.split()
    assert (url.endswith("/v1"), key) == (True, TOKEN)
    assert document(node, "env") == {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key}


def test_errors_of_the_daemon_keep_their_code(node: Path) -> None:
    code, stdout, stderr = run(node, "verify", "nobody", "--json")
    assert (code, json.loads(stdout)) == (3, {"error": {"code": 3, "message": "nobody: no such model here", "hint": "swarmctl ls"}})
    assert stderr == "error: nobody: no such model here; swarmctl ls\n"


# -- transfers ----------------------------------------------------------------------------------------------------------


def test_publish_and_pull(node: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run(node, "publish", "tiny.gguf", "--name", "tiny", "--json")
    assert (code, json.loads(stdout)["cid"]) == (0, CID)
    assert [json.loads(line)["state"] for line in stderr.splitlines()][-1] == "done"
    pulled = document(node, "pull", "#abc2def")
    assert (pulled["cid"], pulled["received"], pulled["sources"]["bittorrent"]) == (CID, 100, 50)
    code, stdout, stderr = run(node, "pull", "note")
    assert (code, stderr.count("note: it is unsigned\\x1b[2J\n")) == (0, 1)
    assert "50 B by ipfs, 50 B by bittorrent" in stdout
    code, stdout, _ = run(node, "pull", "broken", "--json")
    assert (code, json.loads(stdout)["error"]["message"]) == (2, "broken: it is not a GGUF")


def test_a_path_is_made_absolute_for_the_daemon(node: Path) -> None:
    _, _, stderr = run(node, "pull", "./x/tiny.gguf", "--json")
    assert json.loads(stderr.splitlines()[0])["ref"] == str(ROOT / "x" / "tiny.gguf")


def test_ctrl_c_cancels_a_pull(node: Path) -> None:
    (node / "cancelled").unlink(missing_ok=True)
    pull = start(node, "pull", "slow", "--json")
    assert pull.stderr is not None
    transfer = json.loads(pull.stderr.readline())["id"]
    pull.send_signal(signal.SIGINT)
    stdout, stderr = pull.communicate(timeout=DEADLINE_S)
    assert (pull.returncode, json.loads(stdout)["error"]["code"]) == (130, 130)
    assert "goes on where it was" in stderr.splitlines()[-1]
    assert (node / "cancelled").read_text() == transfer


# -- asking -------------------------------------------------------------------------------------------------------------


def test_the_answer_alone_is_on_stdout(node: Path) -> None:
    code, stdout, stderr = run(node, "ask", "one two", "abc2def")
    assert (code, stdout) == (0, "one two \n")
    assert stderr == f"tiny (#abc2def) on node {OTHER[8:16]}\n"


@pytest.mark.parametrize(
    ("words", "text"), [((), "from stdin"), (("-",), "from stdin"), (("#abc2def",), "from stdin"), (("-", "abc2def"), "from stdin")]
)
def test_a_prompt_from_standard_input(node: Path, words: tuple[str, ...], text: str) -> None:
    assert run(node, "ask", *words, text=text)[:2] == (0, "from stdin \n")


def test_a_prompt_that_is_given_leaves_standard_input_alone(node: Path) -> None:
    assert run(node, "ask", "given", text="not this")[:2] == (0, "given \n")


def test_nothing_to_ask(node: Path) -> None:
    for words, text in (((), ""), (("a", "b", "c"), None), (("#abc2def", "#abc2deg"), None)):
        code, stdout, stderr = run(node, "ask", *words, text=text)
        assert (code, stdout, stderr.startswith("error: ask: ")) == (2, "", True)


def test_an_answer_as_json(node: Path) -> None:
    answer = document(node, "ask", "one two three")
    assert answer["via"] is None
    assert set(answer) == {"answered_by", "via", "code", "name", "text", "usage", "ttft_ms", "tokens_per_second", "finish_reason"}
    assert (answer["text"], answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("one two three ", "stop", 5)


def test_a_relay_is_named_and_told(node: Path) -> None:
    code, stdout, stderr = run(node, "ask", "one two", "--via", "1a2b3c4d")
    assert (code, stdout) == (0, "one two \n")
    assert stderr == f"tiny (#abc2def) on node {OTHER[8:16]}, through node 1a2b3c4d\n"
    assert document(node, "ask", "one", "--via", RELAY)["via"] == RELAY
    assert document(node, "ask", "one", "--via", "never")["via"] is None
    code, stdout, stderr = run(node, "chat", "--via", "1a2b3c4d", text="one\ntwo\n")
    assert (code, stdout, stderr.count("through node 1a2b3c4d\n")) == (0, "one \ntwo \n", 1)


@pytest.mark.parametrize(("via", "code"), [("ffffffff", 3), ("nearby", 2), ("", 2)])
def test_a_relay_that_is_not_known(node: Path, via: str, code: int) -> None:
    ended, stdout, stderr = run(node, "ask", "one", "--via", via)
    assert (ended, stdout, stderr.count("\n")) == (code, "", 1)
    assert stderr.startswith("error: via: ") and "; " in stderr


def test_r16_no_escape_sequence_reaches_the_terminal(node: Path) -> None:
    code, stdout, _ = run(node, "ask", "escape")
    assert (code, stdout) == (0, "a\\x1b]52;c;aGk=\\x07\nb\\u202ec\n")
    _, as_json, _ = run(node, "ask", "escape", "--json")
    assert as_json.isascii()
    assert json.loads(as_json)["text"] == "a\x1b]52;c;aGk=\x07\nb\u202ec"


@pytest.mark.parametrize(("prompt", "code"), [("fail at once", 2), ("fail later", 7), ("cut off", 5), ("busy", 5)])
def test_an_answer_that_fails_is_an_error(node: Path, prompt: str, code: int) -> None:
    assert run(node, "ask", prompt)[0] == code


def test_ctrl_c_cancels_the_answer_where_it_is_made(node: Path) -> None:
    (node / "answer-closed").unlink(missing_ok=True)
    ask = start(node, "ask", "for ever")
    assert ask.stdout is not None
    ask.stdout.read(1)
    ask.send_signal(signal.SIGINT)
    _, stderr = ask.communicate(timeout=DEADLINE_S)
    assert (ask.returncode, stderr.splitlines()[-1]) == (130, "error: swarmctl: interrupted")
    until((node / "answer-closed").exists, "the end of the answer")


def test_a_reader_that_has_enough_is_no_error(node: Path) -> None:
    ask = start(node, "ask", "for ever")
    assert ask.stdout is not None and ask.stderr is not None
    ask.stdout.read(1)
    ask.stdout.close()
    with ask.stderr:
        said = ask.stderr.read()
    assert (ask.wait(DEADLINE_S), said.count("\n")) == (0, 1)


def test_on_a_terminal(node: Path) -> None:
    """Tables and the bar are drawn by rich; what strangers wrote is still harmless, and is no markup."""
    for words, seen in ((("models",), "evil\\x1b[2J"), (("pull", "note"), "note: it is unsigned\\x1b[2J")):
        mine, theirs = pty.openpty()
        process = start(node, *words, stdin=theirs, stdout=theirs, stderr=theirs, more={"TERM": "xterm"})
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(mine, 65536)
            except OSError:  # Linux says EIO when the last writer is gone
                break
            shown += piece
        os.close(mine)
        assert process.wait(DEADLINE_S) == 0
        assert seen in shown.decode()


# -- the daemon as a process --------------------------------------------------------------------------------------------


# `swarmctl`, but its daemon is the API of this test.
WITH_TEST_DAEMON = f"""
import sys
from swarmctl import cli, launch
launch.command = lambda home, settings: [sys.executable, {SERVER!r}, "--home", str(home), *settings]
cli.main()
"""


def managed(home: Path, *words: str) -> tuple[int, Any, str]:
    environment = child_environment(SWARMCTL_HOME=str(home))
    command = [sys.executable, "-c", WITH_TEST_DAEMON, *words, "--json"]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S)
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A data folder; the daemon that a test starts in it is stopped."""
    home = tmp_path / "home"
    yield home
    launch.stop(home)


def test_a_command_starts_the_daemon_once_and_down_ends_it(home: Path) -> None:
    code, listed, stderr = managed(home, "ls")
    assert (code, len(listed), json.loads(stderr)) == (0, 1, {"note": "starting the daemon"})
    code, status, stderr = managed(home, "up", "--network", "loopback")
    assert (code, status["state"], "were not applied" in stderr) == (0, "ready", True)
    found = launch.find(home)
    assert found is not None and found.pid == status["pid"]
    code, document, _ = managed(home, "down")
    assert (code, document) == (0, {"state": "stopped", "pid": found.pid})
    assert not launch.alive(found.pid)
    assert managed(home, "down")[:2] == (0, {"state": "stopped", "pid": None})


def test_settings_are_handed_on(home: Path) -> None:
    assert managed(home, "up", "--network", "loopback", "--ipfs-enabled=false")[0] == 0
    assert json.loads((home / "flags.json").read_text()) == ["--network", "loopback", "--ipfs-enabled=false"]


def test_two_commands_at_once_start_one_daemon(home: Path) -> None:
    environment = child_environment(SWARMCTL_HOME=str(home))
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [subprocess.Popen([sys.executable, "-c", WITH_TEST_DAEMON, "ls"], env=environment, **pipes) for _ in range(3)]
    said = [command.communicate(timeout=DEADLINE_S)[1] for command in commands]
    assert ([command.returncode for command in commands], said.count("starting the daemon\n")) == ([0, 0, 0], 1)


def test_the_reason_of_a_daemon_that_does_not_start(home: Path) -> None:
    code, document, stderr = managed(home, "up", "--torrent-port", "6881")
    reason = {"code": 7, "message": "torrent.port: 6881 is in use", "hint": "choose another with --torrent-port"}
    assert (code, document["error"]) == (7, reason)
    assert stderr.splitlines()[-1] == "error: torrent.port: 6881 is in use; choose another with --torrent-port"
    code, document, _ = managed(home, "up", "--crash")
    assert (code, "signal 6" in document["error"]["message"]) == (7, True)


def test_a_daemon_json_that_was_left_behind(home: Path) -> None:
    home.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for text in (
        json.dumps({"url": "http://127.0.0.1:1", "pid": gone.pid, "version": "0"}),
        json.dumps({"url": "http://127.0.0.1:1", "pid": os.getpid(), "version": "0"}),
        "{}", "", "[1]",
    ):  # fmt: skip
        (home / "daemon.json").write_text(text)
        assert launch.find(home) is None
    assert managed(home, "ls")[0] == 0


def test_status_and_down_of_nothing(tmp_path: Path) -> None:
    code, stdout, stderr = run(tmp_path / "none", "status", "--json")
    assert (code, json.loads(stdout)["error"]["code"], stderr.count("\n")) == (7, 7, 1)
    assert document(tmp_path / "none", "down") == {"state": "stopped", "pid": None}
    assert not (tmp_path / "none").exists()


# -- the process itself -------------------------------------------------------------------------------------------------


def test_usage_errors(tmp_path: Path) -> None:
    for words in (("nonsense",), ("pull",), ("ls", "--nonsense"), ("serve", "x", "--threads", "0")):
        code, stdout, stderr = run(tmp_path, *words, "--json")
        assert (code, json.loads(stdout)["error"]["code"], stderr.count("\n")) == (2, 2, 1)
        assert stderr.startswith("error: swarmctl")
    code, stdout, _ = run(tmp_path)
    assert (code, "Commands:" in stdout) == (0, True)


def test_a_bug_is_one_line_and_a_traceback_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "daemon.json").write_text(json.dumps({"url": "http://[bad", "pid": os.getpid(), "version": "0"}))
    code, stdout, stderr = run(tmp_path, "ls", "--json")
    assert (code, json.loads(stdout)["error"]["code"], stderr.count("\n")) == (1, 1, 1)
    assert "Traceback" in (tmp_path / "logs" / "cli.log").read_text()


def test_a_quick_command_imports_little(tmp_path: Path) -> None:
    probe = "import sys; from swarmctl.cli import main\ntry: main(['version'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], env=child_environment(), cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"rich", "http.client", "ssl", "asyncio", "aiohttp", "platformdirs", "daemon", "registry"}


NETWORK = {"network", "peers", "clock", "bittorrent", "ipfs", "peer api"}  # of a node on loopback


def test_doctor_without_a_daemon(tmp_path: Path) -> None:
    """It starts none."""
    _, stdout, _ = run(tmp_path / "none", "doctor", "--json", more={"IPFS_PATH": str(tmp_path)})
    checks = {check["name"]: check for check in json.loads(stdout)["checks"]}
    assert not set(checks) & (NETWORK - {"network"})
    assert checks["network"]["ok"] and "no daemon runs" in checks["network"]["detail"]
    assert not (tmp_path / "none").exists()


def test_doctor(node: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run(node, "doctor", "--json", more={"IPFS_PATH": str(tmp_path)})
    checks = {check["name"]: check for check in json.loads(stdout)["checks"]}
    assert set(checks) == {"python", "libtorrent", "llama_cpp", "kubo", "home", "space", "daemon", "kubo rpc", *NETWORK}
    assert checks["libtorrent"]["ok"] and checks["home"]["ok"] and "runs at" in checks["daemon"]["detail"]
    assert (code == 0) == all(check["ok"] for check in checks.values()), stderr


def test_r20_doctor_fails_for_an_open_kubo_rpc(node: Path, tmp_path: Path) -> None:
    open_rpc = """
import http.server
class Kubo(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"Version":"0.43.0","System":"kubo"}')
    def log_message(self, *_): pass
server = http.server.HTTPServer(("0.0.0.0", 0), Kubo)
print(server.server_port, flush=True)
server.serve_forever()
"""
    rpc = subprocess.Popen([sys.executable, "-c", open_rpc], stdout=subprocess.PIPE, text=True)
    try:
        assert rpc.stdout is not None
        (tmp_path / "api").write_text(f"/ip4/0.0.0.0/tcp/{rpc.stdout.readline().strip()}")
        code, stdout, stderr = run(node, "doctor", "--json", more={"IPFS_PATH": str(tmp_path)})
    finally:
        rpc.kill()
        rpc.communicate()
    checks = {check["name"]: check for check in json.loads(stdout)["checks"]}
    assert (code, checks["kubo rpc"]["ok"]) == (7, False)
    assert stderr.splitlines()[-1].startswith("error: ")
