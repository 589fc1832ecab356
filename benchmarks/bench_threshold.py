"""Times the threshold of dynamic thresholding against ``torch.quantile``, which sorts.

    python -m benchmarks.bench_threshold [--device auto|cpu|cuda] [--out FOLDER-OR-FILE] [--quick]

Eager PyTorch first has to write x0 and its magnitudes to memory. The copy moves the bytes that are
read once; diffcore reads them more than once.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import report
from benchmarks.bench_ops import time_cases
from benchmarks.contest import OpCase
from diffcore import ops

SHAPES = ("16x3x256x256", "16x4x64x64", "4x3x1024x1024")
A_X, A_M, GUIDANCE = 1.25, -0.75, 3.0
RATIO, LARGEST = 0.995, 10.0


def _formula(
    xp: Any, x: Any, model_output: Any, model_output_uncond: Any = None, **options: Any
) -> Any:
    m = model_output
    if model_output_uncond is not None:
        m = model_output_uncond + GUIDANCE * (m - model_output_uncond)
    x0 = A_X * x + A_M * m
    if x0.dtype not in (torch.float32, torch.float64):
        x0 = x0.float()  # quantile takes no other
    return xp.quantile(x0.abs().flatten(1), RATIO, dim=1).clamp(1, LARGEST)


def cases() -> list[OpCase]:
    """Without and with guidance."""
    coefficients = torch.tensor([0.0, 0.0, 0.0, 0.0, A_X, A_M, 0.0, 0.0], dtype=torch.float64)
    common = {"coefficients": coefficients, "ratio": RATIO, "sample_max_value": LARGEST}
    op, tensors = ops.dynamic_threshold, ("x", "model_output")
    guided = {**common, "guidance_scale": GUIDANCE}
    return [
        OpCase("dynamic_threshold", op, tensors, _formula, lambda b: common, ()),
        OpCase(
            "dynamic_threshold_guided",
            op,
            (*tensors, "model_output_uncond"),
            _formula,
            lambda b: guided,
            (),
        ),
    ]


def measure(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The "threshold" section."""
    dtypes = (args.dtypes or ("f32" if args.quick else "f32,bf16")).split(",")
    shapes = args.shape or (["16x3x64x64"] if args.quick else SHAPES)
    sizes = [tuple(int(n) for n in shape.split("x")) for shape in shapes]
    grid = ((c, "forward", d, n) for n, d, c in itertools.product(sizes, dtypes, cases()))
    return time_cases(grid, device, args, 3.0 if device.type == "cpu" else 0.15)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 1 if a result was refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    report.add_common_arguments(parser)
    parser.add_argument("--dtypes", help="among f32, bf16, f16, f64 [default: f32,bf16]")
    parser.add_argument("--shape", action="append", help="such as 16x3x256x256; may be repeated")
    parser.add_argument("--seconds", type=float, help="of timing, for each row")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    args = parser.parse_args(argv)
    return report.on_each_device(lambda d: {"threshold": measure(d, args)}, args, argv)


if __name__ == "__main__":
    raise SystemExit(main())
