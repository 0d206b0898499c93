"""The main job on three nodes of this machine: publish, pull, fall back, serve, ask. Run by `make demo`.

Everything is real - Kubo, libtorrent, llama.cpp, a chat model - and stays in a temporary folder and on 127.0.0.1. What it does
is what a person would type; each line shows the command and the seconds that it took.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
SWARMCTL = Path(sys.executable).with_name("swarmctl")
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "In one sentence: why is it good to share things?"
SLOW = "24MiB"  # per second: slow enough to pull a plug in the middle


@dataclass
class Node:
    """One swarmctl with a data folder of its own."""

    name: str
    home: Path
    status: dict[str, Any] = field(default_factory=dict)

    def command(self, *words: str) -> list[str]:
        return [str(SWARMCTL), "--home", str(self.home), *words]

    def run(self, *words: str) -> Any:
        """One command with --json; its document."""
        done = subprocess.run([*self.command(*words), "--json"], capture_output=True, text=True, timeout=180)
        if done.returncode:
            raise SystemExit(f"{self.name}$ swarmctl {' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
        return json.loads(done.stdout)

    def up(self, *settings: str) -> None:
        self.run("up", "--network", "loopback", *settings)
        self.status = self.run("status")


class Named(Protocol):
    """What a step is told of."""

    name: str


class Story:
    """Tells each step with its time."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    @contextlib.contextmanager
    def step(self, node: Named, words: str) -> Iterator[list[str]]:
        print(f"{node.name}$ swarmctl {words}", flush=True)
        outcome: list[str] = []
        began = time.monotonic()
        yield outcome
        seconds = f"{time.monotonic() - began:.1f} s"
        for line in outcome:
            print(f"     {line}")
        print(f"     {seconds}\n", flush=True)
        self.rows.append((f"{node.name}: {words}", seconds, outcome[-1] if outcome else ""))

    def end(self) -> None:
        """All steps as a table."""
        width = max(len(row[0]) for row in self.rows)
        print("What happened")
        for what, seconds, outcome in self.rows:
            print(f"  {what:<{width}}  {seconds:>7}  {outcome}")


def main() -> int:
    if not MODEL.is_file():
        print("error: demo: the model is missing; run make setup", file=sys.stderr)
        return 7
    folder = Path(tempfile.mkdtemp(prefix="swarmctl-demo-"))
    a, b, c = (Node(letter, folder / letter.lower()) for letter in "ABC")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tell(Story(), a, b, c, folder)
    except KeyboardInterrupt:
        return 130
    finally:
        for node in (a, b, c):
            if node.home.exists():
                subprocess.run(node.command("down"), capture_output=True, timeout=30)
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def tell(story: Story, a: Node, b: Node, c: Node, folder: Path) -> None:
    print("Three nodes on this machine; they know nothing of each other.\n", flush=True)
    for node, settings in ((a, ()), (b, ()), (c, ("--transfer-download-rate", SLOW))):
        words = " ".join(["up --network loopback", *settings])
        with story.step(node, words) as outcome:
            node.up(*settings)
            outcome.append(f"ready: Kubo {node.status['ipfs']['version']}, node {node.status['node'][:16]}")
    for node in (b, c):
        with story.step(node, "join <address of A>") as outcome:
            node.run("join", a.status["addresses"][0])
            outcome.append("joined A")

    original = folder / "smollm2.gguf"
    shutil.copyfile(MODEL, original)
    with story.step(a, f"publish {original.name}") as outcome:
        model = a.run("publish", str(original))
        outcome += [
            f"CID       {model['cid']}",
            f"infohash  {model['infohash']}",
            f"code #{model['code']}, signed by {model['signed_by'][:16]}",
        ]
    code = "#" + model["code"]

    with story.step(b, f"pull {code}") as outcome:
        outcome.append(by_source(b.run("pull", code)))
    with story.step(c, f"pull {code}   (its Kubo is killed half-way)") as outcome:
        outcome.append(by_source(pull_and_kill_kubo(c, code)))

    with story.step(a, f"serve {code}") as outcome:
        a.run("serve", code)
        outcome.append("advertised")
    with story.step(b, "models") as outcome:
        seen = wait_until_served(b, model["code"])
        outcome.append(f"#{seen['code']} {seen['name']}: {seen['nodes']} nodes, {seen['seeders']} seeders, serving")
    with story.step(b, f"ask '{QUESTION}' {code}") as outcome:
        outcome.append(ask(b, code))
    with story.step(a, f"stop {code}") as outcome:
        a.run("stop", code)
        outcome.append("the worker and its memory are gone")

    story.end()


def by_source(pulled: dict[str, Any]) -> str:
    parts = [f"{amount / 2**20:.0f} MiB by {source}" for source, amount in pulled["sources"].items() if amount]
    return ", ".join(parts) + ", blake3 and signature hold"


def pull_and_kill_kubo(node: Node, code: str) -> dict[str, Any]:
    """The pull goes on when its IPFS node is gone: BitTorrent fetches what is still missing."""
    pull = subprocess.Popen([*node.command("pull", code), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert pull.stderr is not None and pull.stdout is not None
    killed = False
    for line in pull.stderr:  # progress as NDJSON
        progress = json.loads(line) if line.startswith("{") else {}
        if not killed and progress.get("size") and progress["received"] > progress["size"] / 2:
            os.kill(node.run("status")["ipfs"]["pid"], signal.SIGKILL)
            killed = True
            print(f"     Kubo killed at {progress['received'] / 2**20:.0f} MiB", flush=True)
    document = pull.stdout.read()
    if pull.wait(timeout=60) != 0 or not killed:
        raise SystemExit(f"the pull on {node.name} ended with {pull.returncode} (Kubo killed: {killed}): {document}")
    result: dict[str, Any] = json.loads(document)
    return result


def wait_until_served(node: Node, code: str) -> dict[str, Any]:
    for _ in range(50):
        for model in node.run("models"):
            if model["code"] == code and model["serving"]:
                found: dict[str, Any] = model
                return found
        time.sleep(0.1)
    raise SystemExit(f"{node.name} does not see the served model")


def ask(node: Node, code: str) -> str:
    """Ask as a person would; who answered."""
    command = node.command("ask", QUESTION, code)
    return streamed(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0))


def streamed(asking: subprocess.Popen[str]) -> str:
    """Show the answer as it comes, and return who answered. The pipes of `asking` are text without a buffer."""
    assert asking.stdout is not None and asking.stderr is not None
    print("     ", end="", flush=True)
    while piece := asking.stdout.read(1):
        print(piece if piece != "\n" else "\n     ", end="", flush=True)
    print(flush=True)
    who = asking.stderr.read().strip().splitlines()
    if asking.wait(timeout=60) != 0 or not who:
        raise SystemExit(f"the question was not answered: {who}")
    return who[-1]


if __name__ == "__main__":
    sys.exit(main())
