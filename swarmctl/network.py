"""What `GET /api/status` says of the network, in words: for `status` and for `doctor`. Pure.

    reachability  nat              others reach this node
    public        (any)            directly
    private       none             through a firewall: after a punched hole, else through a relay
    private       port-preserving  after a punched hole, else through a relay
    private       symmetric        through a relay
    private       unknown          after a punched hole where the NAT lets it, else through a relay
    unknown       (any)            not known yet

A home behind NAT is no fault, and neither is a node that knows nobody in a LAN. These are: a clock
that is off, because others refuse what this node says; IPFS that is down; BitTorrent that listens
on no port; and no way into the public network at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swarmctl.checks import Check
from swarmctl.render import short_keys, size

Status = Mapping[str, Any]

_NATS = {
    "none": "behind a firewall that lets nobody in",
    "port-preserving": "behind a NAT that keeps ports",
    "symmetric": "behind a symmetric NAT",
    "unknown": "behind a NAT of a kind that is not known yet",
}
_PUNCHED = "others reach you by hole punching"
_RELAYED = (
    "only through a relay: answers work, downloads from you need a public holder "
    "or a relay whose owner allows bytes"
)
_FORWARD = "to be reached directly, forward the ports of this node in the router"
_LET_IN = "to be reached directly, let the ports of this node in through the firewall"


# -- for `status` ---------------------------------------------------------------------------------


def lines(status: Status) -> dict[str, str]:
    """Name and text of each line about the network."""
    told = {"network": network(status)}
    if status["network"] == "public":
        told["relays"] = short_keys(status["relays"])
        told["dht"] = _dht_nodes(status)
    told |= {
        "relaying": _relaying(status["relaying"]),
        "neighbours": f"{status['neighbours']} listen to the swarm's topic",
        "peer api": _peer_api(status["peer_api"]),
        "swarm": _swarm(status["swarm"]),
    }
    if status["clock"]["off"]:
        told["clock"] = f"OFF: {status['clock']['why'] or 'others say another time'}"
    return told


def network(status: Status) -> str:
    """The kind of network, how this node stands in it, and the addresses that others see."""
    told = [status["network"]]
    if status["network"] == "public":
        told.append(_standing(status))
        if status["external"]:
            told.append(f"seen as {' '.join(status['external'])}")
    return ", ".join(told)


def _standing(status: Status) -> str:
    if status["reachability"] == "public":
        return "others reach this node directly"
    if status["reachability"] == "private":
        return _NATS[status["nat"]]
    return "not known yet whether others can reach this node"


def _relaying(relaying: Mapping[str, Any]) -> str:
    if not relaying["enabled"]:
        return "off"
    carried = f"{relaying['streams']} streams now, {size(relaying['bytes'])} so far"
    return f"for {relaying['nodes']} nodes, {carried}"


def _dht_nodes(status: Status) -> str:
    told = [f"{network} {status['dht'][network]} nodes" for network in _dhts(status)]
    return ", ".join(told)


def _dhts(status: Status) -> list[str]:
    """The networks that are on and have a DHT."""
    return [network for network in ("bittorrent", "ipfs") if status[network]["enabled"]]


def _peer_api(api: Mapping[str, Any]) -> str:
    reached = f"others reach it at {api['url']}" if api["open"] else "not reached directly"
    return f"port {api['port']}, {reached}"


def _swarm(swarm: Mapping[str, Any]) -> str:
    return f"{swarm['name']}, closed: members only" if swarm["closed"] else "open to everybody"


# -- for `doctor` ---------------------------------------------------------------------------------


def checks(status: Status, known: int) -> list[Check]:
    """What is right and wrong with the network of a node that knows `known` other nodes."""
    found = [_reachability(status)]
    if status["network"] == "public":
        found += [_relays(status), _dht(status, known)]
    return [*found, _peers(status, known), _clock(status["clock"]), *_ports(status)]


def _reachability(status: Status) -> Check:
    kind, reached = status["network"], status["reachability"]
    if kind == "loopback":
        return Check("network", True, "loopback: nothing leaves this machine")
    if kind == "lan":
        return Check("network", True, "lan: nothing leaves the private address ranges")
    told = network(status)
    if reached == "public":
        return Check("network", True, told)
    if reached == "unknown":
        hint = "nodes that you join find it out: swarmctl join ADDRESS of one that is public"
        return Check("network", True, told, hint)
    how = _RELAYED if status["nat"] == "symmetric" else _PUNCHED
    hint = _LET_IN if status["nat"] == "none" else _FORWARD
    return Check("network", True, f"{told}: {how}", hint)


def _relays(status: Status) -> Check:
    if status["relays"]:
        keys = short_keys(status["relays"])
        return Check("relays", True, f"{len(status['relays'])} carry for this node: {keys}")
    if status["reachability"] == "public":
        carried = _relaying(status["relaying"])
        return Check("relays", True, f"none is needed; carrying for others: {carried}")
    if status["reachability"] == "unknown":
        return Check("relays", True, "none yet; it is not known whether one is needed")
    hint = "swarmctl join ADDRESS of a public node whose swarm.relay is not off"
    detail = "none: where no hole can be punched, nobody reaches this node"
    return Check("relays", True, detail, hint)


def _dht(status: Status, known: int) -> Check:
    """Without a node on any DHT, and without anybody known, there is no way into the network."""
    silent = [name for name in _dhts(status) if not status["dht"][name]]
    hint = "; ".join(_unblock(name, status) for name in silent)
    alone = len(silent) == len(_dhts(status)) and not known and not status["neighbours"]
    if alone:
        hint = f"some seconds after the start: swarmctl join ADDRESS, or {hint}"
    return Check("dht", not alone, _dht_nodes(status), hint)


def _unblock(name: str, status: Status) -> str:
    if name == "bittorrent":
        port = status["bittorrent"]["port"] or "of torrent.port"
        return f"bittorrent: let UDP port {port} through the firewall, see torrent.dht_bootstrap"
    return "ipfs: let TCP and UDP of ipfs.port (4001) through the firewall, see ipfs.bootstrap"


def _peers(status: Status, known: int) -> Check:
    detail = f"{known} nodes are known, {status['neighbours']} listen to the swarm's topic"
    hint = "" if known else "swarmctl join ADDRESS, from another node's swarmctl status"
    return Check("peers", True, detail, hint)


def _clock(clock: Mapping[str, Any]) -> Check:
    if not clock["off"]:
        return Check("clock", True, "nobody says another time")
    why = clock["why"] or "others say another time"
    hint = "others refuse what this node says; on Linux timedatectl set-ntp true sets it"
    return Check("clock", False, f"off: {why}", hint)


def _ports(status: Status) -> Sequence[Check]:
    return [_bittorrent_port(status["bittorrent"]), _ipfs(status["ipfs"]), _peer_api_port(status)]


def _bittorrent_port(bittorrent: Mapping[str, Any]) -> Check:
    if not bittorrent["enabled"]:
        return Check("bittorrent", True, "switched off")
    if not bittorrent["port"]:
        hint = "choose another torrent.port, and see logs/daemon.log"
        return Check("bittorrent", False, "it listens on no port", hint)
    return Check("bittorrent", True, f"port {bittorrent['port']}, {bittorrent['peers']} peers")


def _ipfs(ipfs: Mapping[str, Any]) -> Check:
    if not ipfs["enabled"]:
        return Check("ipfs", True, "switched off")
    down = ipfs["state"] == "down"
    why = f": {ipfs['reason']}" if ipfs["reason"] else ""
    detail = f"{ipfs['state']}, {ipfs['peers']} peers{why}"
    return Check("ipfs", not down, detail, "see logs/kubo.log" if down else "")


def _peer_api_port(status: Status) -> Check:
    api = status["peer_api"]
    hint = ""
    if status["network"] == "public" and not api["open"]:
        hint = f"to be asked directly: swarm.open = true, and forward TCP port {api['port']}"
    return Check("peer api", True, _peer_api(api), hint)
