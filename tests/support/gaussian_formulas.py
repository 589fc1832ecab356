"""The formulas of Gaussians, as in ``formulas``, which has them too."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


def per_sample(terms: Any) -> Any:
    return terms.sum(tuple(range(1, terms.ndim))) if terms.ndim > 1 else terms


def reduced(terms: Any, reduction: str) -> Any:
    if reduction == "none":
        return terms
    if reduction == "sample":
        return per_sample(terms)
    return {
        "sum": terms.sum,
        "mean": terms.mean,
        "batchmean": lambda: terms.sum() / (terms.shape[0] if terms.ndim else 1),
    }[reduction]()


def normal_kl(
    xp: Any, mean1: Any, logvar1: Any, mean2: Any, logvar2: Any, reduction: str = "none"
) -> Any:
    terms = 0.5 * (
        -1 + logvar2 - logvar1 + xp.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * xp.exp(-logvar2)
    )
    return reduced(terms, reduction)


def standard_normal_kl(xp: Any, mean: Any, logvar: Any, reduction: str = "none") -> Any:
    return reduced(0.5 * (mean**2 + xp.exp(logvar) - 1 - logvar), reduction)


def gaussian_nll(xp: Any, x: Any, mean: Any, logvar: Any, reduction: str = "none") -> Any:
    log_two_pi = math.log(2 * math.pi) if xp is torch else np.log(8 * np.arctan(np.longdouble(1)))
    return reduced(0.5 * (log_two_pi + logvar + (x - mean) ** 2 * xp.exp(-logvar)), reduction)


def discretized_gaussian_log_likelihood(
    xp: Any, x: Any, means: Any, log_scales: Any, reduction: str = "none"
) -> Any:
    half_bin = 1 / (255 if xp is torch else np.longdouble(255))
    delta, inverse, is_open = x - means, xp.exp(-log_scales), abs(x) > 0.999
    away = xp.where(x < -0.999, -delta, xp.where(is_open, delta, abs(delta)))
    beyond, past = (log_tail(xp, (away + s * half_bin) * inverse) for s in (-1, 1))
    ratio = xp.where(is_open | (beyond == -math.inf), -math.inf, past - beyond)
    terms = beyond + xp.log1p(-xp.exp(ratio))
    # Where that says nothing any more, the density times the width.
    density = -gaussian_nll(xp, x, means, 2 * log_scales) + math.log(2 / 255)
    return reduced(xp.where(ratio > -1e-8, density, terms), reduction)


def log_tail(xp: Any, t: Any) -> Any:
    """log P(Z > t) of a standard normal Z."""
    if xp is torch:
        wide = t if t.dtype == torch.float64 else t.float()
        return torch.special.log_ndtr(-wide).to(t.dtype)
    t = np.asarray(t, np.longdouble)
    size = np.abs(t)
    near, far = np.minimum(size, 3), np.maximum(size, 2)
    root = np.sqrt(8 * np.arctan(np.longdouble(1)))
    series, fraction = np.ones_like(t), far
    for k in range(61, 1, -2):  # 1 + t²/3 (1 + t²/5 (1 + ...
        series = 1 + near * near / k * series
    for k in range(120, 0, -1):  # Laplace: far + 1 / (far + 2 / (far + 3 / ...
        fraction = far + k / fraction
    small = np.where(
        size < 2.5,
        0.5 - np.exp(-near * near / 2) / root * near * series,
        np.exp(-far * far / 2) / root / fraction,
    )
    log_small = np.where(size < 2.5, np.log(small), -far * far / 2 - np.log(root * fraction))
    return np.where(t > 0, log_small, np.log1p(-small))


def reparameterize(xp: Any, mean: Any, logvar: Any, noise: Any) -> Any:
    return mean + xp.exp(0.5 * logvar) * noise


def reparameterize_kl(xp: Any, mean: Any, logvar: Any, noise: Any) -> Any:
    kl = standard_normal_kl(xp, mean, logvar, reduction="sample")
    return reparameterize(xp, mean, logvar, noise), kl
