"""Denoising losses and the gradient that they make in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore._types import Coef, Tensors
from diffcore.reference.common import compute_dtype, elementwise, per_sample, row_sum

__all__ = ["masked_loss", "mixed_target_loss", "squared_error", "target_loss"]


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


def masked_loss(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    mask: Tensor,
    weight: Coef,
    inverse_n: Coef,
    a: Coef,
    b: Coef,
    slope: Coef = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same for each error squared times the mask; where that is 0 nothing else is used."""
    compute = compute_dtype(model_output.dtype)
    q = mask.to(compute)
    # Not after the fact: 0 times an infinite number would reach the gradient.
    m, x, e = (y.to(compute).masked_fill(q == 0, 0.0) for y in (model_output, x0, noise))
    a, b = per_sample(a, model_output), per_sample(b, model_output)
    # Where a is 0, x_0 has no part in the target.
    absent = torch.as_tensor(a, device=m.device) == 0
    target = torch.where(absent, torch.zeros_like(x), a * x) + b * e
    return _loss(model_output, m - target, weight, inverse_n, slope, q)


def squared_error(
    tensors: Tensors, weight: Coef, target: Sequence[Coef], mask: Tensor | None
) -> Tensor:
    """``weight q (m - target)²`` of each element.

    Args:
        tensors: m and the target; or m, x_0 and noise with the two coefficients in ``target``.
        weight: A number, or ``[B]``.
        target: Two coefficients, or none.
        mask: q, like m; ``None`` for 1.
    """
    dropped = None if mask is None else mask == 0

    def formula(*given: Tensor) -> Tensor:
        inputs, w = given[: len(tensors)], given[len(tensors)]
        if dropped is not None:
            inputs = tuple([x.masked_fill(dropped, 0.0) for x in inputs])
        if len(inputs) == 2:
            error = inputs[0] - inputs[1]
        else:
            a, b = given[len(tensors) + 1 :]
            error = inputs[0] - (a * inputs[1] + b * inputs[2])
        counted = error if mask is None else mask.to(error.dtype) * error
        return w * counted * error

    return elementwise(formula, tensors, (weight, *target))


def _loss(
    like: Tensor,
    error: Tensor,
    weight: Coef,
    inverse_n: Coef,
    slope: Coef,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    slope = per_sample(slope, like)
    unit = torch.as_tensor(slope, device=error.device) == 0
    counted = error if mask is None else mask * error
    gradient = torch.where(unit, 1.0, 2 * slope * per_sample(weight, like)) * counted.detach()
    compute = compute_dtype(like.dtype)
    weight, inverse_n = (c.to(compute) if isinstance(c, Tensor) else c for c in (weight, inverse_n))
    squares = error**2 if mask is None else counted * error
    return gradient.to(like.dtype), row_sum(squares, weight * inverse_n, reduce_all=False)
