"""Times noise generated inside the kernels against noise that PyTorch writes to memory.

Eager PyTorch and ``torch.compile`` call ``randn_like``; diffcore generates noise from a key. In the
losses only diffcore generates noise, again, and the others read the noise that they kept. Before a
result is timed, it is checked against float64 with the key's noise tensor. On the CPU one core is
timed as well, with each instruction set.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from diffcore._engine import native
from diffcore.reference import philox

from .bench_ops import QUICK, SHAPES, compiled_error
from .contest import (
    BY_NAME,
    Arguments,
    Contest,
    OpCase,
    WrongResultError,
    as_tuple,
    check_outputs,
    copy_calls,
    input_sets,
    make_inputs,
)
from .suite import DTYPES, Job, Row, Run, Shape, derived, times
from .timing import interleave

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
    shape: Shape,
    run: Run,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    where: str = "",
) -> Row:
    """One row: checks the op, then times it against its baselines.

    Args:
        case: what is called.
        dtype: of the elementwise tensors, by its short name.
        shape: of the elementwise tensors.
        run: where and how long.
        memory_format: of the tensors.
        where: what is special about this row, which then goes without ``torch.compile``.

    Returns:
        What the JSON holds of it.

    Raises:
        WrongResultError: diffcore's result is wrong.
    """
    device = run.device
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
    compiled = None if where else run.compiler.calls(contest)
    if compiled is not None:
        contestants["compile"] = compiled
        if case.kept:  # of what draws its own noise there is no truth
            errors |= compiled_error(contest, compiled[0])
    elements = math.prod(shape)
    nbytes = case.moves * kind.itemsize * elements
    contestants["copy"] = copy_calls(nbytes, count, device)
    timings = interleave(contestants, device, run.budget(1.0, 0.15))
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


def jobs_of_one_core(run: Run) -> Iterator[Job]:
    """The "one_core" section: noising and the noise alone, with the kernels of this process."""
    isa = native.info().get("instruction_set", "none")
    for dtype in run.dtypes("f32", "bf16"):
        for case in cases():
            if case.name in ("q_sample", "randn"):
                shape = run.shapes(SHAPES["cpu"], QUICK)[-1]
                how = partial(time_case, case, dtype, shape, run, where=f"1 thread, {isa}")
                yield Job(case.name, f"{case.name} {dtype}, 1 thread, {isa}", how)


def one_core_of(isa: str, dtypes: tuple[str, ...], shape: Shape, run: Run) -> list[Row]:
    """Rows of one core with an instruction set, which a process chooses when it starts.

    Args:
        isa: The instruction set.
        dtypes: To measure.
        shape: Of the tensors.
        run: How long.

    Raises:
        RuntimeError: The process failed.
    """
    environment = {**os.environ, "DIFFCORE_ISA": isa, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "diffcore", "bench", "one_core", "--device", "cpu"]
        command += ["--against", "eager", "--dtype", ",".join(dtypes), "--out", str(out)]
        command += ["--shape", "x".join(map(str, shape)), *["--quick"] * run.quick]
        command += [] if run.seconds is None else ["--seconds", str(run.seconds)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"one core, {isa}: {result.stderr}")
        rows: list[Row] = json.loads(out.read_text(encoding="utf-8"))["one_core"]["rows"]
    return rows


def jobs(run: Run) -> Iterator[Job]:
    """The "noise" section."""
    dtypes = tuple(run.dtypes("f32", "bf16"))
    shapes = run.shapes(SHAPES[run.device.type], QUICK)

    def job(case: DrawnCase, dtype: str, shape: Shape, where: str = "", **how: Any) -> Job:
        what = f"{case.name} {case.mode} {dtype} {times(shape)} {where}".rstrip()
        row = partial(time_case, case, dtype, shape, run, where=where, **how)
        return Job(case.name, what, row)

    for shape in shapes:
        for dtype in dtypes:
            for case in cases():
                yield job(case, dtype, shape)
    noising, last = cases()[0], tuple(shapes[-1])
    for dtype in dtypes if len(last) == 4 else ():
        yield job(noising, dtype, last, "channels_last", memory_format=torch.channels_last)
    for shape in SHORT_ROWS:
        yield job(noising, "f32", shape, "short rows")
    best = native.info().get("best_instruction_set")
    if run.device.type == "cpu" and best:
        for isa in reversed(INSTRUCTION_SETS[: INSTRUCTION_SETS.index(best) + 1]):
            row = partial(one_core_of, isa, dtypes, last, run)
            yield Job("one core", f"one core, {isa}", row)
