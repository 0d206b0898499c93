"""The data folder: whose it is, and what a later start finds in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon import config
from daemon.errors import Unavailable
from daemon.home import Home


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_node_that_was_begun_on_loopback_does_not_come_back_public(tmp_path: Path) -> None:
    path = tmp_path / "home"
    with Home(path) as home:
        home.keep_network(config.load(path, {}, {"network": "loopback"}).network)
    assert config.load(path, {}).network == "loopback"
    assert config.load(path, {}, {"network": "lan"}).network == "lan"  # a flag still decides


def test_settings_that_are_there_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[api]\nport = 1234\n")
    with Home(tmp_path) as home:
        home.keep_network("loopback")
    assert (tmp_path / "config.toml").read_text() == "[api]\nport = 1234\n"


def test_key_and_token_are_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "home"
    with Home(path) as home:
        key, token = home.node_key(), home.token()
        assert home.node_key().private_bytes_raw() == key.private_bytes_raw()
        assert home.token() == token
    assert mode(path) == 0o700
    assert mode(path / "node.key") == mode(path / "token") == 0o600


def test_one_at_a_time(tmp_path: Path) -> None:
    with Home(tmp_path), pytest.raises(Unavailable, match="another one runs"), Home(tmp_path):
        pass
    with Home(tmp_path):
        pass


def test_a_damaged_key_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "node.key").write_text("not a key")
    with Home(tmp_path) as home, pytest.raises(Unavailable, match=r"node\.key"):
        home.node_key()
    assert (tmp_path / "node.key").read_text() == "not a key"
