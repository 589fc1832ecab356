"""Times the exact discretized likelihood against the usual approximation and the exact formula.

    python -m benchmarks.bench_likelihood [--device auto|cpu|cuda] [--out FOLDER-OR-FILE] [--quick]

``eager`` and ``compile`` approximate Φ by a tanh, clamped at 1e-12, with the formula of OpenAI's
improved-diffusion and guided-diffusion; they are not exact, and not checked. ``exact, eager`` and
``exact, compile`` are the exact formula in PyTorch, with ``log_ndtr``. Gradients are with respect
to mean and scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import report
from benchmarks.bench_ops import DTYPES
from benchmarks.contest import (
    BY_NAME,
    MODES,
    Arguments,
    Compiler,
    Contest,
    OpCase,
    WrongResultError,
    check_contest,
    input_sets,
)
from benchmarks.timing import Budget, Call, interleave
from diffcore._engine import native

SHAPE = "64x3x64x64"
EXACT = dataclasses.replace(
    BY_NAME["discretized_gaussian_log_likelihood"], differentiable=("means", "log_scales")
)


def _cdf(xp: Any, z: Any) -> Any:
    return 0.5 * (1.0 + xp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def approximation(xp: Any, x: Any, means: Any, log_scales: Any) -> Any:
    """``log Φ`` of both ends of the bin by a tanh, no mass less than 1e-12."""
    delta, inverse = x - means, xp.exp(-log_scales)
    above = _cdf(xp, inverse * (delta + 1 / 255))
    below = _cdf(xp, inverse * (delta - 1 / 255))
    log_above = xp.log(above.clip(1e-12))
    log_beyond = xp.log((1 - below).clip(1e-12))
    inside = xp.log((above - below).clip(1e-12))
    return xp.where(x < -0.999, log_above, xp.where(x > 0.999, log_beyond, inside))


APPROXIMATE = dataclasses.replace(EXACT, name="approximation", formula=approximation)


def inputs(
    case: OpCase, shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int
) -> Arguments:
    """Pixels, means that are off by a few of them, and scales of 0.7 to 40 pixels."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(256, tuple(shape), generator=draw) / 127.5 - 1
    means = x + 0.05 * torch.randn(x.shape, generator=draw)
    log_scales = 4 * torch.rand(x.shape, generator=draw) - 5
    tensors = dict(zip(case.tensors, (x, means, log_scales), strict=True))
    return Arguments({k: v.to(device, dtype) for k, v in tensors.items()}, {})


def contestants(
    mode: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    compiler: Compiler,
) -> dict[str, list[Call]]:
    """What is timed, by name.

    Raises:
        WrongResultError: diffcore's result is wrong.
    """
    exact, approximate = (
        Contest(
            case,
            mode,
            [
                inputs(case, shape, dtype, device, seed)
                for seed in range(input_sets(case, shape, dtype, device))
            ],
        )
        for case in (EXACT, APPROXIMATE)
    )
    check_contest(exact, {})
    found = {"diffcore": exact.diffcore, "eager": approximate.eager, "exact, eager": exact.eager}
    for name, contest in (("compile", approximate), ("exact, compile", exact)):
        compiled = compiler.calls(contest)
        if compiled is not None:
            found[name] = compiled
    return found


def measure(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The "likelihood" section."""
    dtypes = (args.dtypes or ("f32" if args.quick else "f32,bf16")).split(",")
    shapes = args.shape or (["16x3x64x64"] if args.quick else [SHAPE])
    sizes = [tuple(int(n) for n in shape.split("x")) for shape in shapes]
    seconds = args.seconds or (0.1 if args.quick else 3.0 if device.type == "cpu" else 0.15)
    least = 3 if args.quick else 10
    budget = Budget(seconds, warmup_seconds=min(0.1, seconds / 5), min_rounds=least)
    compiler = Compiler(device, 0.0 if args.quick or args.no_compile else math.inf)
    rows, refused = [], []
    for shape, dtype, mode in itertools.product(sizes, dtypes, MODES):
        what = f"{mode}, {dtype}, {report.times(shape)}"
        report.progress(what)
        try:
            calls = contestants(mode, DTYPES[dtype], shape, device, compiler)
        except WrongResultError as error:
            refused.append(f"{what}: {error}")
            print(f"REFUSED {refused[-1]}", file=sys.stderr)
            continue
        timings = interleave(calls, device, budget)
        rows.append(
            {"what": what, "timings": {k: dataclasses.asdict(t) for k, t in timings.items()}}
        )
    report.progress("")
    notes = compiler.notes
    if not native.has_kernels(device):
        notes.append("diffcore has no kernels here and ran in plain PyTorch")
    return {"rows": rows, "refused": refused, "notes": notes}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 1 if a result was refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    report.add_common_arguments(parser)
    parser.add_argument("--dtypes", help="among f32, bf16, f16, f64 [default: f32,bf16]")
    parser.add_argument("--shape", action="append", help=f"such as {SHAPE}; may be repeated")
    parser.add_argument("--seconds", type=float, help="of timing, for each row")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    args = parser.parse_args(argv)
    return report.on_each_device(lambda d: {"likelihood": measure(d, args)}, args, argv)


if __name__ == "__main__":
    raise SystemExit(main())
