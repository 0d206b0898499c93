"""How long people wait in the small internet: `python -m tests.bench.homes table|first|code [RUNS]`. Prints Markdown.

    table   each kind of NAT with each other: join, first question, pull
    first   two homes behind NATs that keep ports: from `join` to the first answer, and to the first byte
    code    found by the code alone over BitTorrent's DHT: from `up` of a newcomer
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from daemon.ipfs import install
from examples.demo import MODEL, ROOT
from tests.functional.nodes import Failed
from tests.internet.scenes import ANSWER, NO_IPFS, NOBODY, OPEN, enters_at, wait_until_named
from tests.internet.world import Host, World, internet

KINDS: dict[str, Callable[[World, str], Host]] = {
    "public": lambda world, name: world.public(name),
    "keeps ports": lambda world, name: world.home(name),
    "symmetric": lambda world, name: world.home(name, "symmetric"),
    "two NATs": lambda world, name: world.home(name, carrier="preserving"),
}
Outcome = tuple[float, int]  # seconds, exit code
PULL_S = 180.0


def timed(host: Host, *words: str) -> Outcome:
    began = time.monotonic()
    code = 0
    try:
        host.run(*words, timeout=PULL_S)
    except Failed as failed:
        code = failed.code
    return time.monotonic() - began, code


def first_byte(host: Host, code: str) -> float:
    """Seconds until a pull has its first byte; the rest of it is not waited for."""
    began = time.monotonic()
    pulling = host.start("pull", code, "--json")
    assert pulling.stderr is not None
    for line in pulling.stderr:
        if line.startswith("{") and json.loads(line)["received"]:
            took = time.monotonic() - began
            pulling.kill()
            pulling.communicate()
            return took
    raise AssertionError(f"no byte came: {pulling.wait()}")


def another(model: Path, folder: Path, number: int) -> Path:
    """The same model as a file of its own, so that each holder has its own code."""
    path = folder / f"model{number}.gguf"
    shutil.copyfile(model, path)
    with path.open("ab") as file:
        file.write(bytes(32 * (number + 1)))
    return path


def public_node(world: World) -> Host:
    r = world.public("R").up(*OPEN)
    second = world.public("R2").up(*OPEN)
    second.join(r)  # each learns of the other that it is public
    return r


def table(runs: int) -> None:
    seen: dict[tuple[str, str], list[tuple[Outcome, Outcome, Outcome]]] = {}
    for _ in range(runs):
        with a_world() as (world, folder):
            r = public_node(world)
            holders = {kind: make(world, f"holder {kind}") for kind, make in KINDS.items()}
            codes: dict[str, str] = {}
            for number, (kind, holder) in enumerate(holders.items()):
                holder.up(*(OPEN if kind == "public" else ()))
                holder.join(r)
                file = another(MODEL, folder, number)
                codes[kind] = holder.run("publish", str(file))["code"]
                holder.run("serve", codes[kind])
                file.unlink()
            for kind, make in KINDS.items():
                asker = make(world, f"asker {kind}").up(*(OPEN if kind == "public" else ()))
                joined = timed(asker, "join", r.status["addresses"][0])
                for holder_kind, code in codes.items():
                    asked = timed(asker, "ask", "Say yes.", f"#{code}", *ANSWER)
                    pulled = timed(asker, "pull", code)
                    seen.setdefault((holder_kind, kind), []).append((joined, asked, pulled))
                    print((holder_kind, kind, joined, asked, pulled), file=sys.stderr, flush=True)
                asker.stop()
    print("| holder | asker | join | first ask | pull |\n|---|---|---|---|---|")
    for (holder_kind, kind), rows in seen.items():
        cells = [told([row[part] for row in rows]) for part in range(3)]
        print(f"| {holder_kind} | {kind} | {' | '.join(cells)} |")


def told(outcomes: list[Outcome]) -> str:
    """The median, and the exit codes where any is not 0."""
    seconds = statistics.median(outcome[0] for outcome in outcomes)
    codes = sorted({outcome[1] for outcome in outcomes})
    return f"{seconds:.1f} s" + ("" if codes == [0] else f" (exit {', '.join(map(str, codes))})")


def first(runs: int) -> None:
    """A world for each run: homes that come and go by the dozen within a minute use up what a relay gives to one node."""
    answers: list[float] = []
    bytes_: list[float] = []
    for number in range(runs):
        with a_world() as (world, _):
            r = public_node(world)
            a = world.home("A").up()
            code = a.run("publish", str(MODEL))["code"]
            a.run("serve", code)
            a.run("ask", "Say yes.", f"#{code}", *ANSWER)  # it is loaded
            a.join(r)
            for found, what in ((answers, "answer"), (bytes_, "byte")):
                b = world.home(f"B-{what}").up()
                began = time.monotonic()
                b.join(r)
                if what == "answer":
                    b.run("ask", "Say yes.", f"#{code}", *ANSWER)
                else:
                    first_byte(b, code)
                found.append(time.monotonic() - began)
                print((number, what, found[-1]), file=sys.stderr, flush=True)
    print("| from join to | min | median | max |\n|---|---|---|---|")
    for what, found in (("the first answer", answers), ("the first byte", bytes_)):
        row = (min(found), statistics.median(found), max(found))
        print(f"| {what} | {' | '.join(f'{seconds:.2f} s' for seconds in row)} |")


def code_alone(runs: int) -> None:
    rows: dict[str, list[float]] = {}

    def note(what: str, began: float) -> None:
        rows.setdefault(what, []).append(time.monotonic() - began)

    with a_world() as (world, _):
        d, r, h = world.public("D"), world.public("R"), world.home("H", "symmetric")
        d.up(*OPEN, *NO_IPFS, *NOBODY)
        entry = (*enters_at(d), *NO_IPFS)
        r.up(*OPEN, *entry)
        h.up(*entry)
        code = h.run("publish", str(MODEL))["code"]
        h.run("serve", code)
        r.join(d)
        began = time.monotonic()
        h.join(r)
        wait_until_named(code, d)
        note("the holder's join until its relay is named under the code", began)
        for number in range(runs):
            began = time.monotonic()
            n = world.home(f"N{number}", "symmetric").up(*entry)
            note("a newcomer's `up`", began)
            began = time.monotonic()
            n.run("ask", "Say yes.", f"#{code}", *ANSWER, timeout=120)
            note("its first `ask`, by the code alone", began)
            n.stop()
    print("| step | min | median | max |\n|---|---|---|---|")
    for what, found in rows.items():
        row = (min(found), statistics.median(found), max(found))
        print(f"| {what} | {' | '.join(f'{seconds:.1f} s' for seconds in row)} |")


@contextlib.contextmanager
def a_world() -> Iterator[tuple[World, Path]]:
    """A small internet in a temporary folder, both gone at the end."""
    kubo = install.find(cache=ROOT / ".cache" / "kubo")
    assert kubo is not None, "make setup"
    with tempfile.TemporaryDirectory(prefix="swarmctl-homes-") as folder:
        with internet(Path(folder), kubo) as world:
            yield world, Path(folder)


if __name__ == "__main__":
    measures = {"table": (table, 3), "first": (first, 10), "code": (code_alone, 5)}
    measure, runs = measures[sys.argv[1]]
    measure(int(sys.argv[2]) if len(sys.argv) > 2 else runs)
