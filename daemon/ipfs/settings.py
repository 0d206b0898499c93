"""What our own Kubo is told for each kind of network (kubo docs/config.md).

- `loopback`: one TCP listener on 127.0.0.1; no DHT, bootstrap, mDNS, relays, UPnP; every other
  address is filtered, also to dial.
- `lan`: no DHT and no bootstrap; peers by mDNS; every address outside private ranges is filtered.
- `public`: DHT, relays, hole punching and port mapping, and none of the plumbing that somebody must
  operate: no AutoConf, delegated routers, AutoTLS or DNS over HTTPS.
- Everywhere: RPC on a unix socket, no gateway port. `Bootstrap` is empty at the start, because Kubo
  answers nobody before its first round of bootstrapping is over, up to 10 s when the hosts are dead
  (boxo bootstrap/bootstrap.go); whom to enter by it is told once it answers (entering.py).
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from typing import Any

from daemon.config import Network
from daemon.errors import UsageError
from daemon.ipfs.reach import Reach

_LOOPBACK = ("127.0.0.0/8",)
_PRIVATE = (
    *_LOOPBACK, "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16",
    "::1/128", "fc00::/7", "fe80::/10",
)  # fmt: skip

# Kubo saves peers of its own, and waits for them at the next start just as for a bootstrap list.
_NEVER = "876000h"  # a hundred years

# What a public node lends to others. The limits are those of go-libp2p (circuitv2/relay/resources.go),
# written down so that an update cannot widen them: a relayed connection is for punching a hole.
_RELAY_LIMITS = {
    "ConnectionDurationLimit": "2m",
    "ConnectionDataLimit": 128 << 10,  # bytes in each direction
    "ReservationTTL": "1h",
    "MaxReservations": 128,
    "MaxCircuits": 16,  # for each peer
    "BufferSize": 2048,  # bytes
    "MaxReservationsPerIP": 8,
    "MaxReservationsPerASN": 32,
}


def apply_settings(
    config: dict[str, Any], network: Network, port: int, max_connections: int, api: str, reach: Reach
) -> None:
    """Changes Kubo's own configuration in place. Keys that are not named here keep Kubo's defaults."""
    if max_connections < 2:
        raise UsageError("ipfs.max_connections", f"{max_connections} is too few", "use at least 2")
    config["Addresses"].update(API=[api], Gateway=[], Swarm=_listeners(network, port))
    config["Pubsub"].update(Enabled=True)
    config["Experimental"].update(FilestoreEnabled=True, Libp2pStreamMounting=True)
    config["Discovery"]["MDNS"]["Enabled"] = network != "loopback"
    _use_nobody(config)
    _connections(config["Swarm"], network, max_connections)
    if network == "public":
        _public(config, reach)
    else:
        _closed(config)


def _use_nobody(config: dict[str, Any]) -> None:
    """None of the hosts on which Kubo leans by default."""
    config["AutoConf"] = {"Enabled": False}
    config["AutoTLS"] = {"Enabled": False}
    config["HTTPRetrieval"] = {"Enabled": False}
    config["DNS"]["Resolvers"] = {}
    config["Routing"]["DelegatedRouters"] = []
    config["Ipns"]["DelegatedPublishers"] = []
    config["Bootstrap"] = []


def _connections(swarm: dict[str, Any], network: Network, most: int) -> None:
    limits = {"LowWater": most * 2 // 3, "HighWater": most, "GracePeriod": "20s"}
    swarm["ConnMgr"] = {"Type": "basic", **limits}
    outside = [] if network == "public" else _outside(network)
    swarm["AddrFilters"] = [
        f"/ip{net.version}/{net.network_address}/ipcidr/{net.prefixlen}" for net in outside
    ]


def _public(config: dict[str, Any], reach: Reach) -> None:
    config["Internal"] = {"ShutdownTimeout": "3s", "BackupBootstrapInterval": _NEVER}
    if reach.reachability != "unknown":
        config["Internal"]["Libp2pForceReachability"] = reach.reachability
    swarm = config["Swarm"]
    swarm["DisableNatPortMap"] = False
    swarm["EnableHolePunching"] = True
    # Without `StaticRelays` Kubo looks for relays itself, among the peers that it happens to know.
    swarm["RelayClient"] = {"Enabled": True}
    if reach.relays and reach.reachability != "public":
        swarm["RelayClient"]["StaticRelays"] = list(reach.relays)
    swarm["RelayService"] = {"Enabled": reach.relay_service, **_RELAY_LIMITS}
    config["AutoNAT"] = {}
    # A node that is public serves the DHT, another one asks only.
    config["Routing"]["Type"] = "dht"
    config["Provide"].update(Enabled=True, Strategy="pinned+mfs+entities")


def _closed(config: dict[str, Any]) -> None:
    config["Internal"] = {"ShutdownTimeout": "3s"}
    swarm = config["Swarm"]
    swarm["DisableNatPortMap"] = True
    swarm["EnableHolePunching"] = False
    swarm["RelayClient"] = {"Enabled": False}
    swarm["RelayService"] = {"Enabled": False}
    config["AutoNAT"] = {"ServiceMode": "disabled"}
    config["Routing"]["Type"] = "none"
    config["Provide"].update(Enabled=False)


def _listeners(network: Network, port: int) -> list[str]:
    if network == "loopback":
        return [f"/ip4/127.0.0.1/tcp/{port}"]
    return [
        f"/ip4/0.0.0.0/tcp/{port}",
        f"/ip6/::/tcp/{port}",
        f"/ip4/0.0.0.0/udp/{port}/quic-v1",
        f"/ip6/::/udp/{port}/quic-v1",
    ]


def _outside(network: Network) -> list[IPv4Network | IPv6Network]:
    """Every address that a network of this kind must not reach, as few prefixes as possible."""
    left4, left6 = [IPv4Network("0.0.0.0/0")], [IPv6Network("::/0")]
    for text in _LOOPBACK if network == "loopback" else _PRIVATE:
        kept = ip_network(text)
        if isinstance(kept, IPv4Network):
            left4 = [part for whole in left4 for part in _without4(whole, kept)]
        else:
            left6 = [part for whole in left6 for part in _without6(whole, kept)]
    return [*collapse_addresses(left4), *collapse_addresses(left6)]


def _without4(whole: IPv4Network, part: IPv4Network) -> list[IPv4Network]:
    return list(whole.address_exclude(part)) if part.subnet_of(whole) else [whole]


def _without6(whole: IPv6Network, part: IPv6Network) -> list[IPv6Network]:
    return list(whole.address_exclude(part)) if part.subnet_of(whole) else [whole]
