"""Peak memory of a call beyond its inputs: the intermediate tensors that a fused op avoids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.contest import BY_NAME, Contest, make_inputs
from benchmarks.timing import Call

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


def measure(device: torch.device, shape: Sequence[int]) -> dict[str, Any]:
    """The "memory" section: float32, diffcore and eager.

    Args:
        device: where.
        shape: of the elementwise tensors.
    """
    rows = []
    for name, mode in OPS:
        case = BY_NAME[name]
        args = make_inputs(case, shape, torch.float32, device)
        contest = Contest(case, mode, [args])
        peaks = {
            "diffcore": peak_bytes(contest.diffcore[0], device),
            "eager": peak_bytes(contest.eager[0], device),
        }
        if None in peaks.values():
            return {"rows": [], "notes": ["this torch does not tell how much memory a call held"]}
        rows.append(
            {
                "op": name,
                "mode": mode,
                "dtype": "f32",
                "shape": list(shape),
                "input_bytes": 4 * math.prod(shape) * len(case.tensors),
                "peak_bytes": peaks,
            }
        )
    return {"rows": rows, "notes": []}
