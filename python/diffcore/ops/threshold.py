"""The threshold of dynamic thresholding."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from diffcore._engine.dispatch import run
from diffcore._kernels.step import PLAIN
from diffcore._kernels.threshold import X0_QUANTILE
from diffcore._types import Coef, Row, Step
from diffcore.ops._arguments import float_of
from diffcore.ops.step import first_columns, leading_of

__all__ = [
    "dynamic_threshold",
]


def dynamic_threshold(
    x: Tensor,
    model_output: Tensor,
    coefficients: Row,
    *,
    t: Step = None,
    ratio: float = 0.995,
    sample_max_value: float = math.inf,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
) -> Tensor:
    """The threshold of each sample: ``s = min(max(quantile(|x0|, ratio), 1), sample_max_value)``.

    x0 is what a reverse step makes of the same arguments, before its clip: ``x0 = a_x x + a_m m``,
    with ``m = m_u + w (m_c - m_u)`` under guidance. Of n elements in order, the quantile is the one
    at ``ratio (n - 1)`` from the first, and between two it is linear. It is found by counting, not
    by sorting; n may be any.

    The threshold is a constant to autograd. A sample with a NaN has the threshold NaN.

    Args:
        x: the current samples `[B, ...]`.
        model_output: m, or m_c under guidance, `[B, ...]`.
        coefficients: as for :func:`reverse_step`; only a_x and a_m count.
        t: the row: an int, `[B]` or a one-element counter.
        ratio: which quantile, in [0, 1].
        sample_max_value: the largest threshold, at least 1.
        model_output_uncond: m_u `[B, ...]`, for classifier-free guidance.
        guidance_scale: w, a number or `[B]`; needed with `model_output_uncond`, and only then.

    Returns:
        The thresholds `[B]`, float32 (float64 for float64 inputs).

    Source: Saharia et al. 2022 (Imagen), section 2.3.
    """
    p, most = float_of("ratio", ratio), float_of("sample_max_value", sample_max_value)
    if not 0 <= p <= 1:
        raise ValueError(f"ratio is {p}; wanted 0 <= ratio <= 1")
    if not most >= 1:
        raise ValueError(f"sample_max_value is {most}; wanted at least 1")
    if isinstance(x, Tensor) and x.ndim and not x.shape[1:].numel():
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted at least one element per sample")
    tensors, leading = leading_of(x, model_output, model_output_uncond, guidance_scale, None)
    coefs = (*leading, *first_columns(coefficients, PLAIN), p, most)
    kernel = X0_QUANTILE[len(tensors) == 3]
    return run(kernel, tuple(map(_constant, tensors)), tuple(map(_constant, coefs)), t)


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
