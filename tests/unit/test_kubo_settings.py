"""What Kubo is told for each kind of network, and which RPC addresses are understood."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest

from daemon.config import Network
from daemon.errors import Unavailable, UsageError
from daemon.ipfs.kubo import KuboProcess, _private_folder
from daemon.ipfs.pubsub import read_message, topic_argument
from daemon.ipfs.reach import Reach
from daemon.ipfs.rpc import Rpc
from daemon.ipfs.settings import apply_settings

SECTIONS = ["Addresses", "Pubsub", "Experimental", "Internal", "Swarm", "Routing", "Provide", "DNS", "Ipns", "AutoNAT"]


RELAY = "/ip4/45.10.0.1/tcp/4001/p2p/12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"


def configured(network: Network, port: int = 0, reach: Reach | None = None) -> dict[str, Any]:
    config: dict[str, Any] = {name: {} for name in SECTIONS}
    config["Discovery"] = {"MDNS": {"Enabled": True}}
    config["Bootstrap"] = ["auto"]
    config["Internal"] = {"Libp2pForceReachability": "public"}
    config["Swarm"]["RelayClient"] = {"StaticRelays": ["of an earlier life"]}
    apply_settings(config, network, port, 90, "/unix/tmp/rpc.sock", reach or Reach())
    return config


def reachable(config: dict[str, Any], address: str) -> bool:
    ip = ipaddress.ip_address(address)
    nets = [ipaddress.ip_network("/".join(f.split("/")[2::2])) for f in config["Swarm"]["AddrFilters"]]
    return not any(net.version == ip.version and ip in net for net in nets)


PUBLIC = ["8.8.8.8", "1.0.0.1", "172.32.0.1", "100.64.0.1", "0.0.0.0", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
PRIVATE = ["10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.1.1", "fd00::1", "fe80::1"]
LOOPBACK = ["127.0.0.1", "127.9.9.9"]


@pytest.mark.parametrize(
    ("network", "inside", "outside"),
    [
        ("loopback", LOOPBACK, [*PUBLIC, *PRIVATE, "::1"]),
        ("lan", [*LOOPBACK, *PRIVATE, "::1"], PUBLIC),
        ("public", [*PUBLIC, *PRIVATE, *LOOPBACK], []),
    ],
)
def test_nothing_leaves_the_network(network: Network, inside: list[str], outside: list[str]) -> None:
    config = configured(network)
    assert [a for a in inside if not reachable(config, a)] == []
    assert [a for a in outside if reachable(config, a)] == []
    assert len(config["Swarm"]["AddrFilters"]) < 300


@pytest.mark.parametrize("network", ["loopback", "lan"])
def test_closed_networks_have_no_way_out(network: Network) -> None:
    config = configured(network)
    assert config["Routing"]["Type"] == "none"
    assert config["Bootstrap"] == []
    assert config["Provide"]["Enabled"] is False
    assert config["Swarm"]["RelayClient"] == config["Swarm"]["RelayService"] == {"Enabled": False}
    assert config["Swarm"]["DisableNatPortMap"] is True
    assert config["AutoConf"] == config["AutoTLS"] == config["HTTPRetrieval"] == {"Enabled": False}
    assert config["Discovery"]["MDNS"]["Enabled"] is (network == "lan")


@pytest.mark.parametrize("network", ["loopback", "lan", "public"])
def test_no_host_that_somebody_must_operate_is_needed(network: Network) -> None:
    config = configured(network)
    assert config["AutoConf"] == config["AutoTLS"] == config["HTTPRetrieval"] == {"Enabled": False}
    assert config["Bootstrap"] == config["Routing"]["DelegatedRouters"] == config["Ipns"]["DelegatedPublishers"] == []
    assert config["DNS"]["Resolvers"] == {}
    assert "auto" not in str(config)


@pytest.mark.parametrize("network", ["loopback", "lan"])
def test_a_closed_network_is_not_opened_by_what_is_wanted(network: Network) -> None:
    wanted = Reach("private", (RELAY,), relay_service=True)
    assert configured(network, reach=wanted) == configured(network)


def test_what_is_wanted_of_a_public_node_is_told_and_no_more() -> None:
    unknown = configured("public")
    assert "Libp2pForceReachability" not in unknown["Internal"]
    assert unknown["Swarm"]["RelayClient"] == {"Enabled": True}
    assert unknown["Swarm"]["RelayService"]["Enabled"] is False
    private = configured("public", reach=Reach("private", (RELAY,)))
    assert private["Internal"]["Libp2pForceReachability"] == "private"
    assert private["Swarm"]["RelayClient"] == {"Enabled": True, "StaticRelays": [RELAY]}
    public = configured("public", reach=Reach("public", (RELAY,), relay_service=True))
    assert public["Internal"]["Libp2pForceReachability"] == "public"
    assert public["Swarm"]["RelayClient"] == {"Enabled": True}
    service = public["Swarm"]["RelayService"]
    assert service["Enabled"] is True and service["MaxReservations"] <= 128 and service["ConnectionDataLimit"] <= 1 << 17
    for config in (unknown, private, public):
        assert config["Routing"]["Type"] == "dht" and config["Swarm"]["EnableHolePunching"] is True


@pytest.mark.parametrize("network", ["loopback", "lan", "public"])
def test_no_network_opens_a_gateway_or_an_rpc_port(network: Network) -> None:
    addresses = configured(network, 4001)["Addresses"]
    assert addresses["Gateway"] == []
    assert addresses["API"] == ["/unix/tmp/rpc.sock"]
    assert all("/4001" in listener for listener in addresses["Swarm"])


def test_a_path_too_long_for_a_socket_gets_a_private_folder_elsewhere(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / "ipfs"

    def process(repo: Path) -> KuboProcess:
        return KuboProcess(Path("/none"), repo, network="loopback", port=0, max_connections=10, log=tmp_path / "log")

    short = process(deep).api
    assert len(short.removeprefix("/unix")) <= 103
    assert short == process(deep).api  # found again after a crash
    assert short != process(deep / "other").api


def test_a_folder_that_others_may_enter_holds_no_socket(tmp_path: Path) -> None:
    _private_folder(tmp_path / "ours")
    _private_folder(tmp_path / "ours")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    for name in ("open", "link"):
        with pytest.raises(Unavailable, match="private"):
            _private_folder(tmp_path / name)


@pytest.mark.parametrize(
    ("address", "multiaddr"),
    [
        ("/ip4/127.0.0.1/tcp/5001", "/ip4/127.0.0.1/tcp/5001/http"),
        ("/dns4/box/tcp/443/https", "/dns4/box/tcp/443/https"),
        ("http://127.0.0.1:5001", "/ip4/127.0.0.1/tcp/5001/http"),
        ("https://box.example/api/v0/", "/dns/box.example/tcp/443/https"),
        ("http://[::1]:5001", "/ip6/::1/tcp/5001/http"),
        ("/unix/run/ipfs.sock", "/unix/run/ipfs.sock"),
        ("/unix//run/ipfs.sock", "/unix/run/ipfs.sock"),
    ],
)
def test_addresses_of_an_rpc(address: str, multiaddr: str) -> None:
    assert Rpc(address).multiaddr == multiaddr


@pytest.mark.parametrize(
    "address",
    [
        "", "box", "ftp://box:1", "http://", "http://box:99999", "http://box/other", "http://a:b@box",
        "/ip4/1.2.3.4/udp/1", "/ip4//tcp/1", "/ip4/1.2.3.4/tcp/x",
    ],
)
def test_what_is_no_address_of_an_rpc_is_a_usage_error(address: str) -> None:
    with pytest.raises(UsageError, match=r"ipfs\.rpc"):
        Rpc(address)


def test_pubsub_words() -> None:
    assert topic_argument("/swarmctl/1/announce") == "uL3N3YXJtY3RsLzEvYW5ub3VuY2U"
    message = read_message({"from": "12D3", "data": "uAP8", "seqno": "u"})
    assert message is not None and (message.sender, message.data) == ("12D3", b"\x00\xff")
    for bad in ({}, {"from": "a"}, {"from": "a", "data": "zAA"}, {"from": 1, "data": "uAA"}, {"from": "a", "data": "uA"}):
        assert read_message(bad) is None
