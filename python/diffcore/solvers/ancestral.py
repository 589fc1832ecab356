"""Solvers with one model call a step and no history: DDPM, DDIM, Euler ancestral."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from diffcore._checks import as_flag, as_real, check_choice
from diffcore._types import ClipRange
from diffcore.coefficients import step as formulas
from diffcore.coefficients.step import LEARNED, VARIANCE_TYPES, posterior_coefficients, tensors
from diffcore.solvers.levels import Levels, NoiseLevels, as_levels
from diffcore.solvers.rows import (
    Rows,
    ancestral,
    at_least_zero,
    move,
    one_call_coefficients,
    one_call_table,
)
from diffcore.solvers.table import SolverTable


def ddpm_table(
    levels: Levels,
    *,
    variance_type: str = "fixed_small",
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Ancestral sampling: x' = A x0 + B x + c_z z, the posterior q(x' | x, x0). Order 1.

    c_z^2 = beta_tilde ("fixed_small") or beta ("fixed_large"), both of the step to the next level,
    however far that is; 0 for a step to sigma = 0. If the model predicts the variance, the noise is
    exp(log_variance / 2) z with log_variance = v ("learned") or log beta_tilde + (v + 1) / 2 (log
    beta - log beta_tilde) ("learned_range": from -1, "fixed_small", to 1, "fixed_large").

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        variance_type: One of ``VARIANCE_TYPES``. For "learned" and "learned_range" the model
            returns ``[B, 2C, ...]``, its prediction and then v.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows, with a ``variance`` where it is learned.

    Raises:
        ValueError: Unknown variance_type, levels that rise, or as ``NoiseLevels``.

    Source:
        Ho et al. 2020 (arXiv 2006.11239) algorithm 2; Nichol and Dhariwal 2021 (arXiv 2102.09672)
        eq. 15.
    """
    levels = as_levels(levels, prediction_type)
    levels.check_falls("ddpm_table")
    coefficients, variance = ddpm_coefficients(levels, variance_type, prediction_type, clip_range)
    return one_call_table("ddpm", levels, coefficients, variance=variance)


def ddpm_coefficients(
    levels: NoiseLevels, variance_type: str, prediction_type: str, clip_range: ClipRange
) -> tuple[Tensor, Tensor | None]:
    """The coefficients and the ``variance`` of ``ddpm_table``, which has the same arguments."""
    check_choice("variance_type", variance_type, VARIANCE_TYPES)
    c_0, c_x, beta_tilde, beta = tensors(posterior_coefficients(*_ends(levels)))
    noisy, learned = levels.sigma[1:] != 0, None
    if variance_type in LEARNED:
        noisy &= beta_tilde > 0  # a step to the same level needs no noise
        learned = _log_deviation(variance_type, noisy, beta_tilde, beta)
        c_z = noisy.double()
    else:
        variance = beta_tilde if variance_type == "fixed_small" else beta
        c_z = torch.where(noisy, variance, 0.0).sqrt()
    columns = {"c_x": c_x, "c_0": c_0, "c_z": c_z}
    return one_call_coefficients("ddpm", levels, prediction_type, clip_range, **columns), learned


def ddim_table(
    levels: Levels,
    *,
    eta: float = 0.0,
    rederive_epsilon: bool = True,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DDIM: x' = alpha' x0 + sqrt(sigma'^2 - c_z^2) epsilon + c_z z, c_z = eta sqrt(beta_tilde).

    epsilon is derived from the clipped x0 (``rederive_epsilon=True``, OpenAI's rule) or from the
    unclipped model output (``False``, the default of diffusers). Order 1; with eta = 0 the same as
    ``euler_table``. Then levels may rise (DDIM inversion), and where the first is clean, epsilon
    there is that of the model for both rules.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        eta: In [0, 1]: 0 for the deterministic sampler, 1 for ancestral noise.
        rederive_epsilon: Whether epsilon is derived from the clipped x0.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: eta outside [0, 1], eta above 0 with levels that rise, or as ``NoiseLevels``.

    Source:
        Song et al. 2021 (arXiv 2010.02502) eq. 12 and 16.
    """
    levels = as_levels(levels, prediction_type)
    coefficients = ddim_coefficients(levels, eta, rederive_epsilon, prediction_type, clip_range)
    return one_call_table("ddim", levels, coefficients)


def ddim_coefficients(
    levels: NoiseLevels,
    eta: float,
    rederive_epsilon: bool,
    prediction_type: str,
    clip_range: ClipRange,
) -> Tensor:
    """The coefficients of ``ddim_table``, which has the same arguments."""
    rederive_epsilon = as_flag("rederive_epsilon", rederive_epsilon)
    if levels.rising:
        if as_real("eta", eta) != 0:
            levels.check_falls(f"ddim_table with eta={eta}")
        return _inverse_ddim(levels, rederive_epsilon, prediction_type, clip_range)
    # With x0 as the prediction, the first four columns are those of the step alone.
    steps = formulas.ddim_coefficients(*_ends(levels), eta=eta, prediction_type="sample")
    c_x, _, c_0, c_z = steps[:, :4].unbind(1)
    columns = {"c_x": c_x, "c_0": c_0, "c_z": c_z}
    if not rederive_epsilon:
        e_x, e_m = levels.epsilon_columns(prediction_type)
        direction = c_x * levels.sigma[:-1]
        columns |= {"c_x": direction * e_x, "c_m": direction * e_m, "c_0": levels.alpha[1:]}
    return one_call_coefficients("ddim", levels, prediction_type, clip_range, **columns)


def _inverse_ddim(
    levels: NoiseLevels, rederive_epsilon: bool, prediction_type: str, clip_range: ClipRange
) -> Tensor:
    """The coefficients of ``ddim_table`` up the noise levels.

    Without a clip both rules for epsilon mean the same, and the model's has no quotient by sigma.
    """
    levels.check_start(prediction_type)
    alpha, sigma, alpha_next, sigma_next = _ends(levels)
    e_x, e_m = levels.epsilon_columns(prediction_type)
    columns = {"c_x": sigma_next * e_x, "c_m": sigma_next * e_m, "c_0": alpha_next}
    if rederive_epsilon and clip_range is not None:
        noisy, keep = sigma > 0, sigma_next / sigma
        rederived = {"c_x": keep, "c_m": torch.zeros_like(keep), "c_0": alpha_next - alpha * keep}
        columns = {n: torch.where(noisy, rederived[n], c) for n, c in columns.items()}
    return one_call_coefficients("ddim", levels, prediction_type, clip_range, **columns)


def euler_ancestral_table(
    levels: Levels,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Euler's step to sigma_down, then noise up to sigma'. Order 1.

    sigma_up = eta sqrt(beta_tilde), at most sigma'; sigma_down^2 = sigma'^2 - sigma_up^2. For
    eta <= 1 this is DDIM's rule, with a factor for the noise. Levels may rise with eta = 0.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        eta: At least 0; 1 for ancestral noise.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: eta below 0, eta above 0 with levels that rise, or as ``NoiseLevels``.

    Source:
        k-diffusion's ``sample_euler_ancestral``.
    """
    eta, s_noise = at_least_zero("eta", eta), at_least_zero("s_noise", s_noise)
    levels = as_levels(levels, prediction_type)
    if eta > 0:
        levels.check_falls("euler_ancestral_table with eta > 0")
    rows = Rows("euler_ancestral", levels, prediction_type, clip_range)
    for i, (here, after) in enumerate(pairwise(levels.levels())):
        down, up = ancestral(here, after, eta)
        rows.add(i, here, **move(here, after.alpha, down), c_z=s_noise * up)
    return rows.table(1)


def _log_deviation(variance_type: str, noisy: Tensor, beta_tilde: Tensor, beta: Tensor) -> Tensor:
    """s_0 and s_v of each row: half the log-variance is s_0 + s_v v. 0 where there is no noise."""
    if variance_type == "learned":
        return noisy[:, None] * torch.tensor([0.0, 0.5], dtype=torch.float64, device="cpu")
    small, large = (torch.where(noisy, c, 1.0).log() for c in (beta_tilde, beta))
    return torch.stack([small + large, large - small], dim=1) / 4


def _ends(levels: NoiseLevels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(alpha, sigma) before every step, and after it."""
    return levels.alpha[:-1], levels.sigma[:-1], levels.alpha[1:], levels.sigma[1:]
