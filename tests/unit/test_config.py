"""Settings that are wrong are told, wherever they come from; the right ones win in their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.bootstrap import PUBLIC_BOOTSTRAP
from daemon.config import DHT_BOOTSTRAP, host_port, load
from daemon.errors import UsageError


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("garbage", "config.toml"), ("unknown = 1", "unknown"), ("[api]\nprot = 1", "api.prot"), ("api = 3", "api"),
        ("[network]\nx = 1", "network.x"), ("network = 5", "network"), ("network = 'moon'", "moon"), ("[api]\nport = 'many'", "api.port"),
        ("[api]\nport = 99999", "99999"), ("[api]\nport = -1", "-1"), ("[api]\nport = 1.5", "api.port"), ("[api]\nport = inf", "api.port"),
        ("[api]\nport = nan", "api.port"), ("[api]\nport = true", "api.port"), ("[api]\nhost = '0.0.0.0'", "api.host"),
        ("[torrent]\nenabled = false\n[ipfs]\nenabled = 'off'", "torrent.enabled"), ("[ipfs]\nenabled = 1", "ipfs.enabled"),
        ("[transfer]\nstall = 'x'", "transfer.stall"), ("[transfer]\nstall = nan", "transfer.stall"),
        ("[transfer]\ndownload_rate = '-1MiB'", "transfer.download_rate"), ("[transfer]\ngive_up = -1", "transfer.give_up"),
        ("[engine]\nmemory = -1", "engine.memory"), ("[engine]\nslots = 0", "engine"), ("[swarm]\nheartbeat = 0", "swarm.heartbeat"),
        ("[engine]\nkeep_alive = inf", "engine.keep_alive"), ("[swarm]\njoin = 3", "swarm.join"),
        ("[ipfs]\nbootstrap = 3", "ipfs.bootstrap"), ("[ipfs]\nbootstrap = ['auto']", "ipfs.bootstrap"),
        ("[ipfs]\nbootstrap = ['/ip4/1.2.3.4/tcp/4001']", "ipfs.bootstrap"),
        ("[ipfs]\nbootstrap = ['/ip4/1.2.3/tcp/1/p2p/Qm']", "ipfs.bootstrap"),
        ("network = 'loopback'\n[swarm]\nhost = '0.0.0.0'", "swarm.host"),
        ("[swarm]\nrelay = 'sometimes'", "swarm.relay"), ("[swarm]\nrelay = true", "swarm.relay"),
        ("[swarm]\nrelay_bytes = 2", "swarm.relay_bytes"), ("[swarm]\nopen = 'wide'", "swarm.open"),
        ("[swarm]\nrendezvous = []", "swarm.rendezvous"),
    ],
)  # fmt: skip
def test_a_config_that_is_wrong(tmp_path: Path, text: str, culprit: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UsageError) as refused:
        load(tmp_path, {})
    assert culprit in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_config_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"config\.toml"):
        load(tmp_path, {})


@pytest.mark.parametrize(
    ("environment", "flags"), [({"SWARMCTL_FOO": "1"}, {}), ({"SWARMCTL_API_PORT": "x"}, {}), ({}, {"api.port": "9" * 400 + ".5GiB"})]
)
def test_a_wrong_setting_from_elsewhere(tmp_path: Path, environment: dict[str, str], flags: dict[str, str]) -> None:
    with pytest.raises(UsageError) as refused:
        load(tmp_path, environment, flags)
    assert (*environment, *("--api-port" for _ in flags))[0] in str(refused.value)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[transfer]\nstall = 1\ngive_up = 2\ndownload_rate = '1.5KiB'\n[swarm]\njoin = ['a', 'b']")
    config = load(
        tmp_path, {"SWARMCTL_TRANSFER_STALL": "3", "SWARMCTL_TRANSFER_GIVE_UP": "4", "SWARMCTL_HOME": "/x"}, {"transfer.stall": "5"}
    )
    assert (config.transfer.stall, config.transfer.give_up, config.transfer.download_rate) == (5, 4, 1536)
    assert config.swarm.join == ("a", "b")
    assert (config.api.port, load(tmp_path, {"SWARMCTL_NETWORK": "loopback"}).api.port) == (8787, 0)


def test_no_bootstrap_is_not_the_default_one(tmp_path: Path) -> None:
    assert load(tmp_path, {}).ipfs.bootstrap == PUBLIC_BOOTSTRAP
    assert load(tmp_path, {"SWARMCTL_IPFS_BOOTSTRAP": ""}).ipfs.bootstrap == ()
    assert load(tmp_path, {}, {"ipfs.bootstrap": ""}).ipfs.bootstrap == ()
    (tmp_path / "config.toml").write_text("[ipfs]\nbootstrap = []")
    assert load(tmp_path, {}).ipfs.bootstrap == ()
    one = PUBLIC_BOOTSTRAP[0]
    assert load(tmp_path, {"SWARMCTL_IPFS_BOOTSTRAP": one}).ipfs.bootstrap == (one,)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, DHT_BOOTSTRAP),
        ({"SWARMCTL_TORRENT_DHT_BOOTSTRAP": ""}, ()),
        ({"SWARMCTL_TORRENT_DHT_BOOTSTRAP": " a.example:1\t[::1]:65535 "}, ("a.example:1", "[::1]:65535")),
    ],
)
def test_no_bootstrap_list_is_the_built_in_one_and_an_empty_one_is_none(
    tmp_path: Path, given: dict[str, str], wanted: tuple[str, ...]
) -> None:
    assert load(tmp_path, given).torrent.dht_bootstrap == wanted


def test_an_empty_bootstrap_list_in_the_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[torrent]\ndht_bootstrap = []")
    assert load(tmp_path, {}).torrent.dht_bootstrap == ()


@pytest.mark.parametrize(
    "entry",
    [
        "a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:1x", "::1:5", "[::1]", "[::g]:1", "[1:2]:3",
        "a b:1,c:2", "http://a:1", "a/b:1", "\x1b[2J:1",
    ],
)  # fmt: skip
def test_bootstrap_entries_that_are_no_host_and_port(tmp_path: Path, entry: str) -> None:
    with pytest.raises(UsageError, match=r"torrent\.dht_bootstrap") as refused:
        load(tmp_path, {"SWARMCTL_TORRENT_DHT_BOOTSTRAP": entry})
    assert "\x1b" not in str(refused.value)


def test_a_bootstrap_list_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"torrent\.dht_bootstrap"):
        load(tmp_path, {"SWARMCTL_TORRENT_DHT_BOOTSTRAP": "a:1 " * 33})


def test_hosts_and_ports() -> None:
    assert host_port(DHT_BOOTSTRAP[0]) == ("dht.libtorrent.org", 25401)
    assert host_port("[2001:db8::1]:6881") == ("2001:db8::1", 6881)
    assert host_port("192.0.2.1:1") == ("192.0.2.1", 1)
