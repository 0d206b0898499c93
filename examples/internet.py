"""Two homes and one public node on a small internet of network namespaces. Run by `make internet`.

Everything is real - Kubo, libtorrent, llama.cpp, the kernel's NAT - and nothing leaves the namespaces, which have no way out. What it
does is what people would type; each line shows the command and the seconds that it took.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from pathlib import Path

from daemon.ipfs import install
from examples.demo import MODEL, QUESTION, ROOT, Story, by_source, streamed
from tests.functional.nodes import Failed
from tests.internet.probe import obstacle
from tests.internet.world import Host, World, internet

MAP = """
   A 192.168.2.2 -- router 60.2.0.2 --.
                                       >-- the wire -- R 60.1.0.2
   B 192.168.3.2 -- router 60.3.0.2 --'
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
    r, a, b = world.public("R"), world.home("A"), world.home("B")
    print(f"Two homes behind NAT and one public node; nothing else is on this internet.\n{MAP}", flush=True)
    for host in (r, a, b):
        with story.step(host, "up") as outcome:
            host.up()
            outcome.append(f"ready: Kubo {host.status['ipfs']['version']}, node {host.status['node'][:16]}")
    for host in (a, b):
        with story.step(host, "join <address of R>") as outcome:
            host.join(r)
            outcome.append("joined R")
    original = Path(shutil.copyfile(MODEL, folder / "smollm2.gguf"))
    share(story, holder=r, other=b, original=original)
    story.end()


def share(story: Story, holder: Host, other: Host, original: Path) -> None:
    """One publishes and serves; the other asks with nothing but the code, then has the model, too."""
    with story.step(holder, f"publish {original.name}") as outcome:
        code = holder.run("publish", str(original))["code"]
        outcome.append(f"code #{code}")
    with story.step(holder, f"serve #{code}") as outcome:
        holder.run("serve", code)
        outcome.append("advertised")
    with story.step(other, "models") as outcome:
        seen = other.served(code)
        outcome.append(f"#{code} {seen['name']}: {seen['nodes']} nodes, {seen['seeders']} seeders, serving")
    with story.step(other, f"ask '{QUESTION}' #{code}") as outcome:
        outcome.append(streamed(other.start("ask", QUESTION, f"#{code}", bufsize=0)))
    with story.step(other, f"pull #{code}") as outcome:
        outcome.append(by_source(other.run("pull", code)))


if __name__ == "__main__":
    sys.exit(main())
