"""The threshold of dynamic thresholding."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from diffcore._checks import check_dense
from diffcore._engine.dispatch import run
from diffcore._kernels.step import PLAIN
from diffcore._kernels.threshold import X0_QUANTILE
from diffcore._types import Coef, Row, Step
from diffcore.guidance import Guidance
from diffcore.ops._arguments import converted, float_of
from diffcore.ops._guided import guided_by, predictions
from diffcore.ops._launch import step_columns

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
    guidance: Guidance | None = None,
) -> Tensor:
    """The threshold of each sample: ``s = min(max(quantile(|x0|, ratio), 1), sample_max_value)``.

    x0 is the prediction of a reverse step with the same arguments, before its clip: ``x0 = a_x x +
    a_m m``, with m as in :func:`reverse_step` under guidance. Of n elements in order, the quantile
    is the one at ``ratio (n - 1)`` from the first, and between two it is linear. It is found by
    counting, not by sorting; n may be any.

    The threshold is a constant for autograd. A sample with a NaN has the threshold NaN.

    Args:
        x: The current samples ``[B, ...]``.
        model_output: m, or m_c under guidance, ``[B, ...]``.
        coefficients: As for :func:`reverse_step`; only a_x and a_m count.
        t: The row: an int, ``[B]`` or a one-element counter.
        ratio: Which quantile, in [0, 1].
        sample_max_value: The largest threshold, at least 1.
        model_output_uncond: m_u ``[B, ...]``, for classifier-free guidance.
        guidance_scale: w of classifier-free guidance, a number or ``[B]``.
        guidance: Another rule of ``diffcore.guidance``, instead of ``guidance_scale``.

    Returns:
        The thresholds ``[B]``, float32 (float64 for float64 inputs).

    Source:
        Saharia et al. 2022 (Imagen), section 2.3.
    """
    p, most = float_of("ratio", ratio), float_of("sample_max_value", sample_max_value)
    if not 0 <= p <= 1:
        raise ValueError(f"ratio must be in [0, 1], got {p}")
    if not most >= 1:
        raise ValueError(f"sample_max_value must be at least 1, got {most}")
    if isinstance(x, Tensor) and x.is_nested:
        check_dense("x", x)
    if isinstance(x, Tensor) and x.ndim and not x.shape[1:].numel():
        raise ValueError(f"x must have at least one element per sample, got shape {tuple(x.shape)}")
    given = (model_output_uncond, guidance_scale, guidance)
    model_output, guided = guided_by(x, model_output, *given, plus_plus=True, remember=False)
    tensors, leading = predictions(x, model_output, guided, None)
    coefs = (*leading, *step_columns(coefficients, PLAIN), p, most)
    kernel = X0_QUANTILE[len(tensors) == 3]
    inputs, constants = tuple(map(_constant, tensors)), tuple(map(_constant, coefs))
    try:
        return run(kernel, inputs, constants, t)
    except TypeError as error:
        constants, t = converted(error, constants, t, x)
    return run(kernel, inputs, constants, t)


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
