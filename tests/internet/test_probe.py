"""The probe says why there can be no small internet, and `make test` says it last."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.internet import probe

ROOT = Path(__file__).parent.parent.parent


def test_a_kernel_that_refuses_is_named_and_nothing_counts_as_run() -> None:
    """In a user namespace that may have no network namespaces, which is what a locked container looks like."""
    for module, ends in (("tests.internet", "NOT RUN: internet (the kernel makes no"), ("tests.internet.probe", "internet: the kernel")):
        locked = f"echo 0 > /proc/sys/user/max_net_namespaces && exec '{sys.executable}' -m {module}"
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "sh", "-c", locked], cwd=ROOT, capture_output=True, text=True, timeout=60
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith(ends)
        assert "passed" not in done.stdout


def test_a_missing_tool_is_named_and_can_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("unshare", "nsenter", "ip", "bridge"):
        (tmp_path / tool).symlink_to(shutil.which(tool, path=probe.PATH) or "")
    monkeypatch.setattr(probe, "PATH", str(tmp_path))
    found = probe.obstacle.__wrapped__()
    assert found == probe.Obstacle("missing on this machine: iptables", mendable=True)
    (tmp_path / "unshare").unlink()
    found = probe.obstacle.__wrapped__()
    assert found == probe.Obstacle("missing on this machine: util-linux and iptables", mendable=True)


def test_no_other_system_has_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert probe.obstacle.__wrapped__() == probe.Obstacle("network namespaces are Linux's")
