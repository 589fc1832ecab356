"""Schedules in continuous time: log(alpha^2 / sigma^2) as a falling function of t in [0, 1].

alpha^2 = sigmoid(logsnr) and sigma^2 = sigmoid(-logsnr): variance preserving.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffcore._checks import as_positive, as_real, as_tensor
from diffcore._devices import beside, in_float64

__all__ = ["LOGSNR_SCHEDULES", "beta_linear_logsnr", "cosine_logsnr", "linear_logsnr"]


def cosine_logsnr(
    t: Tensor, *, logsnr_min: float = -15.0, logsnr_max: float = 15.0, shift: float = 1.0
) -> Tensor:
    """The cosine schedule, alpha = cos(angle), cut to a range of log-SNR, and shifted.

    -2 log tan(angle) + 2 log(shift), with an angle that is linear in t.

    Args:
        t: Times in [0, 1], of any shape.
        logsnr_min: Value at t = 1 before the shift.
        logsnr_max: Value at t = 0 before the shift.
        shift: Below 1 for more noise, such as 64 / 256 for images of 256 pixels a side with the
            noise of those of 64.

    Returns:
        float64, the shape of ``t``; float32 where its device has no float64.

    Raises:
        TypeError: ``t`` is not made of floating-point numbers, or a parameter is no number.
        ValueError: Not logsnr_min < logsnr_max, or ``shift`` is not positive.

    Source:
        Nichol and Dhariwal 2021 (arXiv 2102.09672) eq. 17; Hoogeboom et al. 2023 (simple diffusion,
        arXiv 2301.11093) eq. 4 and appendix A.
    """
    low, high = _ends(logsnr_min, logsnr_max)
    shift = as_positive("shift", shift, finite=True)
    first, last = math.atan(math.exp(-high / 2)), math.atan(math.exp(-low / 2))
    angle = first + _times(t) * (last - first)
    return beside(-2 * torch.log(torch.tan(angle)) + 2 * math.log(shift), t)


def linear_logsnr(t: Tensor, *, logsnr_min: float = -5.0, logsnr_max: float = 13.3) -> Tensor:
    """A straight line, from logsnr_max at t = 0 to logsnr_min at t = 1.

    The defaults are those that variational diffusion models start from: gamma = -logsnr.

    Args:
        t: Times in [0, 1], of any shape.
        logsnr_min: Value at t = 1.
        logsnr_max: Value at t = 0.

    Returns:
        float64, the shape of ``t``; float32 where its device has no float64.

    Raises:
        TypeError: ``t`` is not made of floating-point numbers, or a parameter is no number.
        ValueError: Not logsnr_min < logsnr_max.

    Source:
        Kingma et al. 2021 (arXiv 2107.00630) appendix H.
    """
    low, high = _ends(logsnr_min, logsnr_max)
    return beside(high + _times(t) * (low - high), t)


def beta_linear_logsnr(t: Tensor, *, beta_min: float = 0.1, beta_max: float = 20.0) -> Tensor:
    """DDPM's linear betas in the limit of many steps: -log expm1(beta_min t + span t^2 / 2).

    span = beta_max - beta_min; alpha^2 = exp(-beta_min t - span t^2 / 2), the variance preserving
    SDE. Infinite at t = 0.

    Args:
        t: Times in [0, 1], of any shape.
        beta_min: beta at t = 0, at least 0.
        beta_max: beta at t = 1, above 0 and at least beta_min.

    Returns:
        float64, the shape of ``t``; float32 where its device has no float64.

    Raises:
        TypeError: ``t`` is not made of floating-point numbers, or a parameter is no number.
        ValueError: A parameter is out of its range.

    Source:
        Song et al. 2021 (arXiv 2011.13456) eq. 33.
    """
    low, high = as_real("beta_min", beta_min), as_positive("beta_max", beta_max, finite=True)
    if not 0 <= low <= high:
        raise ValueError(f"beta_min must be in [0, beta_max], here [0, {high}], got {low}")
    time = _times(t)
    found = -torch.log(torch.expm1(low * time + 0.5 * (high - low) * time * time))
    return beside(found, t)


LOGSNR_SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "cosine": cosine_logsnr,
    "linear": linear_logsnr,
    "beta_linear": beta_linear_logsnr,
}
"""The schedules by name."""


def _ends(low: float, high: float) -> tuple[float, float]:
    low, high = as_real("logsnr_min", low), as_real("logsnr_max", high)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"logsnr_min must be less than logsnr_max, got {low} and {high}")
    return low, high


def _times(t: Tensor) -> Tensor:
    t = as_tensor("t", t, "a tensor of floating-point numbers")
    if not t.is_floating_point():
        raise TypeError(f"t must be a tensor of floating-point numbers, got {t.dtype}")
    return in_float64(t)
