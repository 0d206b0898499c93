"""Settings that are wrong are told, wherever they come from; the right ones win in their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.config import load
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
