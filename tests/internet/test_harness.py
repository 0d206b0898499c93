"""The small internet is what it says: who reaches whom, what a NAT does to a port, what a cut cable does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.internet.namespaces import Namespace, Refused, remove_leftovers
from tests.internet.world import Beyond, Host, Nat, World, internet

# Answers every datagram with the address that it came from, as STUN does.
REFLECT = """
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", int(sys.argv[1])))
print("up", flush=True)
while True:
    body, source = udp.recvfrom(2000)
    udp.sendto(repr(source).encode(), source)
"""
# From one port, asks each reflector once; prints what they saw, or null.
ASK = """
import ast, json, socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", int(sys.argv[1])))
udp.settimeout(float(sys.argv[2]))
seen = []
for address in sys.argv[3:]:
    try:
        udp.sendto(b"?", (address, 5000))
        seen.append(ast.literal_eval(udp.recv(2000).decode()))
    except OSError:
        seen.append(None)
print(json.dumps(seen))
"""
PUNCH = """
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", 4000))
udp.settimeout(0.05)
heard = False
for _ in range(20):
    try:
        udp.sendto(b"!", (sys.argv[1], 4000))
        heard = bool(udp.recv(2000))
    except OSError:
        pass
print("heard" if heard else "nothing")
"""
LISTEN = """
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("", 5353))
group = socket.inet_aton("224.0.0.251") + socket.inet_aton(sys.argv[1])
udp.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
udp.settimeout(1)
print("up", flush=True)
try:
    udp.recv(2000)
    print("heard")
except TimeoutError:
    print("nothing")
"""
SHOUT = """
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sys.argv[1]))
udp.sendto(b"anybody?", ("224.0.0.251", 5353))
"""
# Asks an address that nobody has; fails with what the socket says at once or within 50 ms.
KNOCK = """
import socket, sys
knock = socket.socket(socket.AF_INET, getattr(socket, "SOCK_" + sys.argv[1]))
knock.settimeout(0.05)
knock.connect(("8.8.8.8", 53))
knock.send(b"?")
knock.recv(2000)
"""
# Prints the pid of what it leaves behind, and waits to be killed.
ABANDON = """
import sys
from tests.internet.namespaces import Namespace
print(Namespace().start("sleep", "1000").pid, flush=True)
import signal; signal.pause()
"""


def reflects(host: Host) -> None:
    """Answers on port 5000 until the end of the world."""
    child = host.namespace.start(sys.executable, "-c", REFLECT, "5000")
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"


def seen(by: Host, *others: Host, port: int = 4000) -> list[tuple[str, int]]:
    """The address and port that reflectors see of a datagram from `by`."""
    found = json.loads(by.do(sys.executable, "-c", ASK, str(port), "15", *(other.outside for other in others)))
    assert None not in found
    return [(address, port) for address, port in found]


def silent(by: Host, address: str) -> bool:
    """Whether half a second brings no answer."""
    return bool(json.loads(by.do(sys.executable, "-c", ASK, "4000", "0.5", address)) == [None])


def test_public_hosts_reach_each_other(world: World) -> None:
    r1, r2 = world.public("R1"), world.public("R2")
    reflects(r2)
    assert seen(r1, r2) == [(r1.address, 4000)]


def test_a_home_reaches_out_and_nobody_reaches_in(world: World) -> None:
    r, a, b = world.public("R"), world.home("A"), world.home("B")
    reflects(r)
    reflects(a)
    (as_seen,) = seen(a, r)
    assert as_seen == (a.outside, 4000)
    for stranger in (r, b):
        assert silent(stranger, a.outside)
        assert silent(stranger, a.address)


@pytest.mark.parametrize("nat", ["preserving", "symmetric"])
def test_what_a_nat_does_to_the_port(world: World, nat: Nat) -> None:
    r1, r2, a = world.public("R1"), world.public("R2"), world.home("A", nat=nat)
    reflects(r1)
    reflects(r2)
    pairs = [pair for port in range(4000, 4004) for pair in seen(a, r1, r2, port=port)]
    assert {address for address, _ in pairs} == {a.outside}
    if nat == "preserving":
        assert [port for _, port in pairs] == [4000, 4000, 4001, 4001, 4002, 4002, 4003, 4003]
    else:
        assert len({port for _, port in pairs}) == len(pairs)


@pytest.mark.parametrize("carrier", ["preserving", "symmetric"])
def test_behind_two_nats(world: World, carrier: Nat) -> None:
    r, a = world.public("R"), world.home("A", carrier=carrier)
    reflects(r)
    reflects(a)
    assert len(a.routers) == 2
    ((address, port),) = seen(a, r)
    assert address == a.outside == a.routers[1].address
    assert (port == 4000) == (carrier == "preserving")
    assert silent(r, a.outside)


def punched(one: Host, other: Host) -> bool:
    """Whether datagrams get through when both send to where they believe the other to be."""
    both = [host.namespace.start(sys.executable, "-c", PUNCH, far.outside) for host, far in ((one, other), (other, one))]
    heard = [child.communicate(timeout=20)[0] == "heard\n" for child in both]
    assert heard[0] == heard[1]
    return heard[0]


def test_holes_can_be_punched_through_preserving_nats_only(world: World) -> None:
    a, b, c, d = world.home("A"), world.home("B"), world.home("C", nat="symmetric"), world.home("D", carrier="preserving")
    assert punched(a, b)
    assert punched(a, d)
    assert not punched(a, c)
    assert not punched(c, d)


def test_a_lan_has_no_way_out_and_hosts_in_it_meet(world: World) -> None:
    r, lan = world.public("R"), world.lan()
    a, b = lan.host("A"), lan.host("B")
    reflects(r)
    reflects(b)
    assert seen(a, b) == [(a.address, 4000)]
    assert silent(a, r.address)


@pytest.mark.parametrize(("beyond", "said"), [("refused", "No route to host"), ("silent", "timed out")])
def test_what_nobody_has_is_refused_or_silent(tmp_path: Path, kubo_binary: Path, beyond: Beyond, said: str) -> None:
    with internet(tmp_path, kubo_binary, beyond) as world:
        for host in (world.public("R"), world.home("A")):
            for kind in ("STREAM", "DGRAM") * 10:
                with pytest.raises(Refused, match=said):
                    host.do(sys.executable, "-c", KNOCK, kind)


def test_multicast_does_not_cross_the_wire_but_a_lan(world: World) -> None:
    lan = world.lan()
    pairs = ((world.public("R1"), world.public("R2")), (lan.host("A"), lan.host("B")))
    heard = []
    for one, other in pairs:
        listener = other.namespace.start(sys.executable, "-c", LISTEN, other.address)
        assert listener.stdout is not None
        assert listener.stdout.readline() == "up\n"
        one.do(sys.executable, "-c", SHOUT, one.address)
        heard.append(listener.communicate(timeout=20)[0])
    assert heard == ["nothing\n", "heard\n"]


def test_a_cut_cable_heals(world: World) -> None:
    r, a = world.public("R"), world.home("A")
    reflects(r)
    for cable in (r, a, a.routers[0]):
        cable.cut()
        assert silent(a, r.address)
        cable.heal()
        assert seen(a, r) == [(a.outside, 4000)]


def test_two_hosts_are_kept_apart_and_reach_others(world: World) -> None:
    r1, r2, a = world.public("R1"), world.public("R2"), world.home("A")
    reflects(r1)
    reflects(r2)
    world.block(a, r1)
    assert silent(a, r1.address)
    assert seen(a, r2) == [(a.outside, 4000)]
    world.unblock(a, r1)
    assert seen(a, r1) == [(a.outside, 4000)]


def test_a_sniffer_counts_and_finds_what_passes(world: World) -> None:
    r, a = world.public("R"), world.home("A")
    reflects(r)
    with r.sniff(b"?", f"{a.outside}".encode(), b"never said") as watch:
        seen(a, r)
    assert watch.between(a.outside, r.address) == 2
    assert watch.bytes_between(a.outside, r.address) > 2 * 28
    assert a.address not in watch.addresses()
    assert watch.found == {b"?", a.outside.encode()}


def test_nothing_is_left_of_a_world(tmp_path: Path, kubo_binary: Path) -> None:
    world = World(tmp_path, kubo_binary)
    a = world.home("A")
    child = a.namespace.start("sleep", "1000")
    world.close()
    world.close()
    assert child.returncode == -signal.SIGKILL
    assert not a.namespace.processes()


def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    """Its holders end by themselves; what runs inside does not know."""
    ours = Namespace()
    killed = subprocess.Popen([sys.executable, "-c", ABANDON], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    try:
        with killed:
            assert killed.stdout is not None
            left = psutil.Process(int(killed.stdout.readline()))
            killed.kill()
            os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
            assert left.is_running()
            remove_leftovers()
            left.wait(timeout=10)
        assert ours.processes()
    finally:
        ours.close()
