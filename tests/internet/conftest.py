"""The world of a test: hosts in network namespaces, gone when it ends."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.internet.probe import obstacle
from tests.internet.world import World, internet


@pytest.fixture
def world(tmp_path: Path, kubo_binary: Path) -> Iterator[World]:
    """A small internet; where none can be had the test fails and says why (`make test` asks before it starts any)."""
    found = obstacle()
    if found is not None:
        pytest.fail(f"no small internet: {found.reason}")
    with internet(tmp_path, kubo_binary) as made:
        yield made


@pytest.fixture
def original(tmp_path: Path, model_file: Path) -> Path:
    """The small model as somebody's own file."""
    return Path(shutil.copyfile(model_file, tmp_path / "smollm2.gguf"))
