"""Times every op against eager PyTorch, ``torch.compile`` and a copy of the same bytes.

A result further from float64 than rounding explains is refused, not timed.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch

from .contest import (
    BY_NAME,
    MODES,
    Contest,
    OpCase,
    WrongResultError,
    check_contest,
    copy_calls,
    input_sets,
    make_inputs,
)
from .suite import DTYPES, Job, Row, Run, Shape, derived, times
from .timing import Call, interleave

OPS = tuple(name for name, case in BY_NAME.items() if case.benchmarked)
"""What is timed unless ``--only`` says otherwise, which may name every case of tests/support."""

SHAPES = {"cpu": [(64, 3, 128, 128)], "cuda": [(256, 3, 256, 256), (64, 3, 128, 128)]}
QUICK = (16, 3, 64, 64)

SIZED = {
    "q_sample": MODES[0],
    "ddpm_step_guided": MODES[0],
    "normal_kl": MODES[0],
    "denoising_loss_v_prediction": MODES[1],
}
"""What is timed at many sizes."""

SIZES = ((1, 4, 8, 8), (256, 7, 16), (64, 3, 32, 32), (64, 3, 128, 128), (1, 16, 21, 90, 160))
"""A latent of one small image, a robot policy, CIFAR, images, a video latent."""

SWEEP = tuple(2**k for k in range(10, 29, 2))  # elements: 1 Ki to 256 Mi


def time_op(case: OpCase, mode: str, dtype: str, shape: Shape, run: Run, cpu: float = 1.0) -> Row:
    """One row: checks the op, then times it against its baselines.

    Args:
        case: what is called.
        mode: "forward" or "forward+backward".
        dtype: of the elementwise tensors, by its short name.
        shape: of the elementwise tensors.
        run: where and how long.
        cpu: seconds of timing on a CPU, if the run does not say.

    Returns:
        What the JSON holds of it.

    Raises:
        WrongResultError: diffcore's result is wrong.
    """
    device, kind = run.device, DTYPES[dtype]
    count = input_sets(case, shape, kind, device)
    sets = [make_inputs(case, shape, kind, device, i) for i in range(count)]
    contest = Contest(case, mode, sets)
    contestants = {"diffcore": contest.diffcore, "eager": contest.eager}
    if case.out and mode == "forward":
        contestants["out="] = contest.into()
    others = {name: calls[0] for name, calls in contestants.items() if name != "eager"}
    errors = check_contest(contest, others)
    compiled = run.compiler.calls(contest)
    if compiled is not None:
        contestants["compile"] = compiled
        errors |= compiled_error(contest, compiled[0])
    elements = math.prod(shape)
    moved = case.bytes_per_element(kind)
    if mode != "forward":
        moved += case.bytes_per_element(kind, backward=True)
    contestants["copy"] = copy_calls(moved * elements, count, device)
    timings = interleave(contestants, device, run.budget(cpu, 0.15))
    return {
        "op": case.name,
        "mode": mode,
        "dtype": dtype,
        "shape": list(shape),
        "elements": elements,
        "bytes": moved * elements,
        "exp": case.has_exp,
        "input_sets": count,
        "error_over_bound": errors,
        **derived(timings, elements, moved * elements),
    }


def compiled_error(contest: Contest, call: Call) -> dict[str, float]:
    """The error of ``torch.compile`` over what is allowed; it is timed whatever that is."""
    try:
        return {"compile": check_contest(contest, {"compile": call})["compile"]}
    except WrongResultError as error:
        print(f"  kept, though outside the bound: {error}", file=sys.stderr)
        return {"compile": math.inf}


def chosen(run: Run) -> list[OpCase]:
    """The cases of a run."""
    return [BY_NAME[name] for name in run.only if name in BY_NAME] or [BY_NAME[x] for x in OPS]


def jobs(run: Run) -> Iterator[Job]:
    """The "ops" section: every op, dtype, shape and mode."""
    shapes = run.shapes(SHAPES[run.device.type], QUICK)
    dtypes = run.dtypes("f32", "bf16", "f16")
    grid = itertools.product(shapes, dtypes, chosen(run), MODES)
    return jobs_of(((case, mode, d, shape) for shape, d, case, mode in grid), run)


def jobs_of(
    grid: Iterable[tuple[OpCase, str, str, Shape]], run: Run, cpu: float = 1.0
) -> Iterator[Job]:
    """A job for each case with its mode, dtype and shape."""
    for case, mode, dtype, shape in grid:
        what = f"{case.name} {mode} {dtype} {times(shape)}"
        yield Job(case.name, what, partial(time_op, case, mode, dtype, shape, run, cpu))


def jobs_of_cases(
    cases: Callable[[], Sequence[OpCase]],
    shapes: Sequence[Shape],
    run: Run,
    modes: Sequence[str] = MODES[:1],
) -> Iterator[Job]:
    """A section of a few cases at shapes of its own."""
    dtypes = run.dtypes("f32", "bf16")
    grid = itertools.product(run.shapes(shapes, QUICK), dtypes, modes, cases())
    return jobs_of(((case, mode, dtype, shape) for shape, dtype, mode, case in grid), run, 3.0)


def jobs_by_size(run: Run) -> Iterator[Job]:
    """The "sizes" section: a few ops from small tensors to large ones."""
    dtype = run.dtypes("f32")[0]
    shapes: tuple[Shape, ...] = SIZES[: 3 if run.quick else None]
    if run.sweep:  # at most 64 samples
        shapes = tuple((b, n // b) for n in SWEEP for b in [max(1, min(64, n // 1024))])
    if run.shape:
        shapes = tuple(run.shape)
    free = free_bytes(run.device)
    grid = []
    for shape, (name, mode) in itertools.product(shapes, SIZED.items()):
        needed = memory_needed(BY_NAME[name], shape, DTYPES[dtype], run.device)
        if needed < free / 2:  # others use this machine too
            grid.append((BY_NAME[name], mode, dtype, shape))
        else:
            run.note(
                f"{name} of {times(shape)} was left out: it takes about {needed / 2**30:.0f} GiB, "
                f"{free / 2**30:.0f} GiB are free"
            )
    return jobs_of(grid, run, 0.5)


def memory_needed(case: OpCase, shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes of a row: the inputs, what eager makes of them, and the check in float64.

    Args:
        case: what is called.
        shape: of its tensors.
        dtype: of the same.
        device: of the same.
    """
    tensors = len(case.tensors)
    each = dtype.itemsize * (tensors * input_sets(case, shape, dtype, device) + 12)
    return math.prod(shape) * float(each + 8 * (4 * tensors + 8))  # as measured, of normal_kl


def free_bytes(device: torch.device) -> float:
    """Bytes that can still be allocated; without a bound where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf
