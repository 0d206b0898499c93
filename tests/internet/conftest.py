"""The world of a test: hosts in network namespaces, gone when it ends."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.internet.probe import obstacle
from tests.internet.world import World, internet


def _demand() -> None:
    """Where no small internet can be had the test fails and says why (`make test` asks before it starts any)."""
    found = obstacle()
    if found is not None:
        pytest.fail(f"no small internet: {found.reason}")


@pytest.fixture
def world(tmp_path: Path, kubo_binary: Path) -> Iterator[World]:
    """A small internet of one test."""
    _demand()
    with internet(tmp_path, kubo_binary) as made:
        yield made


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory, kubo_binary: Path) -> Iterator[World]:
    """One that the tests of a module share, in their order: starting its nodes is what takes the time."""
    _demand()
    with internet(tmp_path_factory.mktemp("world"), kubo_binary) as made:
        yield made


@pytest.fixture
def original(tmp_path: Path, model_file: Path) -> Path:
    """The small model as somebody's own file."""
    return Path(shutil.copyfile(model_file, tmp_path / "smollm2.gguf"))
