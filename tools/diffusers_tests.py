"""Runs diffusers' own scheduler tests twice: as they are, and with every scheduler fused.

    git -C diffusers archive v0.40.0 tests | tar -x -C checkout
    python tools/diffusers_tests.py checkout [--only ddpm,euler] [--coefficients diffusers] [--show]

In the second run an object of every class that has a family is fused when it is constructed; the
tests do not know. Prints how many passed and failed in each, each test whose result differs, with
its error, how many steps were fused, and how many calls went to the stock scheduler, by reason. The
exit status is 1 if a test that passes as it is fails fused. diffusers is the installed one.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
COUNTS = pytest.StashKey[Counter[str]]()
STEPS = "fused steps"


# ---- the plugin, in the process of the tests -----------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --fused and --coefficients."""
    parser.addoption("--fused", help="fuse every scheduler, and write the counts into this file")
    parser.addoption("--coefficients", help="of the schedulers that have them")


def pytest_configure(config: pytest.Config) -> None:
    """Lets the constructors fuse."""
    if config.getoption("--fused"):
        config.stash[COUNTS] = fuse_at_construction(config.getoption("--coefficients"))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Writes the counts."""
    if COUNTS in config.stash:
        Path(config.getoption("--fused")).write_text(json.dumps(config.stash[COUNTS]))


def fuse_at_construction(coefficients: str) -> Counter[str]:
    """Changes the stock classes of this process so that their objects are fused.

    Args:
        coefficients: An argument of ``fuse``, for the schedulers that have them.

    Returns:
        The fused steps, and the calls of stock schedulers by their reasons; counted from now on.
    """
    from diffcore.diffusers import fuse
    from diffcore.diffusers.registry import FAMILIES
    from diffcore.diffusers.scheduler import FusedScheduler

    counts: Counter[str] = Counter()

    def fused_by(stock: Any) -> Any:
        start = stock.__init__

        @functools.wraps(start)
        def construct(self: Any, *args: Any, **kwargs: Any) -> None:
            start(self, *args, **kwargs)
            if type(self) is stock:
                has = coefficients in FAMILIES[stock].coefficients
                fuse(self, coefficients=coefficients if has else "float64")

        return construct

    for stock in FAMILIES:
        stock.__init__ = fused_by(stock)  # type: ignore[misc]
    take, count = FusedScheduler._take, FusedScheduler._count

    def counted_take(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken = take(self, *args, **kwargs)
        counts[STEPS] += taken is not None
        return taken

    def counted_count(self: Any, reason: Exception) -> None:
        counts[f"{type(self).__name__}: {reason}"] += 1
        count(self, reason)

    FusedScheduler._take = counted_take  # type: ignore[method-assign]
    FusedScheduler._count = counted_count  # type: ignore[method-assign]
    return counts


# ---- the script ----------------------------------------------------------------------------------


class Result(NamedTuple):
    """What became of a test.

    Attributes:
        outcome: "passed", "failed" or "skipped".
        message: The first line of its error.
    """

    outcome: str
    message: str = ""


NOTHING = Result("not there")


def read_results(report: Path) -> dict[str, Result]:
    """The result of every test in a report.

    Args:
        report: JUnit XML.

    Returns:
        By class and name.
    """
    found = {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.schedulers.')}::{case.get('name')}"
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            lines = bad[0].get("message", "").splitlines()
            found[name] = Result("failed", lines[0] if lines else bad[0].tag)
        elif case.find("skipped") is not None:
            found[name] = Result("skipped")
        else:
            found[name] = Result("passed")
    return found


def run(checkout: Path, only: Sequence[str], *fused: str) -> dict[str, Result]:
    """Runs the tests in a process of their own.

    Args:
        checkout: The folder that has ``tests/schedulers``.
        only: Parts of the names of test files; all of them if there are none.
        *fused: The options of the plugin, or nothing.

    Returns:
        The results.

    Raises:
        SystemExit: No test was run.
    """
    files = sorted((checkout / "tests" / "schedulers").glob("test_*.py"))
    chosen = [str(f) for f in files if not only or any(part in f.stem for part in only)]
    if not chosen:
        raise SystemExit(f"no tests in {checkout}/tests/schedulers")
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "HF_HUB_OFFLINE": "1",  # a test that downloads fails in both runs, and at once
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-c", os.devnull, "--rootdir", str(checkout), "--tb=line", "-W", "ignore"]
        options += ["-p", "no:cacheprovider", "-p", "tools.diffusers_tests", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *fused, *chosen]
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        if not report.exists():
            raise SystemExit(done.stdout + done.stderr)
        return read_results(report)


def summary(results: dict[str, Result]) -> str:
    """How many tests passed, failed and were skipped."""
    counts = Counter(result.outcome for result in results.values())
    return ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkout", type=Path, help="a folder with diffusers' tests/")
    parser.add_argument("--only", default="", help="parts of file names, such as ddpm,euler")
    parser.add_argument(
        "--coefficients", default="float64", help="float64, or diffusers for those of DDPM"
    )
    parser.add_argument("--show", action="store_true", help="what fails in both runs, too")
    args = parser.parse_args(argv)
    checkout, only = args.checkout.resolve(), [part for part in args.only.split(",") if part]
    stock = run(checkout, only)
    print(f"stock: {summary(stock)}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts.json"
        options = f"--fused={file}", f"--coefficients={args.coefficients}"
        fused = run(checkout, only, *options)
        counts = Counter(json.loads(file.read_text()))
    print(f"fused: {summary(fused)}")
    print(f"{counts.pop(STEPS, 0)} fused steps, {counts.total()} calls of stock schedulers")
    for reason, times in counts.most_common():
        print(f"  {times:6d} {reason}")
    worse = 0
    for name in sorted({**stock, **fused}):
        before, after = stock.get(name, NOTHING), fused.get(name, NOTHING)
        if before.outcome != after.outcome:
            worse += before.outcome == "passed"
            print(f"{before.outcome} -> {after.outcome}: {name}")
            print(f"    {after.message or before.message}")
    if args.show:
        for name, result in stock.items():
            if result.outcome == "failed" == fused.get(name, NOTHING).outcome:
                print(f"failed in both: {name}\n    {result.message}")
    return int(worse > 0)


if __name__ == "__main__":
    raise SystemExit(main())
