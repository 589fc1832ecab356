"""The log-likelihood of a pixel under a discretized Gaussian. Nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore._devices import in_float64
from diffcore.reference.gaussian import reduced

__all__ = ["discretized_gaussian_log_likelihood"]

BIN = 1 / 255  # half the distance of two values of a pixel, k/127.5 - 1
OPEN = 0.999  # beyond it the bin of a pixel has no other end
NARROW = 1 / 32  # of a scale
LOG_SCALES = (-690.0, 345.0)  # 1 / scale up to 1e300, from 1e-150: squares are not 0 or nan
LOG_BIN_DENSITY = math.log(2 * BIN / math.sqrt(2 * math.pi))


def discretized_term(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log of the mass of N(means, exp(log_scales)²) in the bin of x, exact in both tails.

    In float64, whatever comes: bins much narrower than the scale would cancel. With z = |x - mean|
    / scale and eta half a bin over the scale, the bin is lo .. hi = z ± eta, or lo .. infinity
    where it is open. With E(t) = erfcx(t / sqrt 2) / 2, so that the mass beyond t is e^{-t²/2}
    E(t), and b2 = 2 z eta = (hi² - lo²) / 2, the mass is

    - ``e^{-lo²/2} [E(lo) - E(hi) e^{-b2}]`` where lo >= 0;
    - ``1 - e^{-lo²/2} [E(-lo) + E(hi) e^{-b2}]`` where lo < 0;
    - ``2 eta φ(z) [1 + Σ eta^{2n} He_{2n}(z) / (2n + 1)!]`` where the bin is narrow.
    """
    given, x, scales = x, in_float64(x), in_float64(log_scales)
    delta, is_open = x - in_float64(means), x.abs() > OPEN
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
    return (
        torch.where(narrow, log_narrow, torch.where(tail, log_tail, log_rest))
        .to(given.dtype)
        .to(given.device)
    )


def discretized_gaussian_log_likelihood(
    x: Tensor, means: Tensor, log_scales: Tensor, *, reduction: str = "none"
) -> Tensor:
    """Log-probability of the bin of each pixel, nats."""
    return reduced(discretized_term, (x, means, log_scales), reduction)
