"""The internet tests for `make test`: run where they can be, else one line that says why they were not.

They run by themselves, two files at a time: each has several nodes, which mostly wait for each other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.internet.probe import obstacle


def main() -> int:
    found = obstacle()
    if found is not None:
        print(f"NOT RUN: internet ({found.reason})")
        return 0
    beside = ("-n", "2", "--dist", "loadfile")
    return pytest.main([*beside, str(Path(__file__).parent), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
