"""Whether a small internet can be built on this machine, and if not, why, in one line.

`python -m tests.internet.probe` says it. It ends with 1 where only tools are missing (set-up gets those), else with 0.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from shutil import which

from tests.internet.namespaces import PATH, Namespace, Refused

# The package that brings them: what is used of it.
TOOLS = {
    "util-linux": ("unshare", "nsenter"),
    "iproute2": ("ip", "bridge"),
    "iptables": ("iptables-restore",),
}
NAT = """*nat
-A POSTROUTING -o lo -j MASQUERADE --random-fully
COMMIT
*filter
-A FORWARD -m conntrack --ctstate NEW -j DROP
COMMIT"""


@dataclass(frozen=True)
class Obstacle:
    """Why not. `mendable`: nothing says that the kernel cannot, a tool has to be installed."""

    reason: str
    mendable: bool = False


@cache
def obstacle() -> Obstacle | None:
    """None where everything that a world needs works: it was tried on one namespace."""
    if sys.platform != "linux":
        return Obstacle("network namespaces are Linux's")
    missing = [package for package, tools in TOOLS.items() if not all(which(tool, path=PATH) for tool in tools)]
    absent = Obstacle(f"missing on this machine: {' and '.join(missing)}", mendable=True)
    if "util-linux" in missing:  # so the kernel cannot be asked
        return absent
    try:
        namespace = Namespace()
    except Refused as refusal:
        return Obstacle(f"the kernel makes no network namespace for this user: {refusal}")
    try:
        return absent if missing else _tried(namespace)
    finally:
        namespace.close()


def _tried(namespace: Namespace) -> Obstacle | None:
    try:
        namespace.sysctl("ipv4/ip_forward", "1")
        namespace.ip("link add wire type bridge", "link add port type veth peer name eth0")
        namespace.rules(NAT)
    except Refused as refusal:
        return Obstacle(f"the kernel has namespaces, but refuses what is needed in them: {refusal}")
    return None


def main() -> int:
    found = obstacle()
    if found is None:
        print("internet: network namespaces work here")
        return 0
    print(f"internet: {found.reason}")
    return 1 if found.mendable else 0


if __name__ == "__main__":
    sys.exit(main())
