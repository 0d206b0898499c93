"""A node whose clock is a day off: what it announces is refused, it is told so, and it works by itself (F18)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.functional.nodes import until
from tests.internet.scenes import ANSWER, OPEN
from tests.internet.world import World

# The kernel has one wall clock for all namespaces, so the daemon gets another from the C library that it reads it through.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
static const time_t off = 24 * 60 * 60;
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += off;
    return failed;
}
"""


def tomorrow(folder: Path) -> tuple[str, ...]:
    """A command that runs another one with its clock a day ahead. Needs the C compiler that set-up needs."""
    compiler = shutil.which("cc")
    assert compiler is not None, "there is no C compiler"
    source, library = folder / "tomorrow.c", folder / "tomorrow.so"
    source.write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return ("env", f"LD_PRELOAD={library}")


def test_f18_a_clock_one_day_off_is_named_and_nothing_of_it_is_believed(
    world: World, tmp_path: Path, model_file: Path
) -> None:
    r1, r2, r3, a = world.public("R1"), world.public("R2"), world.public("R3"), world.home("A")
    world.up(r1, r2, r3, settings=OPEN)
    for other in (r2, r3):  # three whose clocks agree are enough to doubt one's own
        other.join(r1)
    a.up(within=tomorrow(tmp_path))
    code = a.run("publish", str(model_file))["code"]
    a.run("serve", code)
    a.start("join", r1.status["addresses"][0]).communicate(timeout=60)
    until(lambda: a.run("status")["clock"]["off"], "A notices")
    # Printed with its exit code: something is wrong.
    said, _ = a.start("doctor").communicate(timeout=60)
    assert any("WRONG" in line and "clock" in line for line in said.splitlines()), said
    assert a.run("ask", "Say yes.", f"#{code}", *ANSWER)["answered_by"] == a.status["node"]
    assert r1.run("models") == []
    assert r2.run("models") == []
