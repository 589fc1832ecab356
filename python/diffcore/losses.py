"""Weights of the mean squared error over the timesteps, as float64 tables."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore._checks import as_positive, as_tensor, check_choice, check_float_tensor
from diffcore.coefficients.step import PREDICTION_TYPES

__all__ = ["edm_weights", "min_snr_weights"]


def min_snr_weights(snr: Tensor, *, gamma: float = 5.0, prediction_type: str = "epsilon") -> Tensor:
    """Min-SNR-gamma: the weight min(snr, gamma) on the error of x_0, for a prediction type.

    The weight on the squared error of the prediction is, for epsilon: min(snr, gamma) / snr, with
    the limit 1 at snr = 0; sample: min(snr, gamma); v_prediction: min(snr, gamma) / (snr + 1);
    flow_prediction: min(snr, gamma) / (sqrt(snr) + 1)^2.

    Args:
        snr: alpha^2 / sigma^2 at each timestep, ``[T]``, such as ``NoiseSchedule.snr``: a tensor,
            an array or a list.
        gamma: Largest weight on the error of x_0; infinity for no limit.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.

    Returns:
        float64 ``[T]``, for ``GaussianDiffusion.training_losses(..., weights=...)``.

    Raises:
        TypeError: ``snr`` is not made of floating-point numbers.
        ValueError: Unknown ``prediction_type``, or gamma is not positive.

    Source:
        Hang et al. 2023 (arXiv 2303.09556) section 3.4.
    """
    snr = _checked(snr, prediction_type)
    gamma = as_positive("gamma", gamma)
    snr = snr.to(torch.float64)
    if prediction_type == "epsilon":
        return torch.where(snr > gamma, gamma / snr, 1.0)
    capped = snr.clamp_max(gamma)
    if prediction_type == "sample":
        return capped
    if prediction_type == "v_prediction":
        return capped / (snr + 1)
    return capped / (snr.sqrt() + 1) ** 2


def edm_weights(
    snr: Tensor, *, sigma_data: float = 0.5, prediction_type: str = "epsilon"
) -> Tensor:
    """EDM: the weight 1/sigma^2 + 1/sigma_data^2 = snr + 1/sigma_data^2 on the error of x_0.

    sigma^2 = 1/snr is the variance of the noise where the signal is not scaled. With w = snr +
    1/sigma_data^2, the weight on the squared error of the prediction is, for sample: w; epsilon: w
    / snr = 1 + 1/(snr sigma_data^2), infinite at snr = 0; v_prediction: w / (snr + 1);
    flow_prediction: w / (sqrt(snr) + 1)^2.

    Args:
        snr: alpha^2 / sigma^2 at each timestep, ``[T]``, such as ``NoiseSchedule.snr``: a tensor,
            an array or a list.
        sigma_data: Standard deviation of the data.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.

    Returns:
        float64 ``[T]``, for ``GaussianDiffusion.training_losses(..., weights=...)``.

    Raises:
        TypeError: ``snr`` is not made of floating-point numbers.
        ValueError: Unknown ``prediction_type``, or sigma_data is not positive.

    Source:
        Karras et al. 2022 (arXiv 2206.00364) table 1 (loss weighting).
    """
    snr = _checked(snr, prediction_type)
    sigma_data = as_positive("sigma_data", sigma_data)
    snr = snr.to(torch.float64)
    if prediction_type == "epsilon":
        return 1 + 1 / (snr * sigma_data**2)
    if prediction_type == "sample":
        return snr + sigma_data**-2
    power, root = (1, snr) if prediction_type == "v_prediction" else (2, snr.sqrt())
    # root / (root + 1) in a form that is 1, not nan, at infinite snr
    return (1 / (1 + 1 / root)) ** power + 1 / (sigma_data * sigma_data * (root + 1) ** power)


def _checked(snr: Tensor, prediction_type: str) -> Tensor:
    """The ratios as a tensor."""
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    snr = as_tensor("snr", snr, "a floating-point tensor")
    check_float_tensor("snr", snr)
    return snr
