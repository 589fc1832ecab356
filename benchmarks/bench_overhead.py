"""Times what a call costs the host, on 64 elements: of every op, and of the parts of one.

On CUDA the time ends when the work is enqueued.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from diffcore import ops
from diffcore._engine import native
from diffcore._kernels.linear import LINEAR_COMBINATION

from .bench_ops import chosen
from .contest import Contest, OpCase, bound, make_inputs
from .suite import Job, Row, Run, timings_of
from .timing import call_overhead

SHAPE = (4, 16)
NEEDED = "forward, gradient needed"


def time_call(case: OpCase, mode: str, run: Run) -> Row:
    """One row.

    Args:
        case: what is called.
        mode: "forward", "forward, gradient needed" or "forward+backward".
        run: where and how long.
    """
    args = make_inputs(case, SHAPE, torch.float32, run.device)
    if mode == NEEDED:
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
    timings = call_overhead(calls, run.device, run.budget(0.3, rounds=5))
    return {
        "op": case.name,
        "mode": mode,
        "elements": math.prod(SHAPE),
        "timings": timings_of(timings),
        "times_eager": timings["eager"].median / timings["diffcore"].median,
    }


def jobs(run: Run) -> Iterator[Job]:
    """The "overhead" section: every op in three modes."""
    for case in chosen(run):
        for mode in ("forward", NEEDED, "forward+backward"):
            yield Job(case.name, f"{case.name} {mode}", partial(time_call, case, mode, run))


def parts(device: torch.device) -> dict[str, Callable[[], object]]:
    """The parts of one call of ``add_noise``, from the inside out, and what torch takes."""
    x, z = torch.randn(2, 4, 16, device=device)
    assert native._C is not None
    launch, index = native._C.launch, LINEAR_COMBINATION.reading.index
    inputs, coefs = (x, z), (0.8, 0.6)
    return {
        "a Python function that does nothing": lambda: None,
        "torch: the number of active modes, once": torch._C._len_torch_dispatch_stack,
        "torch: x.is_neg()": x.is_neg,
        "torch: empty_like(x), the output": lambda: torch.empty_like(x),
        "module: what torch is asked before each launch": lambda: launch(
            index, inputs, coefs, None, None, True
        ),
        "module: the call": lambda: launch(index, inputs, coefs, None, None, False),
        "add_noise(x, z, 0.8, 0.6)": lambda: ops.add_noise(x, z, 0.8, 0.6),
        "torch: 0.8 * x + 0.6 * z": lambda: 0.8 * x + 0.6 * z,
    }


def time_parts(run: Run) -> list[Row]:
    """A row for each part."""
    found = timings_of(call_overhead(parts(run.device), run.device, run.budget(3.0)))
    return [{"what": what, **timing} for what, timing in found.items()]


def jobs_of_parts(run: Run) -> list[Job]:
    """The "call" section; without the compiled module there is nothing to take apart."""
    if not native.has_kernels(run.device):
        return []
    return [Job("add_noise", "the parts of a call", partial(time_parts, run))]
