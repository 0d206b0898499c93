"""What every test gets: a loop that must not block, and the real Kubo and model that set-up fetched."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from daemon.ipfs import install

CACHE = Path(__file__).parent.parent / ".cache"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"

# A shell ignores Ctrl-C for what it starts in the background, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
set_hypothesis_home_dir(CACHE / "hypothesis")
# No test fails because the machine is busy. On a CI machine the examples are the same every time, elsewhere they go on searching.
settings.register_profile(
    "swarmctl", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ, print_blob=True
)
settings.load_profile("swarmctl")


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """A blocking call that daemon code makes on the loop raises `BlockingError`. What a test does by itself is not watched."""
    with blockbuster_ctx("daemon") as watch:
        yield watch


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own SWARMCTL_* variables must not reach the nodes under test."""
    for name in [name for name in os.environ if name.startswith("SWARMCTL_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def kubo_binary() -> Path:
    """The Kubo that set-up found, fetched or built."""
    path = install.find(cache=CACHE / "kubo")
    if path is None:
        pytest.fail("there is no Kubo on PATH or in .cache/kubo; run `make setup`")
    return path


@pytest.fixture(scope="session")
def model_file() -> Path:
    """A real, small chat model (98 MB, Apache-2.0)."""
    path = CACHE / "models" / MODEL
    if not path.is_file():
        pytest.fail(f"there is no {MODEL} in .cache/models; run `make setup`")
    return path
