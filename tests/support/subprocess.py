"""Code run in a Python process of its own, with any instruction set of this processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from diffcore import info

TESTS = Path(__file__).resolve().parents[1]
ALL_ISAS = ("neon",) if info().get("best_instruction_set") == "neon" else ("v2", "v3", "v4")


def instruction_sets() -> tuple[str, ...]:
    """Those that this processor has, the best one last; none without the compiled module."""
    best = info().get("best_instruction_set")
    return ALL_ISAS[: ALL_ISAS.index(str(best)) + 1] if best else ()


# DIFFCORE_ISA may name one of these: a process that asks for a better one does not start.
ISAS = instruction_sets()
# Tests of this process run on one of them already.
OTHER_ISAS = tuple(isa for isa in ISAS if isa != info().get("instruction_set"))


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """What ``code`` prints; it can import what this process can, and the folders of tests."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**env, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
