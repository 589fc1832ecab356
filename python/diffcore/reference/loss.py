"""Denoising losses and the gradient that they make in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore._types import Coef
from diffcore.reference.common import compute_dtype, per_sample, row_sum

__all__ = ["mixed_target_loss", "target_loss"]


def target_loss(
    model_output: Tensor,
    target: Tensor,
    weight: Coef,
    inverse_n: Coef,
    slope: Coef = 0.0,
) -> tuple[Tensor, Tensor]:
    """``weight inverse_n Σ (m - target)²``, after ``2 weight slope (m - target)``.

    The first is the gradient, slope being inverse_n times the upstream one; where slope is 0 it is
    the error alone.
    """
    compute = compute_dtype(model_output.dtype)
    return _loss(
        model_output, model_output.to(compute) - target.to(compute), weight, inverse_n, slope
    )


def mixed_target_loss(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    weight: Coef,
    inverse_n: Coef,
    a: Coef,
    b: Coef,
    slope: Coef = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same for the target ``a x_0 + b noise``."""
    compute = compute_dtype(model_output.dtype)
    a, b = per_sample(a, model_output), per_sample(b, model_output)
    error = model_output.to(compute) - (a * x0.to(compute) + b * noise.to(compute))
    return _loss(model_output, error, weight, inverse_n, slope)


def _loss(
    like: Tensor, error: Tensor, weight: Coef, inverse_n: Coef, slope: Coef
) -> tuple[Tensor, Tensor]:
    slope = per_sample(slope, like)
    unit = torch.as_tensor(slope, device=error.device) == 0
    gradient = torch.where(unit, 1.0, 2 * slope * per_sample(weight, like)) * error.detach()
    if isinstance(weight, Tensor):
        weight = weight.to(compute_dtype(like.dtype))
    return gradient.to(like.dtype), row_sum(error**2, weight * inverse_n, reduce_all=False)
