"""The command line of a benchmark of a few op cases."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import report
from benchmarks.bench_ops import time_cases
from benchmarks.contest import OpCase


def measure_cases(
    section: str,
    doc: str | None,
    cases: Callable[[], Sequence[OpCase]],
    shapes: Sequence[str],
    argv: Sequence[str] | None,
) -> int:
    """The command line of a benchmark of a few cases, forward, at its own shapes.

    Args:
        section: Name of the section of the results.
        doc: Docstring of the benchmark; its first line describes the command.
        cases: Makes what is timed.
        shapes: Such as 16x3x256x256, unless the command or ``--quick`` names others.
        argv: The arguments of the command.

    Returns:
        1 if a result was refused.
    """

    def measure(device: torch.device) -> dict[str, Any]:
        dtypes = (args.dtypes or ("f32" if args.quick else "f32,bf16")).split(",")
        named = args.shape or (["16x3x64x64"] if args.quick else shapes)
        sizes = [tuple(int(n) for n in shape.split("x")) for shape in named]
        grid = ((c, "forward", d, n) for n, d, c in itertools.product(sizes, dtypes, cases()))
        return {section: time_cases(grid, device, args, 3.0 if device.type == "cpu" else 0.15)}

    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    report.add_common_arguments(parser)
    parser.add_argument("--dtypes", help="among f32, bf16, f16, f64 [default: f32,bf16]")
    parser.add_argument("--shape", action="append", help="such as 16x3x256x256; may be repeated")
    parser.add_argument("--seconds", type=float, help="of timing, for each row")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    args = parser.parse_args(argv)
    return report.on_each_device(measure, args, argv)
