"""Times the threshold of dynamic thresholding against ``torch.quantile``, which sorts.

Eager PyTorch first has to write x0 and its magnitudes to memory. The copy moves the bytes that are
read once; diffcore reads them more than once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from diffcore import ops

from .bench_ops import jobs_of_cases
from .contest import OpCase

SHAPES = ((16, 3, 256, 256), (16, 4, 64, 64), (4, 3, 1024, 1024))
A_X, A_M, GUIDANCE = 1.25, -0.75, 3.0
RATIO, LARGEST = 0.995, 10.0


def _formula(
    xp: Any, x: Any, model_output: Any, model_output_uncond: Any = None, **options: Any
) -> Any:
    m = model_output
    if model_output_uncond is not None:
        m = model_output_uncond + GUIDANCE * (m - model_output_uncond)
    x0 = A_X * x + A_M * m
    if x0.dtype not in (torch.float32, torch.float64):
        x0 = x0.float()  # quantile takes no other
    return xp.quantile(x0.abs().flatten(1), RATIO, dim=1).clamp(1, LARGEST)


def cases() -> list[OpCase]:
    """Without and with guidance."""
    coefficients = torch.tensor([0.0, 0.0, 0.0, 0.0, A_X, A_M, 0.0, 0.0], dtype=torch.float64)
    common = {"coefficients": coefficients, "ratio": RATIO, "sample_max_value": LARGEST}
    op, tensors = ops.dynamic_threshold, ("x", "model_output")
    guided = {**common, "guidance_scale": GUIDANCE}
    return [
        OpCase("dynamic_threshold", op, tensors, _formula, lambda b: common, ()),
        OpCase(
            "dynamic_threshold_guided",
            op,
            (*tensors, "model_output_uncond"),
            _formula,
            lambda b: guided,
            (),
        ),
    ]


jobs = partial(jobs_of_cases, cases, SHAPES)
