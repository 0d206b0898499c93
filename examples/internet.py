"""Homes behind NATs and one public node on a small internet of network namespaces. Run by `make internet`.

    two homes           routers that keep ports: they reach each other through a punched hole
    symmetric NATs      no hole can be punched: the public node carries what it cannot read
    the code alone      a newcomer who knows nobody, and nobody whom a stranger could dial

Everything is real - Kubo, libtorrent, llama.cpp, the kernel's NAT - and nothing leaves the namespaces, which have no way out. What it
does is what people would type; each line shows the command and the seconds that it took.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from daemon.ipfs import install
from examples.demo import MODEL, QUESTION, ROOT, Story, by_source, streamed
from tests.functional.nodes import Failed
from tests.internet.probe import obstacle
from tests.internet.scenes import NO_IPFS, NOBODY, OPEN, enters_at, wait_until_named
from tests.internet.world import Host, World, internet

MAP = """
   A 192.168.2.2 -- router 60.2.0.2 --.
   B 192.168.3.2 -- router 60.3.0.2 --+
   S 192.168.4.2 -- router 60.4.0.2 --+-- the wire -- R 60.1.0.2
   T 192.168.5.2 -- router 60.5.0.2 --+
   N 192.168.6.2 -- router 60.6.0.2 --'     (S, T and N: symmetric NATs)
"""


def main() -> int:
    kubo = install.find(cache=ROOT / ".cache" / "kubo")
    found = obstacle()
    if found is not None or kubo is None or not MODEL.is_file():
        reason = found.reason if found is not None else "Kubo or the model is missing; run make setup"
        print(f"error: internet: {reason}", file=sys.stderr)
        return 7
    folder = Path(tempfile.mkdtemp(prefix="swarmctl-internet-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with internet(folder, kubo) as world:
            tell(Story(), world, folder)
    except KeyboardInterrupt:
        return 130
    except Failed as failed:
        print(f"error: internet: {failed}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def tell(story: Story, world: World, folder: Path) -> None:
    print(f"One public node, five homes behind NAT; nothing else is on this internet.\n{MAP}", flush=True)
    r = world.public("R")
    a, b = world.home("A"), world.home("B")
    s, t, n = (world.home(name, "symmetric") for name in "STN")
    entry = enters_at(r)
    original = Path(shutil.copyfile(MODEL, folder / "smollm2.gguf"))
    up(story, r, *OPEN, *NOBODY)
    code = two_homes(story, r, a, b, original, entry)
    symmetric(story, r, s, t, original, entry)
    found_by_code(story, r, n, code, entry)
    story.end()


def two_homes(story: Story, r: Host, a: Host, b: Host, original: Path, entry: tuple[str, ...]) -> str:
    """One home publishes and serves; the other asks with nothing but the code, then has the model, too. Gives the code."""
    print("-- Two homes whose routers keep ports\n", flush=True)
    for host in (a, b):
        up(story, host, *entry)
    code = share(story, a, original)
    for host in (a, b):
        join(story, host, r)
    ask(story, b, code)
    with story.step(b, f"pull #{code}") as outcome, r.sniff() as watch:
        outcome.append(by_source(b.run("pull", code)))
    through = watch.bytes_between(b.outside, r.address) / 2**20
    print(f"     (between B and R: {through:.1f} MiB; the rest came straight from A)\n", flush=True)
    a.stop()
    b.stop()
    return code


def symmetric(
    story: Story, r: Host, s: Host, t: Host, original: Path, entry: tuple[str, ...]
) -> None:
    """A and B are gone. The same bytes have the same code on S; T asks it through R."""
    print("-- Symmetric NATs: asked through a relay that cannot read it\n", flush=True)
    for host in (s, t):
        up(story, host, *entry)
    code = share(story, s, original)
    for host in (s, t):
        join(story, host, r)
    with r.sniff(QUESTION.encode(), QUESTION.encode()[:24]) as watch:
        ask(story, t, code)
    carried = watch.bytes_between(t.outside, r.address)
    seen = "THE QUESTION IS READABLE" if watch.found else "the question is not in them"
    print(f"     (between T and R {carried} bytes, and {seen})\n", flush=True)
    t.stop()


def found_by_code(story: Story, r: Host, n: Host, code: str, entry: tuple[str, ...]) -> None:
    """N joins nobody, has no IPFS, and knows one entry to BitTorrent's DHT."""
    print("-- Found by the code alone\n", flush=True)
    began = time.monotonic()
    address, port = wait_until_named(code, r)[0]
    took = time.monotonic() - began
    print(f"     (BitTorrent's DHT names {address}:{port} under #{code}: R, for S; after {took:.1f} s)\n", flush=True)
    up(story, n, *NO_IPFS, *entry)
    ask(story, n, code)


def up(story: Story, host: Host, *settings: str) -> None:
    words = " ".join(word if word else "''" for word in ("up", *settings))
    with story.step(host, words) as outcome:
        host.up(*settings)
        outcome.append(f"ready: node {host.status['node'].removeprefix('ed25519:')[:8]}")


def join(story: Story, host: Host, other: Host) -> None:
    with story.step(host, f"join <address of {other.name}>") as outcome:
        host.join(other)
        outcome.append(f"joined {other.name}")


def share(story: Story, holder: Host, original: Path) -> str:
    with story.step(holder, f"publish {original.name}") as outcome:
        code = str(holder.run("publish", str(original))["code"])
        outcome.append(f"code #{code}")
    with story.step(holder, f"serve #{code}") as outcome:
        holder.run("serve", code)
        outcome.append("advertised")
    return code


def ask(story: Story, host: Host, code: str) -> None:
    with story.step(host, f"ask '{QUESTION}' #{code}") as outcome:
        outcome.append(streamed(host.start("ask", QUESTION, f"#{code}", bufsize=0)))


if __name__ == "__main__":
    sys.exit(main())
