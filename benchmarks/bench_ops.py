"""Times every op against eager PyTorch, ``torch.compile`` and a copy of the same bytes.

    python -m benchmarks.bench_ops [--device auto|cpu|cuda] [--out FOLDER-OR-FILE] [--quick]

Results go to ``benchmarks/results/<device>.json`` and, as a table, to the terminal. A result
further from float64 than rounding explains is refused, not timed; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import memory, report
from benchmarks.contest import (
    BY_NAME,
    MODES,
    Compiler,
    Contest,
    OpCase,
    WrongResultError,
    bound,
    check_contest,
    copy_calls,
    input_sets,
    make_inputs,
)
from benchmarks.timing import Budget, Timing, call_overhead, interleave
from diffcore._engine import native

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}

OPS = tuple(name for name, case in BY_NAME.items() if case.benchmarked)
"""What is timed unless --ops says otherwise; ``--ops all`` is every case of tests/support."""

SHAPES = {"cpu": ["64x3x128x128"], "cuda": ["256x3x256x256", "64x3x128x128"]}
OVERHEAD_SHAPE = (4, 16)
COMPILE_SECONDS = {"cpu": 900.0, "cuda": 90.0}


@dataclasses.dataclass
class Settings:
    """What one run measures."""

    device: torch.device
    ops: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    budget: Budget
    compile_seconds: float


def time_op(
    case: OpCase,
    mode: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    budget: Budget,
    compiler: Compiler,
) -> dict[str, Any]:
    """One row: checks the op, then times it against its baselines.

    Args:
        case: what is called.
        mode: "forward" or "forward+backward".
        dtype: of the elementwise tensors.
        shape: of the elementwise tensors.
        device: of the same tensors.
        budget: how long.
        compiler: gives the ``torch.compile`` baseline.

    Returns:
        What the JSON holds of it.

    Raises:
        WrongResultError: diffcore's result is wrong.
    """
    sets = input_sets(case, shape, dtype, device)
    contest = Contest(case, mode, [make_inputs(case, shape, dtype, device, i) for i in range(sets)])
    contestants = {"diffcore": contest.diffcore, "eager": contest.eager}
    if case.out and mode == "forward":
        contestants["out="] = contest.into()
    others = {name: calls[0] for name, calls in contestants.items() if name != "eager"}
    errors = check_contest(contest, others)
    compiled = compiler.calls(contest)
    if compiled is not None:
        contestants["compile"] = compiled
        try:
            errors |= check_contest(contest, {"compile": compiled[0]})
        except WrongResultError as error:
            errors["compile"] = math.inf
            print(f"  kept, though outside the bound: {error}", file=sys.stderr)
    elements = math.prod(shape)
    moved = case.bytes_per_element(dtype)
    if mode != "forward":
        moved += case.bytes_per_element(dtype, backward=True)
    contestants["copy"] = copy_calls(moved * elements, sets, device)
    timings = interleave(contestants, device, budget)
    return {
        "op": case.name,
        "mode": mode,
        "dtype": next(name for name, d in DTYPES.items() if d == dtype),
        "shape": list(shape),
        "elements": elements,
        "bytes": moved * elements,
        "exp": case.has_exp,
        "input_sets": sets,
        "error_over_bound": errors,
        **derived(timings, elements, moved * elements),
    }


def time_cases(
    grid: Iterable[tuple[OpCase, str, str, tuple[int, ...]]],
    device: torch.device,
    args: argparse.Namespace,
    seconds: float,
) -> dict[str, Any]:
    """A section of rows made by :func:`time_op`.

    Args:
        grid: cases, each with its mode, dtype and shape.
        device: where they run.
        args: of the script: `quick`, `no_compile` and `seconds`.
        seconds: of timing for each row, if `args` does not say.

    Returns:
        What the JSON holds: rows, what was refused, notes.
    """
    seconds = args.seconds or (0.1 if args.quick else seconds)
    least = 3 if args.quick else 10
    budget = Budget(seconds, warmup_seconds=min(0.1, seconds / 5), min_rounds=least)
    compiler = Compiler(device, 0.0 if args.quick or args.no_compile else math.inf)
    rows, refused = [], []
    for case, mode, dtype, shape in grid:
        what = f"{case.name} {mode} {dtype} {report.times(shape)}"
        report.progress(what)
        try:
            rows.append(time_op(case, mode, DTYPES[dtype], shape, device, budget, compiler))
        except WrongResultError as error:
            refused.append(f"{what}: {error}")
            print(f"REFUSED {refused[-1]}", file=sys.stderr)
    report.progress("")
    notes = compiler.notes
    if not native.has_kernels(device):
        notes.append("diffcore has no kernels here and ran in plain PyTorch")
    return {"rows": rows, "refused": refused, "notes": notes}


def derived(timings: dict[str, Timing], elements: int, nbytes: int) -> dict[str, Any]:
    """Timings with what follows from them; every ratio is one of medians.

    Args:
        timings: of each contestant, "diffcore" and "eager" among them.
        elements: of one tensor.
        nbytes: that the fused op must move.
    """
    medians = {name: t.median for name, t in timings.items()}
    ours = medians["diffcore"]
    return {
        "timings": {name: dataclasses.asdict(t) for name, t in timings.items()},
        "ns_per_element": {name: m * 1e9 / elements for name, m in medians.items()},
        "gb_per_s": nbytes / ours / 1e9,
        "percent_of_copy": 100 * medians["copy"] / ours if "copy" in medians else None,
        "times_eager": medians["eager"] / ours,
        "times_compile": medians["compile"] / ours if "compile" in medians else None,
    }


def time_ops(settings: Settings) -> dict[str, Any]:
    """The "ops" section: every op, dtype, shape and mode."""
    compiler = Compiler(settings.device, settings.compile_seconds)
    grid = list(itertools.product(settings.shapes, settings.dtypes, settings.ops, MODES))
    rows, refused = [], []
    for i, (shape, dtype, name, mode) in enumerate(grid):
        report.progress(f"[{i + 1}/{len(grid)}] {name} {mode} {dtype} {report.times(shape)}")
        try:
            rows.append(
                time_op(
                    BY_NAME[name],
                    mode,
                    DTYPES[dtype],
                    shape,
                    settings.device,
                    settings.budget,
                    compiler,
                )
            )
        except WrongResultError as error:
            refused.append(f"{name} {mode} {dtype}: {error}")
            print(f"REFUSED {refused[-1]}", file=sys.stderr)
    report.progress("")
    notes = compiler.notes
    if compiler.skipped:
        notes.append(
            f"torch.compile for the first {len(grid) - compiler.skipped} of {len(grid)} rows only: "
            f"its {settings.compile_seconds:g} s were over (--compile-seconds)"
        )
    if not native.has_kernels(settings.device):
        notes.append("diffcore has no kernels here and ran in plain PyTorch")
    return {"rows": rows, "refused": refused, "notes": notes}


def time_overhead(settings: Settings) -> dict[str, Any]:
    """The "overhead" section: what a call on 64 elements costs the host, in three modes."""
    rows = []
    for name in settings.ops:
        case = BY_NAME[name]
        report.progress(f"call overhead: {name}")
        for mode in ("forward", "forward, gradient needed", "forward+backward"):
            args = make_inputs(case, OVERHEAD_SHAPE, torch.float32, settings.device)
            if mode == "forward, gradient needed":
                for tensor in case.differentiable:
                    args.tensors[tensor].requires_grad_()
                given = {**args.tensors, **args.options}
                calls = {
                    "diffcore": bound(case.op, **given),
                    "eager": bound(case.formula, torch, **given),
                }
            else:
                contest = Contest(case, mode, [args])
                calls = {"diffcore": contest.diffcore[0], "eager": contest.eager[0]}
            timings = call_overhead(calls, settings.device, settings.budget)
            rows.append(
                {
                    "op": name,
                    "mode": mode,
                    "elements": math.prod(OVERHEAD_SHAPE),
                    "timings": {k: dataclasses.asdict(t) for k, t in timings.items()},
                    "times_eager": timings["eager"].median / timings["diffcore"].median,
                }
            )
    report.progress("")
    return {"rows": rows, "notes": []}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    report.add_common_arguments(parser)
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated cases, or all")
    parser.add_argument(
        "--dtypes", help=f"among {', '.join(DTYPES)} [default: f32,bf16,f16; f32 with --quick]"
    )
    parser.add_argument(
        "--shape", action="append", help="such as 64x3x128x128; may be given several times"
    )
    parser.add_argument("--seconds", type=float, help="of timing, for each row")
    parser.add_argument(
        "--compile-seconds",
        type=float,
        help="after so many seconds of compiling, later rows go without torch.compile; 0: none",
    )
    parser.add_argument(
        "--only", choices=("ops", "overhead", "memory"), help="measure one section only"
    )
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace, device: torch.device) -> Settings:
    """What the command line asks for on one device.

    Raises:
        SystemExit: an op or dtype is unknown.
    """
    ops = list(BY_NAME) if args.ops == "all" else args.ops.split(",")
    dtypes = (args.dtypes or ("f32" if args.quick else "f32,bf16,f16")).split(",")
    for kind, given, known in (("op", ops, BY_NAME), ("dtype", dtypes, DTYPES)):
        unknown = [x for x in given if x not in known]
        if unknown:
            raise SystemExit(f"unknown {kind} {', '.join(unknown)}; known are {', '.join(known)}")
    shapes = args.shape or (["16x3x64x64"] if args.quick else SHAPES[device.type])
    seconds = args.seconds or (0.1 if args.quick else 1.0 if device.type == "cpu" else 0.15)
    compile_seconds = args.compile_seconds
    if compile_seconds is None:
        compile_seconds = 0.0 if args.quick else COMPILE_SECONDS[device.type]
    return Settings(
        device,
        ops,
        dtypes,
        [tuple(int(n) for n in shape.split("x")) for shape in shapes],
        Budget(seconds, warmup_seconds=min(0.1, seconds / 5), min_rounds=3 if args.quick else 10),
        compile_seconds,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 1 if a result was refused."""
    args = parse(argv)

    def measure(device: torch.device) -> dict[str, dict[str, Any]]:
        settings, sections = settings_of(args, device), {}
        if args.only in (None, "overhead"):
            quick = Budget(min(0.3, settings.budget.seconds), 0.02, min_rounds=5)
            sections["overhead"] = time_overhead(dataclasses.replace(settings, budget=quick))
        if args.only in (None, "memory"):
            sections["memory"] = memory.measure(device, settings.shapes[-1])
        if args.only in (None, "ops"):
            sections["ops"] = time_ops(settings)
        return sections

    return report.on_each_device(measure, args, argv)


__all__ = ["OPS", "main", "time_op", "time_ops"]

if __name__ == "__main__":
    raise SystemExit(main())
