"""Weights of the mean squared error over the timesteps, as float64 tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore._checks import (
    as_positive,
    as_real,
    as_tensor,
    check_choice,
    check_float_tensor,
)
from diffcore._devices import widened
from diffcore._engine.dispatch import plain_eager
from diffcore.coefficients.step import PREDICTION_TYPES

__all__ = [
    "debiased_weights",
    "edm_weights",
    "flow_weights",
    "min_snr_weights",
    "p2_weights",
    "soft_min_snr_weights",
]

FLOW_WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


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
    snr = widened(snr)
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
    snr = widened(snr)
    if prediction_type == "epsilon":
        return 1 + 1 / (snr * sigma_data**2)
    if prediction_type == "sample":
        return snr + sigma_data**-2
    power, root = (1, snr) if prediction_type == "v_prediction" else (2, snr.sqrt())
    # root / (root + 1) in a form that is 1, not nan, at infinite snr
    return (1 / (1 + 1 / root)) ** power + 1 / (sigma_data * sigma_data * (root + 1) ** power)


def soft_min_snr_weights(
    snr: Tensor, *, gamma: float = 5.0, prediction_type: str = "epsilon"
) -> Tensor:
    """Soft min-SNR: the weight gamma snr / (snr + gamma) on the error of x_0.

    A smooth form of ``min_snr_weights``. The weight on the squared error of the prediction is, for
    sample: the same; epsilon: gamma / (snr + gamma); v_prediction and flow_prediction: as there.

    Args:
        snr: alpha^2 / sigma^2 at each timestep, ``[T]``: a tensor, an array or a list.
        gamma: Where it bends; above 0.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.

    Returns:
        float64 ``[T]``.

    Raises:
        TypeError: ``snr`` is not made of floating-point numbers.
        ValueError: Unknown ``prediction_type``, or gamma is not positive.

    Source:
        Crowson et al. 2024 (Hourglass Diffusion Transformers, arXiv 2401.11605) section 4.
    """
    snr = widened(_checked(snr, prediction_type))
    gamma = as_positive("gamma", gamma, finite=True)
    return _on_prediction(gamma / (snr + gamma), snr, prediction_type)


def p2_weights(
    snr: Tensor, *, k: float = 1.0, gamma: float = 1.0, prediction_type: str = "epsilon"
) -> Tensor:
    """P2: the weight 1 / (k + snr)^gamma on the error of epsilon.

    Args:
        snr: alpha^2 / sigma^2 at each timestep, ``[T]``: a tensor, an array or a list.
        k: Above 0.
        gamma: At least 0; 0 for no weights.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.

    Returns:
        float64 ``[T]``; for another prediction than epsilon multiplied as the squared errors are:
        by snr for sample, snr / (snr + 1) for v_prediction, snr / (sqrt(snr) + 1)^2 for
        flow_prediction.

    Raises:
        TypeError: ``snr`` is not made of floating-point numbers.
        ValueError: Unknown ``prediction_type``, or a parameter out of its range.

    Source:
        Choi et al. 2022 (arXiv 2204.00227) eq. 8.
    """
    snr = widened(_checked(snr, prediction_type))
    k, gamma = as_positive("k", k, finite=True), as_real("gamma", gamma)
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be at least 0 and finite, got {gamma}")
    return _on_prediction((k + snr) ** -gamma, snr, prediction_type)


def debiased_weights(snr: Tensor, *, prediction_type: str = "epsilon") -> Tensor:
    """Debiased estimation: the weight 1 / sqrt(snr) on the error of epsilon.

    Args:
        snr: alpha^2 / sigma^2 at each timestep, ``[T]``: a tensor, an array or a list.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.

    Returns:
        float64 ``[T]``; for another prediction than epsilon as for ``p2_weights``. Infinite for
        epsilon at snr = 0.

    Raises:
        TypeError: ``snr`` is not made of floating-point numbers.
        ValueError: Unknown ``prediction_type``.

    Source:
        Yu et al. 2023 (arXiv 2310.08442) eq. 12.
    """
    snr = widened(_checked(snr, prediction_type))
    root = snr.sqrt()
    if prediction_type == "epsilon":
        return 1 / root
    if prediction_type == "sample":
        return root
    # Divided by sqrt(snr): 0, not nan, at infinite snr.
    return 1 / (root + 1 / root + (0 if prediction_type == "v_prediction" else 2))


def flow_weights(sigma: Tensor, weighting: str = "none") -> Tensor:
    """Weights of Stable Diffusion 3 on the squared error of a flow's prediction.

    "none": 1; "sigma_sqrt": 1 / sigma^2; "cosmap": 2 / (pi (1 - 2 sigma + 2 sigma^2)).

    Args:
        sigma: Noise levels in (0, 1), of any shape. Values on the CPU are checked, where 0 and 1
            pass as far as their weight is finite.
        weighting: One of the three.

    Returns:
        float64, the shape of ``sigma``.

    Raises:
        TypeError: ``sigma`` is not made of floating-point numbers.
        ValueError: An unknown ``weighting``, or a sigma outside (0, 1).

    Source:
        Esser et al. 2024 (arXiv 2403.03206) section 3.1; the names are diffusers'.
    """
    check_choice("weighting", weighting, FLOW_WEIGHTINGS)
    sigma = as_tensor("sigma", sigma, "a floating-point tensor")
    check_float_tensor("sigma", sigma)
    if sigma.device.type == "cpu" and sigma.numel() and plain_eager():
        low, high = (float(end) for end in torch.aminmax(sigma.detach()))
        if not (low >= 0 and high <= 1) or (low == 0 and weighting == "sigma_sqrt"):
            raise ValueError(
                f"sigma must be in (0, 1), got values from {low:g} to {high:g}; divide timesteps "
                "by their number"
            )
    sigma = widened(sigma)
    if weighting == "none":
        return torch.ones_like(sigma)
    if weighting == "sigma_sqrt":
        return sigma**-2
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def _on_prediction(on_epsilon: Tensor, snr: Tensor, prediction_type: str) -> Tensor:
    """The weight on the error of a prediction, from that on the error of epsilon.

    The error of x_0 is that of epsilon / sqrt(snr), of v / (snr + 1)^1/2 and of a flow's u /
    (sqrt(snr) + 1).
    """
    if prediction_type == "epsilon":
        return on_epsilon
    if prediction_type == "sample":
        return on_epsilon * snr
    power, root = (1, snr) if prediction_type == "v_prediction" else (2, snr.sqrt())
    # root / (root + 1) in a form that is 1, not nan, at infinite snr
    return on_epsilon * (1 / (1 + 1 / root)) ** power


def _checked(snr: Tensor, prediction_type: str) -> Tensor:
    """The ratios as a tensor."""
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    snr = as_tensor("snr", snr, "a floating-point tensor")
    check_float_tensor("snr", snr)
    return snr
