"""What libtorrent is told about each kind of network: where it listens, whom it may find and whom it may talk to. Pure.

`loopback`: nothing leaves 127.0.0.1. `lan`: nothing leaves private ranges, peers by LSD. `public`: DHT, LSD, UPnP, NAT-PMP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from daemon.config import Network

_LOOPBACK = ("127.0.0.0/8",)
_PRIVATE = (*_LOOPBACK, "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "::1/128", "fc00::/7", "fe80::/10")
_EVERYWHERE = ("0.0.0.0/0", "::/0")

Range = tuple[str, str]


def ranges(networks: Iterable[str]) -> list[Range]:
    """First and last address of each network, as libtorrent's filters take them."""
    parsed: list[IPv4Network | IPv6Network] = [ip_network(network) for network in networks]
    return [(str(network[0]), str(network[-1])) for network in parsed]


def everywhere() -> list[Range]:
    return ranges(_EVERYWHERE)


def local() -> list[Range]:
    """Addresses whose peers need no turn in the unchoking round."""
    return ranges(_PRIVATE)


def rules(network: Network, nearby: Iterable[str]) -> list[tuple[str, str, bool]]:
    """Whether a session of this network may talk to an address: (first, last, allowed), the later ones count more.

    In the public network anybody can name a private address on the DHT, so only those of our own LANs, `nearby`, are spoken to.
    """
    inside = {"loopback": _LOOPBACK, "lan": _PRIVATE, "public": _EVERYWHERE}[network]
    outside = _PRIVATE if network == "public" else ()
    said = [(_EVERYWHERE, False), (inside, True), (outside, False), (nearby, True)]
    return [
        (first, last, may) for networks, may in said for first, last in ranges(networks)
    ]


def interfaces(network: Network, port: int) -> str:
    return f"127.0.0.1:{port}" if network == "loopback" else f"0.0.0.0:{port},[::]:{port}"


def settings(network: Network, port: int, *, download_rate: int, upload_rate: int) -> dict[str, Any]:
    """libtorrent's settings that differ from its defaults. Rates are bytes per second; 0 is no limit.

    A misspelt key or a wrong type is swallowed by libtorrent, so tests/functional/test_torrent.py reads every one back.
    """
    public, loopback = network == "public", network == "loopback"
    return {
        "listen_interfaces": interfaces(network, port),
        "enable_dht": False,  # daemon.torrent.dht switches it on
        "enable_upnp": public,
        "enable_natpmp": public,
        "enable_lsd": not loopback,
        "dht_bootstrap_nodes": "",  # daemon.torrent.dht looks names up: libtorrent would hold the DHT back for them
        "webtorrent_stun_server": "",
        # On a LAN uTP is ten times slower than TCP; on the internet it makes room for others.
        "enable_outgoing_utp": public,
        "enable_incoming_utp": public,
        "enable_ip_notifier": not loopback,
        "allow_multiple_connections_per_ip": loopback,
        "download_rate_limit": download_rate,
        "upload_rate_limit": upload_rate,
        "user_agent": "swarmctl",
        "alert_queue_size": 100_000,
        "stop_tracker_timeout": 1,
        "hashing_threads": 2,
        "listen_queue_size": 64,
        # Swarms are small here: a node that was away for a moment is asked again soon.
        "min_reconnect_time": 2,
        "max_failcount": 6,
        "max_metadata_size": 8 << 20,
        "max_piece_count": 1 << 20,
        "metadata_token_limit": 100_000,
    }


def addresses(peers: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """The peers that are an IP address and a port. Host names are left out: what a stranger names is not looked up."""
    found: list[tuple[str, int]] = []
    for host, port in peers:
        try:
            address = ip_address(host)
        except ValueError:
            continue
        if 0 < port < 65536 and not address.is_unspecified and not address.is_multicast:
            found.append((str(address), port))
    return list(dict.fromkeys(found))


def magnet(infohash: str | None, infohash_v2: str | None) -> str:
    topics: Sequence[str] = [
        *([f"xt=urn:btih:{infohash}"] if infohash else []),
        *([f"xt=urn:btmh:1220{infohash_v2}"] if infohash_v2 else []),
    ]
    return "magnet:?" + "&".join(topics)
