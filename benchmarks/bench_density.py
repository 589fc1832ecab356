"""Times the log-probability of a step and the KL of two, against eager and ``torch.compile``.

What policy gradients compute for every step of every sample: the value where the samples are drawn,
the value and its gradient where the model is trained. Eager PyTorch computes the mean of the step
and its log-density, as trl's and flow_grpo's pipelines do.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from diffcore import ops

from .bench_ops import jobs_of_cases
from .contest import MODES, OpCase

SHAPES = ((64, 4, 64, 64), (64, 3, 128, 128))
# A row in the middle of a schedule of DDIM with eta = 1: mean = c_x x + c_0 clip(a_x x + a_m m).
C_X, C_0, C_Z, A_X, A_M, LIMIT = 0.72, 0.26, 0.31, 1.45, -1.05, 10.0
ROW = (C_X, 0.0, C_0, C_Z, A_X, A_M, -LIMIT, LIMIT)
SCALE = 5.0


def _guided(x: Any, model_output: Any, model_output_uncond: Any, x_next: Any) -> Any:
    guidance = {"model_output_uncond": model_output_uncond, "guidance_scale": SCALE}
    return ops.step_log_prob(x, model_output, x_next, ROW, **guidance)


def _mean(x: Any, m: Any) -> Any:
    return C_X * x + C_0 * (A_X * x + A_M * m).clip(-LIMIT, LIMIT)


def _log_prob(xp: Any, x: Any, model_output: Any, x_next: Any, **_: Any) -> Any:
    z = (x_next - _mean(x, model_output)) / C_Z
    terms = -0.5 * z**2 - math.log(C_Z) - 0.5 * math.log(2 * math.pi)
    return terms.reshape(len(x), -1).sum(1)


def _log_prob_guided(
    xp: Any, x: Any, model_output: Any, model_output_uncond: Any, x_next: Any
) -> Any:
    m = model_output_uncond + SCALE * (model_output - model_output_uncond)
    return _log_prob(xp, x, m, x_next)


def _kl(xp: Any, x: Any, model_output: Any, reference_output: Any, **_: Any) -> Any:
    z = (_mean(x, model_output) - _mean(x, reference_output)) / C_Z
    return (0.5 * z**2).reshape(len(x), -1).sum(1)


def cases() -> list[OpCase]:
    """The log-probability, the same with guidance, and the KL."""
    row = {"coefficients": ROW}
    outputs = ("model_output", "model_output_uncond")
    rows: list[tuple[str, Any, tuple[str, ...], Any, dict[str, Any]]] = [
        ("log-prob", ops.step_log_prob, ("x", outputs[0], "x_next"), _log_prob, row),
        ("log-prob, guided", _guided, ("x", *outputs, "x_next"), _log_prob_guided, {}),
        ("KL of two steps", ops.step_kl, ("x", outputs[0], "reference_output"), _kl, row),
    ]
    return [
        OpCase(name, op, named, formula, lambda _, o=o: o, tuple(x for x in named if x in outputs))
        for name, op, named, formula, o in rows
    ]


jobs = partial(jobs_of_cases, cases, SHAPES, modes=MODES)
