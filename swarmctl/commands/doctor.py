"""`doctor`: is everything there, is anything open, and how does the node stand in the network."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from swarmctl.checks import Check
from swarmctl.context import Command, Context, pass_context
from swarmctl.failure import IN_THE_WAY, Failure

MIN_FREE = 1024**3  # bytes; less is no use for models
CHILD_S = 60.0
SETUP = "swarmctl doctor --setup"

# In a child, because this room does not import the daemon's, and because a broken native library may crash.
_FIND_KUBO = """
import sys
from pathlib import Path
from daemon import config
from daemon.errors import SwarmError
from daemon.ipfs.install import find
try:
    ipfs = config.load(Path(sys.argv[1])).ipfs
    print("off" if not ipfs.enabled else "rpc " + ipfs.rpc if ipfs.rpc else find(ipfs.binary) or "")
except SwarmError as error:
    sys.exit(str(error))
"""


@click.command(cls=Command)
@click.option("--setup", is_flag=True, help="Fetch Kubo, or build it, where none is found.")
@pass_context
def doctor(context: Context, setup: bool) -> None:
    """Check what a node needs and how it stands in the network; exit code 7: something is wrong."""
    from swarmctl import render

    if setup:
        _set_up(context)
    checks = [check for examine in _EXAMINATIONS for check in examine(context.home)]
    checks += _network(context)
    document = {"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]}
    rows = [("ok" if check.ok else "WRONG", check.name, check.detail + (f"; {check.hint}" if check.hint else "")) for check in checks]
    context.show(document, lambda: render.table(("", "what", "how"), rows, ""))
    wrong = [check for check in checks if not check.ok]
    if wrong:
        raise Failure(IN_THE_WAY, f"{wrong[0].name}: {wrong[0].detail}", wrong[0].hint, printed=True)


def _set_up(context: Context) -> None:
    from swarmctl import launch

    command = [sys.executable, "-P", "-m", "daemon.ipfs.install"]
    done = subprocess.run(command, env=launch.environment(), stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a reason"])[-1].removeprefix("error: ")
        message, _, hint = last.partition("; ")
        raise Failure(done.returncode if 1 <= done.returncode <= 8 else IN_THE_WAY, message, hint)


def _python(home: Path) -> list[Check]:
    fits = (3, 11) <= sys.version_info[:2] < (3, 14)
    return [Check("python", fits, ".".join(map(str, sys.version_info[:3])), "" if fits else "use 3.11, 3.12 or 3.13")]


def _libraries(home: Path) -> list[Check]:
    return [_library("libtorrent"), _library("llama_cpp")]


def _library(name: str) -> Check:
    code, out, _ = _child([sys.executable, "-P", "-c", f"import {name}; print({name}.__version__)"])
    if code == 0:
        return Check(name, True, out)
    why = f"importing it ended by signal {-code}" if code < 0 else "cannot be imported"
    return Check(name, False, why, "install swarmctl again; docs/setup.md tells how llama.cpp is built")


def _kubo(home: Path) -> list[Check]:
    code, out, error = _child([sys.executable, "-P", "-c", _FIND_KUBO, str(home)])
    if code:
        what, _, hint = (error.splitlines() or ["it cannot be looked for"])[-1].partition("; ")
        return [Check("kubo", False, what, hint)]
    if out == "off" or out.startswith("rpc "):
        return [Check("kubo", True, "IPFS is switched off" if out == "off" else f"the settings name one: {out[4:]}")]
    if not out:
        return [Check("kubo", False, "none of version 0.43 or newer was found", SETUP)]
    _, version, _ = _child([out, "version", "--number"])
    return [Check("kubo", True, f"{version} in {out}")]


def _home(home: Path) -> list[Check]:
    from swarmctl.render import size

    place = next(folder for folder in (home, *home.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            writable = Check("home", True, str(home))
    except OSError as error:
        writable = Check("home", False, f"{home} cannot be written: {error.strerror}", "choose another with --home")
    free = shutil.disk_usage(place).free
    enough = free >= MIN_FREE
    return [writable, Check("space", enough, f"{size(free)} free", "" if enough else "free some, or choose another folder with --home")]


def _daemon(home: Path) -> list[Check]:
    from swarmctl import launch

    found = launch.find(home)
    if found is not None:
        return [Check("daemon", True, f"runs at {found.url} (process {found.pid})")]
    left = (home / "daemon.json").exists()
    return [Check("daemon", True, "not running" + (" (an old daemon.json was left behind)" if left else ""))]


def _open_rpc(home: Path) -> list[Check]:
    """A Kubo RPC that the network can reach gives the node, its keys and its files away."""
    from swarmctl.client import reachable

    ports = {5001, *_configured_ports()}
    for port in sorted(ports):
        for host in _outside_addresses():
            if reachable(host, port) and _is_kubo(host, port):
                return [Check("kubo rpc", False, f"port {port} answers on {host}, not only on 127.0.0.1", "set Addresses.API to 127.0.0.1")]
    return [Check("kubo rpc", True, "none is open to the network")]


def _configured_ports() -> set[int]:
    """The RPC port that the user's own Kubo wrote down."""
    repository = Path(os.environ.get("IPFS_PATH") or Path.home() / ".ipfs")
    try:
        found = re.search(r"/tcp/(\d{1,5})", (repository / "api").read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError):
        return set()
    return {int(found[1])} if found else set()


def _outside_addresses() -> list[str]:
    """Addresses of this machine at which only what listens on all of them answers."""
    found = ["127.0.0.2"] if sys.platform.startswith("linux") else []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address (RFC 5737); connecting UDP sends nothing
            found.append(probe.getsockname()[0])
        except OSError:
            pass  # no network, so no other address
    return found


def _is_kubo(host: str, port: int) -> bool:
    import http.client

    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("POST", "/api/v0/version")
        response = connection.getresponse()
        return response.status in (200, 403) and "kubo" in f"{response.getheader('Server')} {response.read(4096)!r}".lower()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _network(context: Context) -> list[Check]:
    """How the running daemon stands in its network; it is not started for this."""
    from swarmctl import launch, network
    from swarmctl.client import Client

    url = context.elsewhere
    if url is None:
        found = launch.find(context.home)
        if found is None:
            hint = "swarmctl up, then swarmctl doctor again"
            return [Check("network", True, "not looked at: no daemon runs", hint)]
        url = found.url
    client = Client(url, launch.token(context.home))
    return network.checks(client.get("/api/status"), len(client.get("/api/swarm/peers")))


def _child(command: list[str]) -> tuple[int, str, str]:
    from swarmctl import launch

    try:
        done = subprocess.run(
            command, env=launch.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=CHILD_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


_EXAMINATIONS: tuple[Callable[[Path], list[Check]], ...] = (_python, _libraries, _kubo, _home, _daemon, _open_rpc)
