"""The terms of the variational bound. Nats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore._types import Coef
from diffcore.reference.common import compute_dtype, per_sample, row_sum
from diffcore.reference.gaussian import expm1_minus
from diffcore.reference.likelihood import discretized_term


def vlb_term(
    x0: Tensor,
    given: Tensor,
    model_output: Tensor,
    coefs: Sequence[Coef],
    scale: Coef = 1.0,
    *,
    variance_output: Tensor | None = None,
) -> Tensor:
    """A term of the bound for each sample; coefs as in ``bound_coefficients.VLB_COLUMNS``.

    With e = b_0 x_0 + b_g given + b_m m, the error of the predicted x_0, after the clip: scale
    times the sum of ``factor e² + offset``; with a learned variance, d = d_0 + d_low - d_v v, of
    ``(expm1(d) - d) / 2`` (``-d / 2`` where kl is 0) ``+ factor e² exp(d) + offset``; and where
    decoder is not 0, of minus the discretised log-likelihood under N(x_0 - e, exp(-d)).
    """
    # Coefficients as the kernels read them, rounded to the compute type; then double throughout.
    compute = compute_dtype(x0.dtype)
    k = [
        torch.as_tensor(per_sample(c, x0), dtype=compute, device=x0.device).double() for c in coefs
    ]
    x = x0.double()
    b_0, b_g, b_m = (high + low for high, low in zip(k[0:3], k[3:6], strict=True))
    error = b_0 * x + b_g * given.double() + b_m * model_output.double()
    most, least = (x - bound for bound in (k[6], k[7]))
    # As in the steps: where, not clamp.
    error = torch.where(error > most, torch.zeros_like(error) + most, error)
    error = torch.where(error < least, torch.zeros_like(error) + least, error)
    decoder, factor, offset, d = k[8:12]
    if variance_output is None:
        terms = factor * error**2 + offset
        d = d + torch.zeros_like(error)
    else:
        d_low, d_v, kl = k[12:15]
        d = d - d_v * variance_output.double() + d_low
        spread = torch.where(kl != 0, expm1_minus(d), -d)
        # Where the decoder is discretised this is not read, and must not overflow.
        safe = torch.where(decoder == 0, d, torch.zeros_like(d))
        terms = 0.5 * spread + factor * error**2 * torch.exp(safe) + offset
    discretized = -discretized_term(x, x - error, -0.5 * d)
    terms = torch.where(decoder == 0, terms, discretized)
    if isinstance(scale, Tensor):
        scale = scale.to(compute).double()
    return row_sum(terms, scale, whole=False).to(compute)


def prior_kl(x0: Tensor, factor: Coef, offset: Coef) -> Tensor:
    """``factor Σ x_0² + n offset`` of each sample."""
    x = x0.to(compute_dtype(x0.dtype))
    n = x[0].numel() if x.ndim else 1
    return row_sum(x * x, factor, whole=False) + n * offset
