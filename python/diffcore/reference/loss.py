"""Denoising losses and the gradient that they make in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore._types import Coef, Tensors
from diffcore.reference.common import compute_dtype, elementwise, per_sample, row_sum

__all__ = [
    "masked_loss",
    "mixed_target_loss",
    "robust_error",
    "robust_loss_gradient",
    "squared_error",
    "target_loss",
]


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
    return _loss(model_output, m - _mixed(a, x, b, e), weight, inverse_n, slope, q)


def robust_error(error: Tensor, delta: Coef, smooth: bool) -> Tensor:
    """Pseudo-Huber, ``2 delta (sqrt(error² + delta²) - delta)``, or torch's smooth L1."""
    size = error.abs()
    if smooth:
        return torch.where(size <= delta, 0.5 * size * (size / delta), size - 0.5 * delta)
    # No square, which could overflow, and no difference, which would cancel.
    length = torch.hypot(error, torch.as_tensor(delta, dtype=error.dtype, device=error.device))
    return 2 * delta * error * (error / (length + delta))


def robust_loss_gradient(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    weight: Coef,
    inverse_n: Coef,
    a: Coef,
    b: Coef,
    delta: Coef,
    smooth: Coef,
    slope: Coef = 0.0,
) -> tuple[Tensor, Tensor]:
    """``weight inverse_n Σ rho(m - a x_0 - b noise)``, after its gradient as in ``target_loss``.

    Where slope is 0 it is half the derivative of rho. rho is smooth L1 where ``smooth`` is not 0,
    otherwise pseudo-Huber; see ``robust_error``.
    """
    compute = compute_dtype(model_output.dtype)
    m, x, e = (y.to(compute) for y in (model_output, x0, noise))
    a, b, delta = (per_sample(c, model_output) for c in (a, b, delta))
    error = m - _mixed(a, x, b, e)
    value = robust_error(error, delta, bool(smooth))
    with torch.no_grad():
        if smooth:
            half = 0.5 * torch.clamp(error / delta, -1.0, 1.0)
        else:
            limit = torch.as_tensor(delta, dtype=compute, device=error.device)
            half = delta * (error / torch.hypot(error, limit))
    return _with_gradient(model_output, half, value, weight, inverse_n, slope)


def robust_terms(
    tensors: Tensors,
    weight: Coef,
    target: tuple[Coef, Coef],
    mask: Tensor | None,
    robust: tuple[Coef, bool],
    share: Coef | None,
) -> Tensor:
    """``weight q rho(m - a x_0 - b noise)`` of each element, as in ``squared_error``.

    Args:
        tensors: m, x_0, noise.
        weight: A number, or ``[B]``.
        target: a and b.
        mask: q, like m; ``None`` for 1.
        robust: delta, a number or ``[B]``, and whether rho is smooth L1.
        share: ``None``, or what the sum over each sample is multiplied with: a number or ``[B]``.

    Returns:
        ``[B, ...]`` in the dtype of m, or the sum of each sample, in that computed in.
    """
    like = tensors[0]
    compute = compute_dtype(like.dtype)
    inputs = [x.to(compute) for x in tensors]
    if mask is not None:
        inputs = [x.masked_fill(mask == 0, 0.0) for x in inputs]
    m, x, e = inputs
    by = 1.0 if share is None else share
    w, by, delta, a, b = (per_sample(c, like) for c in (weight, by, robust[0], *target))
    terms = w * by * robust_error(m - _mixed(a, x, b, e), delta, robust[1])
    if mask is not None:
        terms = mask.to(compute) * terms
    return terms.to(like.dtype) if share is None else row_sum(terms, 1.0, reduce_all=False)


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


def _mixed(a: Coef, x0: Tensor, b: Coef, noise: Tensor) -> Tensor:
    """``a x_0 + b noise``; where a is 0, x_0 has no part in it."""
    absent = torch.as_tensor(a, device=x0.device) == 0
    return torch.where(absent, torch.zeros_like(x0), a * x0) + b * noise


def _loss(
    like: Tensor,
    error: Tensor,
    weight: Coef,
    inverse_n: Coef,
    slope: Coef,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    counted = error if mask is None else mask * error
    squares = error**2 if mask is None else counted * error
    return _with_gradient(like, counted.detach(), squares, weight, inverse_n, slope)


def _with_gradient(
    like: Tensor, half: Tensor, terms: Tensor, weight: Coef, inverse_n: Coef, slope: Coef
) -> tuple[Tensor, Tensor]:
    """The gradient, from half the derivative of each term, and the weighted sum of the terms."""
    slope = per_sample(slope, like)
    unit = torch.as_tensor(slope, device=half.device) == 0
    gradient = torch.where(unit, 1.0, 2 * slope * per_sample(weight, like)) * half
    compute = compute_dtype(like.dtype)
    weight, inverse_n = (c.to(compute) if isinstance(c, Tensor) else c for c in (weight, inverse_n))
    return gradient.to(like.dtype), row_sum(terms, weight * inverse_n, reduce_all=False)
