"""Times noise generated inside the kernels against noise that PyTorch writes to memory.

    python -m benchmarks.bench_noise [--device auto|cpu|cuda] [--out FOLDER-OR-FILE] [--quick]

Eager PyTorch and ``torch.compile`` call ``randn_like``; diffcore generates noise from a key. In the
losses only diffcore generates noise, again, and the others read the noise that they kept. Before a
result is timed, it is checked against float64 with the key's noise tensor. On the CPU one core is
timed as well, with each instruction set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.bench_ops import DTYPES, SHAPES, derived
from benchmarks.contest import (
    BY_NAME,
    Arguments,
    Compiler,
    Contest,
    OpCase,
    WrongResultError,
    as_tuple,
    check_contest,
    check_outputs,
    copy_calls,
    input_sets,
    make_inputs,
)
from benchmarks.machine import ROOT
from benchmarks.timing import Budget, interleave
from diffcore import PhiloxNoise, ops
from diffcore._engine import native
from diffcore.reference import philox

KEY = PhiloxNoise(2026)
SHORT_ROWS = ((65536, 2), (4096, 112))
INSTRUCTION_SETS = ("v2", "v3", "v4")
FORWARD, BOTH = "forward", "forward+backward"


@dataclasses.dataclass(frozen=True)
class DrawnCase:
    """An op that draws its noise, and the same op with that noise given."""

    name: str
    mode: str
    given: OpCase  # its noise a tensor: its inputs, its truth, and the formula of the others
    op: Callable[..., Any]  # as `given.op`, with a noise key as `noise`
    moves: int  # elements read and written for each element, backward included
    kept: bool = False  # the others find their noise in memory instead of drawing it
    out: bool = False  # takes out=

    def drawn(self) -> OpCase:
        """What is timed: the noise is drawn on both sides, or by diffcore alone."""
        if self.kept:
            return dataclasses.replace(self.given, op=self.op, out=False)
        given = self.given
        first, *_ = names = tuple(x for x in given.tensors if x != "noise")

        def formula(xp: Any, **arguments: Any) -> Any:
            return given.formula(xp, **{**arguments, "noise": xp.randn_like(arguments[first])})

        differentiable = tuple(x for x in given.differentiable if x != "noise")
        return dataclasses.replace(
            given,
            op=self.op,
            tensors=names,
            formula=formula,
            differentiable=differentiable,
            out=self.out,
        )


# ---- the cases ------------------------------------------------------------------------------


def _randn(x0: Tensor, noise: PhiloxNoise, out: Tensor | None = None) -> Tensor:
    return ops.randn(x0.shape, noise, dtype=x0.dtype, device=x0.device, out=out)


def _with_target(kind: str) -> DrawnCase:
    """Noising that returns the target too, made in the same pass."""
    q_sample = BY_NAME["q_sample"]

    def op(x0: Tensor, noise: PhiloxNoise, t: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return ops.q_sample(x0, t, noise, table, return_target=kind)  # type: ignore[call-overload,no-any-return]

    def formula(xp: Any, x0: Any, noise: Any, t: Any, table: Any) -> tuple[Any, Any]:
        x_t = q_sample.formula(xp, x0, noise, t, table)
        if kind == "epsilon":
            return x_t, noise
        velocity = BY_NAME["velocity"].formula
        return x_t, velocity(xp, x0, noise, table[t, 0], table[t, 1])

    given = dataclasses.replace(q_sample, formula=formula)
    return DrawnCase(f"q_sample, target {kind}", FORWARD, given, op, 3)


def _loss(kind: str, moves: int) -> DrawnCase:
    """The loss with its gradient; the noise is drawn again instead of read."""

    def op(model_output: Tensor, x0: Tensor, noise: Tensor, **options: Any) -> Tensor:
        return ops.denoising_loss(model_output, x0, KEY, **options)

    given = BY_NAME[f"denoising_loss_{kind}"]
    return DrawnCase(given.name, BOTH, given, op, moves, kept=True)


def cases() -> list[DrawnCase]:
    """Everything that is timed."""
    noising = BY_NAME["q_sample"]
    randn = dataclasses.replace(
        noising, formula=lambda xp, x0, noise: noise, options=lambda b: {}, tensors=("x0", "noise")
    )
    return [
        DrawnCase("q_sample", FORWARD, noising, ops.q_sample, 2, out=True),
        _with_target("epsilon"),
        _with_target("v_prediction"),
        DrawnCase("randn", FORWARD, randn, _randn, 1, out=True),
        _loss("epsilon", 2),
        _loss("v_prediction", 3),
        DrawnCase("ddpm_step", FORWARD, BY_NAME["ddpm_step"], ops.ddpm_step, 3, out=True),
        DrawnCase(
            "reparameterize_kl",
            BOTH,
            BY_NAME["reparameterize_kl"],
            ops.reparameterize_kl,
            8,  # the backward reads mean, logvar and the gradient of z, and writes two
        ),
    ]


# ---- one row --------------------------------------------------------------------------------


def check(case: DrawnCase, contest: Contest) -> float:
    """Checks diffcore's first call, the noise for truth and eager being the key's tensor.

    Args:
        case: what is called.
        contest: of what is timed.

    Returns:
        Its largest error over what is allowed; 0 for the noise itself, compared to the bit.

    Raises:
        WrongResultError: it is wrong.
    """
    args = contest.sets[0]
    x = next(iter(args.tensors.values()))
    found = as_tuple(contest.diffcore[0]())
    if case.name == "randn":
        wanted = philox.normals(KEY._parts, x.shape, x.dtype, x.device)
        if not torch.equal(found[0], wanted):
            raise WrongResultError("randn: not the bits of the specification")
        return 0.0
    noise = KEY.tensor(x.shape, dtype=x.dtype, device=x.device)
    options = {name: value for name, value in args.options.items() if name != "noise"}
    given = Arguments({**args.tensors, "noise": noise}, options)
    leaves = contest.case.differentiable
    twin = dataclasses.replace(case.given, differentiable=leaves, out=False)
    both = Contest(twin, contest.mode, [given])
    return check_outputs(case.name, found, as_tuple(both.eager[0]()), both.truth())


def time_case(
    case: DrawnCase,
    dtype: str,
    shape: tuple[int, ...],
    device: torch.device,
    budget: Budget,
    compiler: Compiler | None = None,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    where: str = "",
) -> dict[str, Any]:
    """One row: checks the op, then times it against its baselines.

    Args:
        case: what is called.
        dtype: of the elementwise tensors, by its short name.
        shape: of the elementwise tensors.
        device: of the same tensors.
        budget: how long.
        compiler: gives the ``torch.compile`` baseline; none where it is None.
        memory_format: of the tensors.
        where: what is special about this row.

    Returns:
        What the JSON holds of it.

    Raises:
        WrongResultError: diffcore's result is wrong.
    """
    drawn, kind = case.drawn(), DTYPES[dtype]
    count = input_sets(drawn, shape, kind, device)
    sets = []
    for i in range(count):
        args = make_inputs(drawn, shape, kind, device, i).map(
            lambda x: x.contiguous(memory_format=memory_format)
        )
        if case.kept:
            args.tensors["noise"] = KEY.tensor(shape, dtype=kind, device=device)
        else:
            args.options["noise"] = KEY
        sets.append(args)
    contest = Contest(drawn, case.mode, sets)
    errors = {"diffcore": check(case, contest)}
    contestants = {"diffcore": contest.diffcore, "eager": contest.eager}
    if case.out:
        contestants["out="] = contest.into()
    compiled = compiler.calls(contest) if compiler is not None else None
    if compiled is not None:
        contestants["compile"] = compiled
        if case.kept:  # of what draws its own noise there is no truth
            try:
                errors |= check_contest(contest, {"compile": compiled[0]})
            except WrongResultError as error:
                errors["compile"] = math.inf
                print(f"  kept, though outside the bound: {error}", file=sys.stderr)
    elements = math.prod(shape)
    nbytes = case.moves * kind.itemsize * elements
    contestants["copy"] = copy_calls(nbytes, count, device)
    timings = interleave(contestants, device, budget)
    return {
        "op": case.name,
        "mode": case.mode,
        "dtype": dtype,
        "shape": list(shape),
        "where": where,
        "elements": elements,
        "bytes": nbytes,
        "input_sets": count,
        "error_over_bound": errors,
        **derived(timings, elements, nbytes),
    }


# ---- the section ----------------------------------------------------------------------------


def one_core(shape: tuple[int, ...], dtypes: Sequence[str], budget: Budget) -> list[dict[str, Any]]:
    """Rows of noising, and of the noise alone, in this process: its one thread and its kernels."""
    torch.set_num_threads(1)
    cpu, isa = torch.device("cpu"), native.info().get("instruction_set", "none")
    chosen = [c for c in cases() if c.name in ("q_sample", "randn")]
    return [
        time_case(c, dtype, shape, cpu, budget, where=f"1 thread, {isa}")
        for dtype in dtypes
        for c in chosen
    ]


def one_core_each(
    shape: tuple[int, ...], dtypes: Sequence[str], budget: Budget
) -> list[dict[str, Any]]:
    """Rows of one core, for each instruction set that this processor has: in a process each.

    Raises:
        RuntimeError: such a process failed.
    """
    best = native.info().get("best_instruction_set")
    known = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(best) + 1] if best else ()
    settings = json.dumps([shape, list(dtypes), dataclasses.asdict(budget)])
    code = (
        "import json, sys; from benchmarks import bench_noise as b; "
        "shape, dtypes, budget = json.loads(sys.argv[1]); "
        "print(json.dumps(b.one_core(tuple(shape), dtypes, b.Budget(**budget))))"
    )
    rows: list[dict[str, Any]] = []
    for isa in reversed(known):
        report.progress(f"one core, {isa}")
        environment = {**os.environ, "DIFFCORE_ISA": isa, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, settings]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"one core, {isa}: {result.stderr}")
        rows += json.loads(result.stdout.splitlines()[-1])
    return rows


def measure(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The "noise" section."""
    dtypes = (args.dtypes or ("f32" if args.quick else "f32,bf16")).split(",")
    shapes = args.shape or (["16x3x64x64"] if args.quick else SHAPES[device.type])
    sizes = [tuple(int(n) for n in shape.split("x")) for shape in shapes]
    seconds = args.seconds or (0.1 if args.quick else 1.0 if device.type == "cpu" else 0.15)
    least = 3 if args.quick else 10
    budget = Budget(seconds, warmup_seconds=min(0.1, seconds / 5), min_rounds=least)
    compiler = Compiler(device, 0.0 if args.quick or args.no_compile else math.inf)
    rows, refused = [], []

    def measured(case: DrawnCase, dtype: str, shape: tuple[int, ...], **how: Any) -> None:
        report.progress(f"{case.name} {dtype} {report.times(shape)} {how.get('where', '')}")
        try:
            rows.append(time_case(case, dtype, shape, device, budget, **how))
        except WrongResultError as error:
            refused.append(f"{case.name} {case.mode} {dtype}: {error}")
            print(f"REFUSED {refused[-1]}", file=sys.stderr)

    for shape in sizes:
        for dtype in dtypes:
            for case in cases():
                measured(case, dtype, shape, compiler=compiler)
    noising = cases()[0]
    last = {"memory_format": torch.channels_last, "where": "channels_last"}
    for dtype in dtypes:
        if len(sizes[-1]) == 4:
            measured(noising, dtype, sizes[-1], **last)
    for shape in SHORT_ROWS:
        measured(noising, "f32", shape, where="short rows")
    if device.type == "cpu":
        rows += one_core_each(sizes[-1], dtypes, budget)
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
    parser.add_argument("--shape", action="append", help="such as 64x3x128x128; may be repeated")
    parser.add_argument("--seconds", type=float, help="of timing, for each row")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    args = parser.parse_args(argv)
    return report.on_each_device(lambda d: {"noise": measure(d, args)}, args, argv)


if __name__ == "__main__":
    raise SystemExit(main())
