"""The rules that the suite enforces are in force: blocking the loop and warnings fail, and the version stands in one place."""

from __future__ import annotations

import asyncio
import re
import warnings
from pathlib import Path

import pytest
from blockbuster import BlockingError

from daemon import config

ROOT = Path(__file__).parent.parent.parent


async def test_daemon_code_cannot_block_the_loop(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[api]\nport = 1234\n")
    with pytest.raises(BlockingError):
        config.load(tmp_path)
    assert (await asyncio.to_thread(config.load, tmp_path)).api.port == 1234


def test_a_warning_fails() -> None:
    with pytest.raises(DeprecationWarning):
        warnings.warn("old", DeprecationWarning, stacklevel=1)


def test_the_version_stands_in_one_place() -> None:
    version = re.search(r'^version = "([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    for package in ("swarmctl", "daemon", "registry"):
        for path in (ROOT / package).rglob("*.py"):
            assert f'"{version[1]}"' not in path.read_text(), path


def test_every_lint_exception_has_its_reason_on_the_line() -> None:
    silent = re.compile(r"#\s*(noqa(: [A-Z0-9, ]+)?|type: ignore(\[[a-z, -]+\])?)\s*$")
    for package in ("swarmctl", "daemon", "registry", ".ci"):
        for path in (ROOT / package).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not silent.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
