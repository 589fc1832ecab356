"""Weights of the simplified loss, as float64 tables over the timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import PREDICTION_TYPES, check_choice


def min_snr_weights(snr: Tensor, *, gamma: float = 5.0, prediction_type: str = "epsilon") -> Tensor:
    """Min-SNR-gamma: the weight min(snr, gamma) on the error of x_0, for what the model predicts.

    epsilon: min(snr, gamma) / snr; sample: min(snr, gamma); v_prediction: min(snr, gamma) / (snr +
    1); flow_prediction: min(snr, gamma) / (sqrt(snr) + 1)^2. At snr = 0, epsilon's is its limit, 1.

    Args:
        snr: alpha^2 / sigma^2 at each timestep, ``[T]``, such as ``NoiseSchedule.snr``.
        gamma: Where the weight stops growing.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.

    Returns:
        float64 ``[T]``, for ``GaussianDiffusion.training_losses(..., weights=...)``.

    Raises:
        TypeError: ``snr`` is not a tensor of floating point numbers.
        ValueError: Unknown ``prediction_type``, or gamma is not positive.

    Source:
        Hang et al. 2023 (arXiv 2303.09556) section 3.4.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if not isinstance(snr, Tensor) or not snr.is_floating_point():
        what = f"a tensor of {snr.dtype}" if isinstance(snr, Tensor) else type(snr).__name__
        raise TypeError(f"snr must be a tensor of floating point numbers, got {what}")
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    snr = snr.to(torch.float64)
    if prediction_type == "epsilon":
        return gamma / snr.clamp_min(gamma)
    capped = snr.clamp_max(gamma)
    if prediction_type == "sample":
        return capped
    if prediction_type == "v_prediction":
        return capped / (snr + 1)
    return capped / (snr.sqrt() + 1) ** 2
