"""The boundary coefficients of consistency models and of latent consistency models.

Both make f = c_skip x + c_out g the identity at the lowest noise level. They differ in what g is,
in the argument, and in a factor of sigma_data: a checkpoint works with its own pair only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore._checks import as_positive, as_real, as_tensor, check_dense, check_memory
from diffcore._devices import widened
from diffcore._types import Coef


def consistency_coefficients(
    sigma: Coef, *, sigma_data: float = 0.5, sigma_min: float = 0.002
) -> tuple[Coef, Coef]:
    """(c_skip, c_out) of consistency models: f = c_skip x + c_out F, with alpha = 1.

    c_skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2) and c_out = sigma_data (sigma -
    sigma_min) / sqrt(sigma^2 + sigma_data^2), for the output F of a network that gets EDM's scaled
    input. f is x at sigma_min. With sigma_min = 0 these are EDM's coefficients.

    Args:
        sigma: Noise coefficient, float or tensor.
        sigma_data: Standard deviation of the data.
        sigma_min: Lowest noise level, at least 0.

    Returns:
        (c_skip, c_out), floats or float64 tensors of the shape of ``sigma``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: ``sigma_data`` is not positive, or ``sigma_min`` below 0.

    Source:
        Song et al. 2023 (arXiv 2303.01469) appendix C.
    """
    sigma = _float64("sigma", sigma)
    data = as_positive("sigma_data", sigma_data, finite=True)
    low = as_real("sigma_min", sigma_min)
    if not 0 <= low < math.inf:
        raise ValueError(f"sigma_min must be at least 0 and finite, got {low}")
    above = sigma - low
    return data**2 / (above * above + data**2), data * above / _hypot(sigma, data)


def lcm_coefficients(
    timestep: Coef, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> tuple[Coef, Coef]:
    """(c_skip, c_out) of latent consistency models: f = c_skip x + c_out x0.

    With s = ``timestep_scaling`` t, c_skip = sigma_data^2 / (s^2 + sigma_data^2) and c_out = s /
    sqrt(s^2 + sigma_data^2), for the clean sample x0 that the model predicts at timestep t. c_out
    has no factor sigma_data, unlike that of ``consistency_coefficients``: LCM's checkpoints were
    trained so.

    Args:
        timestep: t, float or tensor.
        sigma_data: Half width of the boundary in s.
        timestep_scaling: Factor of the timestep.

    Returns:
        (c_skip, c_out), floats or float64 tensors of the shape of ``timestep``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: ``sigma_data`` or ``timestep_scaling`` is not positive.

    Source:
        Luo et al. 2023 (arXiv 2310.04378) section 4.1; the numbers are those of its code.
    """
    data = as_positive("sigma_data", sigma_data, finite=True)
    scale = as_positive("timestep_scaling", timestep_scaling, finite=True)
    s = scale * _float64("timestep", timestep)
    return data**2 / (s * s + data**2), s / _hypot(s, data)


def _float64(name: str, value: Coef) -> Coef:
    if not isinstance(value, Tensor):
        if isinstance(value, (int, float)) or not getattr(value, "ndim", 0):
            return as_real(name, value)
        value = as_tensor(name, value)
    check_dense(name, value)
    check_memory(name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real, got a tensor of {value.dtype}")
    return widened(value)


def _hypot(x: Coef, y: float) -> Coef:
    return torch.hypot(x, x.new_full((), y)) if isinstance(x, Tensor) else math.hypot(x, y)
