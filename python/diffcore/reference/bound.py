"""The terms of the variational bound. Nats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore._devices import in_float64
from diffcore._types import Coef, VlbColumns
from diffcore.reference.common import compute_dtype, per_sample, row_sum, sample_size
from diffcore.reference.gaussian import expm1_minus, square_times_exp
from diffcore.reference.likelihood import discretized_term

__all__ = ["prior_kl", "vlb_term"]


def vlb_term(
    x0: Tensor,
    given: Tensor,
    model_output: Tensor,
    coefs: Sequence[Coef],
    scale: Coef = 1.0,
    *,
    variance_output: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A term of the bound for each sample; coefs as in ``VlbColumns``.

    With e = b_0 x_0 + b_g given + b_m m, the error of the predicted x_0, after the clip: scale
    times the sum of ``factor e² + offset``; with a learned variance, d = d_0 + d_low - d_v v, of
    ``(expm1(d) - d) / 2`` (``-d / 2`` where kl is 0) ``+ factor e² exp(d) + offset``; and where
    decoder is not 0, of minus the discretized log-likelihood under N(x_0 - e, exp(-d)). With a
    mask, of these times the mask; where it is 0, of nothing.
    """
    dropped = None if mask is None else mask == 0
    if dropped is not None:  # here too, because 0 times an infinite number would reach a gradient
        x0, given, model_output = (y.masked_fill(dropped, 0) for y in (x0, given, model_output))
        if variance_output is not None:
            variance_output = variance_output.masked_fill(dropped, 0)
    # Coefficients as the kernels read them, rounded to the compute type; then double throughout.
    compute = compute_dtype(x0.dtype)
    k = VlbColumns(
        *(
            in_float64(torch.as_tensor(per_sample(c, x0), dtype=compute, device=x0.device))
            for c in coefs
        )
    )
    x = in_float64(x0)
    b_0, b_g, b_m = k.b_0 + k.b_0_low, k.b_g + k.b_g_low, k.b_m + k.b_m_low
    error = b_0 * x + b_g * in_float64(given) + b_m * in_float64(model_output)
    most, least = x - k.clip_min, x - k.clip_max
    # As in the steps: where, not clamp.
    error = torch.where(error > most, torch.zeros_like(error) + most, error)
    error = torch.where(error < least, torch.zeros_like(error) + least, error)
    # On the device of the samples, whatever torch's default device is.
    has_density = torch.as_tensor(k.decoder == 0, device=x.device)
    if variance_output is None:
        terms = k.factor * error**2 + k.offset
        d = k.d_0 + torch.zeros_like(error)
    else:
        d = k.d_0 - k.d_v * in_float64(variance_output) + k.d_low
        is_kl = torch.as_tensor(k.kl != 0, device=x.device)
        ratio = torch.where(is_kl, expm1_minus(d), -d)
        # Where the decoder is discretized this is not read, and must not overflow.
        safe = torch.where(has_density, d, torch.zeros_like(d))
        terms = 0.5 * ratio + square_times_exp(k.factor * error**2, safe) + k.offset
    discretized = -discretized_term(x, x - error, -0.5 * d)
    terms = torch.where(has_density, terms, discretized)
    if mask is not None and dropped is not None:
        terms = (in_float64(mask) * terms).masked_fill(dropped.to(terms.device), 0)
    if isinstance(scale, Tensor):
        scale = in_float64(scale.to(compute))
    return row_sum(terms, scale, reduce_all=False).to(compute).to(x0.device)


def prior_kl(x0: Tensor, factor: Coef, offset: Coef) -> Tensor:
    """``factor Σ x_0² + n offset`` of each sample."""
    x = x0.to(compute_dtype(x0.dtype))
    n = sample_size(x)
    if isinstance(offset, Tensor):  # as the kernel reads it
        offset = offset.to(x.dtype)
    return row_sum(x * x, factor, reduce_all=False) + n * offset
