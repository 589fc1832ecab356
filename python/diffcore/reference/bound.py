"""The variational bound in plain PyTorch: its terms, and the discretised Gaussian. Nats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.reference import Coef, _row_sum, compute_dtype, expm1_minus, per_sample

BIN = 1 / 255  # half the distance of two values of a pixel, k/127.5 - 1
OPEN = 0.999  # beyond it the bin of a pixel has no other end


def _discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log of the mass of N(means, exp(log_scales)²) in the bin of x, exact in both tails.

    In float64, whatever comes: bins much narrower than the scale would cancel. With z = (x - mean)
    / scale and h half a bin, folded to z >= 0 where both ends are closed, the bin is lo .. hi; with
    Q(z) = e^{-z²/2} erfcx(z / sqrt 2) / 2 it holds Q(lo) - Q(hi), and 1 - Q(-lo) - Q(hi) where it
    straddles the mean.
    """
    delta, inverse = (x - means).double(), torch.exp(-log_scales.double())
    delta = x.double() - means.double()
    is_open = x.abs() > OPEN
    away = torch.where(x < -OPEN, -delta, torch.where(is_open, delta, delta.abs()))
    lo = (away - BIN) * inverse
    b2 = 2 * BIN * away * inverse * inverse  # (hi² - lo²) / 2
    hi = (away + BIN) * inverse
    # The branch not taken must not poison the gradient: it sees harmless numbers instead.
    tail = lo >= 0
    q_hi = torch.where(is_open, 0.0, 0.5 * torch.special.erfcx(hi.clamp_min(0) / math.sqrt(2)))
    q_lo = 0.5 * torch.special.erfcx(lo.abs() / math.sqrt(2))
    decay = torch.exp(-torch.where(is_open, torch.zeros_like(b2), b2))
    inside = q_lo - q_hi * decay
    log_tail = -0.5 * lo * lo + torch.log(torch.where(tail, inside, torch.ones_like(inside)))
    outside = torch.exp(-0.5 * lo * lo) * (q_lo + q_hi * decay)
    log_rest = torch.log1p(-torch.where(tail, torch.zeros_like(outside), outside))
    return torch.where(tail, log_tail, log_rest).to(x.dtype)


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
    discretized = -_discretized_gaussian_log_likelihood(x, x - error, -0.5 * d)
    terms = torch.where(decoder == 0, terms, discretized)
    if isinstance(scale, Tensor):
        scale = scale.to(compute).double()
    return _row_sum(terms, scale, whole=False).to(compute)


def prior_kl(x0: Tensor, factor: Coef, offset: Coef) -> Tensor:
    """``factor Σ x_0² + n offset`` of each sample."""
    x = x0.to(compute_dtype(x0.dtype))
    n = x[0].numel() if x.ndim else 1
    return _row_sum(x * x, factor, whole=False) + n * offset
