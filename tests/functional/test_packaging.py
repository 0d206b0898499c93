"""`pip install .` gives the three packages, their data files and the command; built and installed without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LOOK = """
import importlib.metadata as metadata, importlib.util, json, pathlib
found = {name: str(pathlib.Path(importlib.util.find_spec(name).origin).parent) for name in ("swarmctl", "daemon", "registry")}
scripts = {entry.name: entry.value for entry in metadata.distribution("swarmctl").entry_points}
import daemon.ipfs.install as install
print(json.dumps({"found": found, "scripts": scripts, "version": metadata.version("swarmctl"),
                  "gomod": {p.name: p.stat().st_size for p in install.GOMOD.iterdir()}}))
"""


def run(*command: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds swarmctl alone."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("swarmctl", "daemon", "registry"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, source)
    (wheel,) = folder.glob("swarmctl-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-index", "--no-deps", wheel)
    return python


def test_the_installed_packages_are_ours(installed: Path) -> None:
    seen = json.loads(run(installed, "-I", "-c", LOOK))
    site = installed.parent.parent
    assert all(Path(place).is_relative_to(site) for place in seen["found"].values()), seen
    assert seen["scripts"] == {"swarmctl": "swarmctl.cli:main"}
    gomod = ROOT / "daemon" / "ipfs" / "gomod"
    assert seen["gomod"] == {path.name: path.stat().st_size for path in gomod.iterdir()}
    assert f'version = "{seen["version"]}"' in (ROOT / "pyproject.toml").read_text()


def test_every_module_is_in_the_wheel(installed: Path) -> None:
    site = Path(run(installed, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for package in ("swarmctl", "daemon", "registry"):
        ours = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
        theirs = {path.relative_to(site) for path in (site / package).rglob("*.py")}
        assert ours == theirs
