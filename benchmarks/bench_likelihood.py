"""Times the exact discretized likelihood against the usual approximation and the exact formula.

``eager`` and ``compile`` approximate Φ by a tanh, clamped at 1e-12, with the formula of OpenAI's
improved-diffusion and guided-diffusion; they are not exact, and not checked. ``exact, eager`` and
``exact, compile`` are the exact formula in PyTorch, with ``log_ndtr``. Gradients are with respect
to mean and scale.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from .bench_ops import QUICK
from .contest import (
    BY_NAME,
    MODES,
    Arguments,
    Contest,
    OpCase,
    check_contest,
    input_sets,
)
from .suite import DTYPES, Job, Row, Run, Shape, times, timings_of
from .timing import Call, interleave

SHAPE = (64, 3, 64, 64)
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


def contestants(mode: str, dtype: torch.dtype, shape: Shape, run: Run) -> dict[str, list[Call]]:
    """What is timed, by name.

    Raises:
        WrongResultError: diffcore's result is wrong.
    """
    exact, approximate = (
        Contest(
            case,
            mode,
            [
                inputs(case, shape, dtype, run.device, seed)
                for seed in range(input_sets(case, shape, dtype, run.device))
            ],
        )
        for case in (EXACT, APPROXIMATE)
    )
    check_contest(exact, {})
    found = {"diffcore": exact.diffcore, "eager": approximate.eager, "exact, eager": exact.eager}
    for name, contest in (("compile", approximate), ("exact, compile", exact)):
        compiled = run.compiler.calls(contest)
        if compiled is not None:
            found[name] = compiled
    return found


def time_likelihood(what: str, mode: str, dtype: str, shape: Shape, run: Run) -> Row:
    """One row."""
    calls = contestants(mode, DTYPES[dtype], shape, run)
    return {"what": what, "timings": timings_of(interleave(calls, run.device, run.budget(3, 0.15)))}


def jobs(run: Run) -> Iterator[Job]:
    """The "likelihood" section."""
    shapes, dtypes = run.shapes([SHAPE], QUICK), run.dtypes("f32", "bf16")
    for shape, dtype, mode in itertools.product(shapes, dtypes, MODES):
        what = f"{mode}, {dtype}, {times(shape)}"
        yield Job(EXACT.name, what, partial(time_likelihood, what, mode, dtype, shape, run))
