"""Compares every op, and eager PyTorch, with the same formula in float64.

The error is a distance relative to the length of the true result, in units of the dtype's epsilon:
one rounding of an exact result gives about 0.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .bench_ops import chosen
from .contest import MODES, Contest, OpCase, as_tuple, check_contest, make_inputs
from .suite import DTYPES, Job, Row, Run, Shape, times

SHAPE = (16, 3, 64, 64)


def relative_error(
    found: Sequence[Tensor | None], truth: Sequence[Tensor | None], dtype: torch.dtype
) -> float:
    """``|y - y*| / |y*| / eps``, with Euclidean norms, the largest of several outputs.

    Args:
        found: y, the outputs of a contestant; None for no gradient, which is zero.
        truth: y*, the same in float64.
        dtype: Whose epsilon.
    """
    worst = 0.0
    for got, true in zip(found, truth, strict=True):
        if true is None or got is None:
            continue
        wide = true.detach().double()
        error = (got.detach().double() - wide).norm() / wide.norm()
        worst = max(worst, float(error) / torch.finfo(dtype).eps)
    return worst


def measure(case: OpCase, mode: str, dtype: str, shape: Shape, run: Run) -> Row:
    """One row.

    Args:
        case: what is called.
        mode: "forward" or "forward+backward".
        dtype: of the elementwise tensors, by its short name.
        shape: of the elementwise tensors.
        run: where.

    Raises:
        WrongResultError: diffcore is further off than twice eager's largest error and an ulp.
    """
    kind = DTYPES[dtype]
    contest = Contest(case, mode, [make_inputs(case, shape, kind, run.device)])
    found = {"diffcore": contest.diffcore[0], "eager": contest.eager[0]}
    compiled = run.compiler.calls(contest)
    if compiled is not None:
        found["compile"] = compiled[0]
    truth = contest.truth()
    errors = {name: relative_error(as_tuple(c()), truth, kind) for name, c in found.items()}
    return {
        "op": case.name,
        "mode": mode,
        "dtype": dtype,
        "shape": list(shape),
        "errors": errors,
        "error_over_bound": check_contest(contest, {})["diffcore"],
    }


def jobs(run: Run) -> Iterator[Job]:
    """The "accuracy" section."""
    dtypes = run.dtype or ("f32", "bf16", "f16")
    shapes = run.shape or [SHAPE]
    for shape, dtype, case, mode in itertools.product(shapes, dtypes, chosen(run), MODES):
        what = f"{case.name} {mode} {dtype} {times(shape)}"
        yield Job(case.name, what, partial(measure, case, mode, dtype, shape, run))
