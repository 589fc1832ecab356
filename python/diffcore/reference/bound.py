"""The variational bound in plain PyTorch: its terms, and the discretised Gaussian. Nats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.reference import Coef, _row_sum, compute_dtype, expm1_minus, per_sample

BIN = 1 / 255  # half the distance of two values of a pixel, k/127.5 - 1
OPEN = 0.999  # beyond it the bin of a pixel has no other end
NARROW = 1 / 32  # of a scale
LOG_SCALES = (-690.0, 345.0)  # 1e300 and 1e-150: whose squares can be told from 0 and nan
LOG_BIN_DENSITY = math.log(2 * BIN / math.sqrt(2 * math.pi))


def _discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log of the mass of N(means, exp(log_scales)²) in the bin of x, exact in both tails.

    In float64, whatever comes: bins much narrower than the scale would cancel. With z = |x - mean|
    / scale and eta half a bin over the scale, the bin is lo .. hi = z ± eta, or lo .. infinity
    where it is open. With E(t) = erfcx(t / sqrt 2) / 2, so that the mass beyond t is e^{-t²/2}
    E(t), and b2 = 2 z eta = (hi² - lo²) / 2, the mass is

    - ``e^{-lo²/2} [E(lo) - E(hi) e^{-b2}]`` where lo >= 0;
    - ``1 - e^{-lo²/2} [E(-lo) + E(hi) e^{-b2}]`` where lo < 0;
    - ``2 eta φ(z) [1 + Σ eta^{2n} He_{2n}(z) / (2n + 1)!]`` where the bin is narrow.
    """
    dtype, x, scales = x.dtype, x.double(), log_scales.double()
    delta, is_open = x - means.double(), x.abs() > OPEN
    # Scales of 0 and infinity are small and large ones: no 0 times infinity.
    low, high = LOG_SCALES
    limited = torch.where(scales < low, torch.full_like(scales, low), scales)
    inverse = torch.exp(-torch.where(scales > high, torch.full_like(scales, high), limited))
    away = torch.where(torch.where(is_open, x, delta) < 0, -delta, delta)
    z, eta, lo = away * inverse, BIN * inverse, (away - BIN) * inverse
    narrow = ~is_open & (torch.maximum(eta, z * eta) < NARROW)
    tail = ~narrow & (lo >= 0)
    rest = ~narrow & ~tail

    # The forms not taken must not poison the gradient: they see harmless numbers instead.
    def only(where: Tensor, value: Tensor, harmless: float = 0.0) -> Tensor:
        return torch.where(where, value, torch.full_like(value, harmless))

    def scaled_tail(t: Tensor) -> Tensor:
        scaled: Tensor = torch.special.erfcx(t / math.sqrt(2))
        return 0.5 * scaled

    closed = ~is_open & ~narrow
    near = scaled_tail(lo.abs())
    far = only(closed, scaled_tail(only(closed, z + eta)) * torch.exp(-only(closed, 2 * z * eta)))
    t = only(tail, lo)
    log_tail = torch.log(only(tail, near - far, 1.0)) - 0.5 * t * t
    outside = (near + far) * torch.exp(-0.5 * only(rest, lo) ** 2)
    log_rest = torch.log1p(-only(rest, outside))
    b, e = only(narrow, z * eta) ** 2, only(narrow, eta) ** 2
    series = (b - e) / 6 + (b * b - 6 * b * e + 3 * e * e) / 120
    series = series + (b**3 - 15 * b * b * e + 45 * b * e * e - 15 * e**3) / 5040
    log_narrow = LOG_BIN_DENSITY - scales - 0.5 * z * z + torch.log1p(series)
    return torch.where(narrow, log_narrow, torch.where(tail, log_tail, log_rest)).to(dtype)


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
