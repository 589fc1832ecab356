"""Times a guided step of DPM-Solver++ (2M) against eager PyTorch and ``torch.compile``.

Classifier-free guidance is part of the step. A rule that depends on the predictions reads both of
them twice, in two launches; the copy moves the bytes of both.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffcore import ops
from diffcore.guidance import APG, CFG, Guidance, RescaledCFG

from .bench_ops import jobs_of_cases
from .contest import OpCase

SHAPES = ((64, 3, 128, 128), (16, 4, 64, 64))
# A row of dpmpp_2m_table in the middle of a schedule: c_x, c_0, c_1, and x0 = a_x x + a_m m.
C_X, C_0, C_1, A_X, A_M = 0.72, 0.61, -0.14, 1.45, -1.05
ROW = (C_X, 0.0, C_0, 0.0, A_X, A_M, -10.0, 10.0, 0.0, 0.0, 1.0, C_1, 0.0, 0.0)
RULES: dict[str, Guidance] = {
    "cfg": CFG(5.0),
    "rescaled": RescaledCFG(5.0, 0.7),
    "apg": APG(5.0, 0.2, 20.0),
}


def _step(
    x: Any, model_output: Any, model_output_uncond: Any, history_1: Any, guidance: Guidance
) -> Any:
    return ops.reverse_step(
        x,
        model_output,
        ROW,
        model_output_uncond=model_output_uncond,
        history=[history_1],
        return_history=True,
        guidance=guidance,
    )


def _formula(
    xp: Any,
    x: Any,
    model_output: Any,
    model_output_uncond: Any,
    history_1: Any,
    guidance: Guidance,
) -> Any:
    c, u = model_output, model_output_uncond
    number = lambda y: y.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731 - of each sample
    flat = lambda y: y.reshape(len(y), -1)  # noqa: E731
    m = u + 5.0 * (c - u)
    if isinstance(guidance, RescaledCFG):
        rescaled = m * number(flat(c).std(1) / flat(m).std(1))
        m = 0.7 * rescaled + 0.3 * m
    elif isinstance(guidance, APG):
        d = c - u
        length = (flat(d) ** 2).sum(1) ** 0.5
        d = d * number((20.0 / length).clip(None, 1.0))
        along = number((flat(d) * flat(c)).sum(1) / (flat(c) ** 2).sum(1)) * c
        m = c + 4.0 * (d - along + 0.2 * along)
    x0 = (A_X * x + A_M * m).clip(-10.0, 10.0)
    return C_X * x + C_0 * x0 + C_1 * history_1, x0


def cases() -> list[OpCase]:
    """One for each rule."""
    tensors = ("x", "model_output", "model_output_uncond", "history_1")
    return [
        OpCase(f"2M, {name}", _step, tensors, _formula, lambda b, r=rule: {"guidance": r}, ())
        for name, rule in RULES.items()
    ]


jobs = partial(jobs_of_cases, cases, SHAPES)
