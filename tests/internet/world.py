"""A small internet on one machine, with real nodes on its hosts.

    world = World(folder, kubo)
    r = world.public("R").up()
    a = world.home("A").up()
    a.run("join", r.status["addresses"][0])

The wire is a bridge in a namespace of its own. On it stand public hosts and routers:

    public R   60.1.0.2 ----.
                             \\
    home A  192.168.2.2 -- router 60.2.0.2 -- the wire -- 60.0.0.1 -- (nothing)
                             /
    home B  192.168.3.2 -- router 100.64.3.2 -- carrier 60.3.0.2       LAN L  192.168.4.2 -- bridge -- 192.168.4.3

Addresses: 60.0.0.0/8 because libp2p and libtorrent take documentation ranges for private ones, and libtorrent's DHT answers nobody in
11.0.0.0/8 and its like (`dht_ignore_dark_internet`); each host in another /16, because DHTs
distrust neighbours. What has no host is refused at once, name lookups included, or nothing ever comes back (`beyond`).
Multicast does not cross the wire (else hosts on it would find each other by mDNS, which no internet does), and there is no IPv6 on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from tests.functional.nodes import Node, until
from tests.internet.namespaces import Namespace, mark, remove_leftovers
from tests.internet.sniffing import Sniffed, sniff

Nat = Literal["preserving", "symmetric"]
Beyond = Literal["refused", "silent"]
GATEWAY = "60.0.0.1"


class Cable:
    """What ties a namespace to a switch. It is cut at the switch: routes stay, and packets vanish without a word."""

    def __init__(self, switch: Switch, port: str) -> None:
        self._switch, self._port = switch, port

    def cut(self) -> None:
        self._switch.namespace.ip(f"link set {self._port} down")

    def heal(self) -> None:
        self._switch.namespace.ip(f"link set {self._port} up")


class Switch:
    """A bridge in a namespace of its own."""

    def __init__(self, namespace: Namespace, multicast: bool) -> None:
        self.namespace = namespace
        self._multicast = multicast
        self._ports = 0
        # Without snooping every port gets multicast at once, where it gets any.
        namespace.ip("link add bridge0 type bridge mcast_snooping 0", "link set bridge0 up")

    def plug(self, into: Namespace, interface: str, address: str) -> Cable:
        """A cable to `into`, which gets `interface` with `address` (a.b.c.d/n)."""
        self._ports += 1
        port = f"port{self._ports}"
        self.namespace.ip(
            f"link add {port} type veth peer name {interface} netns {into.pid}",
            f"link set {port} master bridge0",
            f"link set {port} up",
        )
        if not self._multicast:
            self.namespace.do("bridge", "link", "set", "dev", port, "mcast_flood", "off")
            into.sysctl(f"ipv6/conf/{interface}/disable_ipv6", "1")
        into.ip(f"address add {address} dev {interface}", f"link set {interface} up")
        return Cable(self, port)


class Router:
    """A NAT as in homes: out goes what is asked from inside, in comes nothing else. Its leg outside is `outside`."""

    def __init__(self, namespace: Namespace, cable: Cable, address: str, nat: Nat) -> None:
        self.namespace, self.cable, self.address = namespace, cable, address
        # Linux keeps the source port where it is free, so that holes can be punched; a random one for each flow is symmetric.
        how = "" if nat == "preserving" else " --random-fully"
        namespace.sysctl("ipv4/ip_forward", "1")
        namespace.rules(
            "*nat\n"
            f"-A POSTROUTING -o outside -j MASQUERADE{how}\n"
            "COMMIT\n"
            "*filter\n"
            "-A INPUT -i outside -m conntrack --ctstate NEW,INVALID -j DROP\n"
            "-A FORWARD -i outside -m conntrack --ctstate NEW,INVALID -j DROP\n"
            "COMMIT"
        )

    def cut(self) -> None:
        self.cable.cut()

    def heal(self) -> None:
        self.cable.heal()


class Host(Node):
    """A node on a host of its own. `address` is the host's, `outside` what others beyond its network see."""

    def __init__(
        self,
        name: str,
        home: Path,
        kubo: Path,
        network: str,
        namespace: Namespace,
        cable: Cable,
        address: str,
        routers: tuple[Router, ...] = (),
    ) -> None:
        """`routers`: on the way out, the nearest first."""
        super().__init__(home, kubo, {"SWARMCTL_NETWORK": network, **mark()}, namespace.within)
        self.name, self.namespace, self.cable = name, namespace, cable
        self.address, self.routers = address, routers
        self.outside = routers[-1].address if routers else address

    @property
    def edge(self) -> Namespace:
        """Where its packets get the address that others see."""
        return self.routers[-1].namespace if self.routers else self.namespace

    def up(self, *settings: str, within: Sequence[str] = (), ready: bool = True) -> Host:
        """Start the daemon; `ready`: and wait for its IPFS, so that `status` has the whole address."""
        super().up(*settings, within=within)
        if ready:
            until(self._settled, f"IPFS on {self.name}")
        return self

    def _settled(self) -> bool:
        self.status = self.run("status")
        return bool(self.status["ipfs"]["state"] != "starting")

    def served(self, code: str) -> dict[str, Any]:
        """What its `models` says of a code as soon as somebody serves it. Fails when nobody does."""

        def listed() -> dict[str, Any] | None:
            return next((model for model in self.run("models") if model["code"] == code and model["serving"]), None)

        return until(listed, f"#{code} served on {self.name}'s list")

    def do(self, *command: str) -> str:
        """What any command prints that runs on this host."""
        return self.namespace.do(*command)

    def cut(self) -> None:
        """Pull its cable. The node goes on and hears nothing."""
        self.cable.cut()

    def heal(self) -> None:
        self.cable.heal()

    def power_off(self) -> None:
        """Gone without a word: cable and processes."""
        self.cut()
        self.kill()

    def sniff(self, *needles: bytes) -> contextlib.AbstractContextManager[Sniffed]:
        """See `sniffing.sniff`: all that passes this host's interface."""
        return sniff(self.namespace.within, "eth0", needles)


class Lan:
    """Hosts on one switch. With a router it is a home, without one there is no way out."""

    def __init__(self, world: World, number: int, network: str, routers: tuple[Router, ...] = ()) -> None:
        self._world, self._number, self._network, self._routers = world, number, network, routers
        self.switch = Switch(world.namespace(), multicast=True)
        self._hosts = 1

    def host(self, name: str) -> Host:
        self._hosts += 1
        namespace = self._world.namespace()
        address = f"192.168.{self._number}.{self._hosts}"
        cable = self.switch.plug(namespace, "eth0", f"{address}/24")
        if self._routers:
            namespace.ip(f"route add default via 192.168.{self._number}.1")
        return self._world.settle(name, self._network, namespace, cable, address, self._routers)


class World:
    """Builds the hosts. `close()` ends all that runs on them; nothing of it outlives the process that made it."""

    def __init__(self, folder: Path, kubo: Path, beyond: Beyond = "refused") -> None:
        """`folder` gets the data folders and logs of the nodes. Raises `namespaces.Refused`."""
        remove_leftovers()
        self._folder, self._kubo = folder, kubo
        self._namespaces: list[Namespace] = []
        self._numbers = 0
        self.hosts: dict[str, Host] = {}
        self._wire = Switch(self.namespace(), multicast=False)
        self._end_the_wire(beyond)

    def public(self, name: str) -> Host:
        """A host that everybody reaches."""
        namespace, address = self.namespace(), f"60.{self._number()}.0.2"
        cable = self._on_the_wire(namespace, "eth0", address)
        return self.settle(name, "public", namespace, cable, address, ())

    def home(self, name: str, nat: Nat = "preserving", carrier: Nat | None = None) -> Host:
        """A host behind a NAT, or behind two where the carrier has one as well."""
        return self.house(nat, carrier).host(name)

    def house(self, nat: Nat = "preserving", carrier: Nat | None = None) -> Lan:
        """A home's LAN, for several hosts in it."""
        number = self._number()
        routers: tuple[Router, ...] = ()
        if carrier is not None:
            outer = self._router(number, carrier)
            between = Switch(outer.namespace, multicast=True)
            outer.namespace.ip(f"address add 100.64.{number}.1/24 dev bridge0")
            inner, address = self.namespace(), f"100.64.{number}.2"
            cable = between.plug(inner, "outside", f"{address}/24")
            inner.ip(f"route add default via 100.64.{number}.1")
            routers = (Router(inner, cable, address, nat), outer)
        else:
            routers = (self._router(number, nat),)
        lan = Lan(self, number, "public", routers)
        lan.switch.plug(routers[0].namespace, "inside", f"192.168.{number}.1/24")
        return lan

    def lan(self) -> Lan:
        """A LAN without a way out."""
        return Lan(self, self._number(), "lan")

    def block(self, one: Host, other: Host) -> None:
        """From now on nothing passes directly between the two; both reach everybody else."""
        self._between("-I", one, other)

    def unblock(self, one: Host, other: Host) -> None:
        self._between("-D", one, other)

    def up(self, *hosts: Host, settings: Sequence[str] = ()) -> None:
        """Start several nodes at once, all with the same `settings`."""
        with ThreadPoolExecutor(max(1, len(hosts))) as pool:
            list(pool.map(lambda host: host.up(*settings), hosts))

    def close(self) -> None:
        """Kill all that runs in here. Idempotent."""
        for namespace in self._namespaces:
            namespace.close()
        for host in self.hosts.values():
            if host.daemon is not None:
                host.daemon.wait()

    def namespace(self) -> Namespace:
        made = Namespace(self._namespaces[0] if self._namespaces else None)
        self._namespaces.append(made)
        made.ip("link set lo up")
        return made

    def settle(
        self, name: str, network: str, namespace: Namespace, cable: Cable, address: str, routers: tuple[Router, ...]
    ) -> Host:
        """A node with a data folder on a host that is wired."""
        assert name not in self.hosts, name
        self.hosts[name] = Host(
            name, self._folder / name, self._kubo, network, namespace, cable, address, routers
        )
        return self.hosts[name]

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _on_the_wire(self, namespace: Namespace, interface: str, address: str) -> Cable:
        cable = self._wire.plug(namespace, interface, f"{address}/8")
        namespace.ip(f"route add default via {GATEWAY}")
        return cable

    def _router(self, number: int, nat: Nat) -> Router:
        namespace, address = self.namespace(), f"60.{number}.0.2"
        return Router(namespace, self._on_the_wire(namespace, "outside", address), address, nat)

    def _end_the_wire(self, beyond: Beyond) -> None:
        """A gateway that answers for all addresses which nobody here has."""
        gateway = self.namespace()
        self._wire.plug(gateway, "eth0", f"{GATEWAY}/8")
        if beyond == "silent":
            gateway.ip("route add blackhole default")
            return
        # Refused by a rule, because what a route refuses is told five times and then once a second (ip_error in the kernel), and
        # as "prohibited", because that ends a waiting UDP socket too (udp_err): name lookups fail at once.
        gateway.ip("route add default dev eth0")
        gateway.sysctl("ipv4/conf/eth0/send_redirects", "0")
        gateway.sysctl("ipv4/conf/all/send_redirects", "0")
        gateway.sysctl("ipv4/ip_forward", "1")
        gateway.sysctl("ipv4/icmp_ratelimit", "0")
        gateway.rules("*filter\n-A FORWARD -j REJECT --reject-with icmp-admin-prohibited\nCOMMIT")

    def _between(self, change: str, one: Host, other: Host) -> None:
        assert one.outside != other.outside, "two hosts of one house meet inside it"
        rules = (f"{change} {chain} {way} {other.outside} -j DROP"
                 for chain in ("INPUT", "OUTPUT", "FORWARD") for way in ("-s", "-d"))  # fmt: skip
        one.edge.rules("\n".join(["*filter", *rules, "COMMIT"]))


@contextlib.contextmanager
def internet(folder: Path, kubo: Path, beyond: Beyond = "refused") -> Iterator[World]:
    world = World(folder, kubo, beyond)
    try:
        yield world
    finally:
        world.close()
