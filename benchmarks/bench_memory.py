"""Peak memory of a call beyond its inputs: the intermediate tensors that a fused op avoids."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from .bench_ops import QUICK
from .contest import BY_NAME, Contest, make_inputs
from .suite import DTYPES, Job, Row, Run, Shape, times
from .timing import Call

OPS = (
    ("ddpm_step_guided", "forward"),
    ("normal_kl_sample", "forward+backward"),
    ("reparameterize_kl", "forward+backward"),
    ("denoising_loss_v_prediction", "forward+backward"),
)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that a call holds at once beyond what was held before it.

    Args:
        call: run twice, measured once.
        device: where it allocates: torch's allocator tells on CUDA, torch's profiler on the CPU.

    Returns:
        Bytes, its results included; None where torch cannot tell.
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return peak
    return _profiled_peak(call)


def _profiled_peak(call: Call) -> int | None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = call()
    del kept
    try:
        events = profile.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    except AttributeError:  # not a public interface
        return None
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def measure(name: str, mode: str, dtype: str, shape: Shape, run: Run) -> list[Row]:
    """One row: diffcore and eager; none, and a note, where torch cannot tell.

    Args:
        name: of the op.
        mode: "forward" or "forward+backward".
        dtype: of the elementwise tensors, by its short name.
        shape: of the elementwise tensors.
        run: where.
    """
    case, kind = BY_NAME[name], DTYPES[dtype]
    contest = Contest(case, mode, [make_inputs(case, shape, kind, run.device)])
    calls = {"diffcore": contest.diffcore[0], "eager": contest.eager[0]}
    peaks = {k: peak_bytes(call, run.device) for k, call in calls.items()}
    if None in peaks.values():
        run.note("this torch does not tell how much memory a call held")
        return []
    size = kind.itemsize * math.prod(shape) * len(case.tensors)
    what = {"op": name, "mode": mode, "dtype": dtype, "shape": list(shape)}
    return [{**what, "input_bytes": size, "peak_bytes": peaks}]


def jobs(run: Run) -> Iterator[Job]:
    """The "memory" section."""
    for shape in run.shapes([(64, 3, 128, 128)], QUICK):
        for dtype in run.dtypes("f32"):
            for name, mode in OPS:
                what = f"{name} {mode} {dtype} {times(shape)}"
                yield Job(name, what, partial(measure, name, mode, dtype, shape, run))
