"""Solvers under the names their lineages know them by; each is another table with its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from diffcore._types import ClipRange, Levels
from diffcore.solvers.derivative import euler_table, heun_table
from diffcore.solvers.dpmpp import dpmpp_table
from diffcore.solvers.levels import NoiseLevels
from diffcore.solvers.table import SolverTable


def dpmpp_2m_table(
    levels: Levels, *, prediction_type: str = "epsilon", clip_range: ClipRange = None
) -> SolverTable:
    """DPM-Solver++ (2M) as k-diffusion has it: full order to the end. Order 2.

    Args:
        levels: The walk, or sigmas ``[N + 1]`` with alpha = 1.
        prediction_type: What the model predicts.
        clip_range: Bounds of x_0.

    Returns:
        N rows; see ``dpmpp_table``.
    """
    return dpmpp_table(
        levels,
        order=2,
        lower_order_final=False,
        prediction_type=prediction_type,
        clip_range=clip_range,
    )


def dpmpp_2m_sde_table(
    levels: Levels,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DPM-Solver++ (2M) SDE as k-diffusion has it: noise of strength eta. Order 1 (2 for eta = 0).

    Args:
        levels: The walk, or sigmas ``[N + 1]`` with alpha = 1.
        eta: Strength of the noise.
        s_noise: Factor of the noise.
        solver_type: "midpoint" or "heun".
        prediction_type: What the model predicts.
        clip_range: Bounds of x_0.

    Returns:
        N rows; see ``dpmpp_table``.
    """
    return dpmpp_table(
        levels,
        order=2,
        algorithm_type="sde-dpmsolver++",
        solver_type=solver_type,
        lower_order_final=False,
        eta=eta,
        s_noise=s_noise,
        prediction_type=prediction_type,
        clip_range=clip_range,
    )


def dpmpp_3m_sde_table(
    levels: Levels,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    exact_third_order: bool = False,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DPM-Solver++ (3M) SDE as k-diffusion has it; its second step is of the "heun" type.

    Args:
        levels: The walk, or sigmas ``[N + 1]`` with alpha = 1.
        eta: Strength of the noise.
        s_noise: Factor of the noise.
        exact_third_order: See ``dpmpp_table``.
        prediction_type: What the model predicts.
        clip_range: Bounds of x_0.

    Returns:
        N rows; see ``dpmpp_table``.
    """
    return dpmpp_table(
        levels,
        order=3,
        algorithm_type="sde-dpmsolver++",
        solver_type="heun",
        lower_order_final=False,
        exact_third_order=exact_third_order,
        eta=eta,
        s_noise=s_noise,
        prediction_type=prediction_type,
        clip_range=clip_range,
    )


def flow_euler_table(
    sigmas: Tensor | Sequence[float],
    *,
    num_train_timesteps: float = 1000.0,
    prediction_type: str = "flow_prediction",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Euler's method in a rectified flow: x' = x + (sigma' - sigma) m. Order 1.

    Args:
        sigmas: ``[N + 1]``, falling, in [0, 1], shifted already (``get_sigmas_flow``).
        num_train_timesteps: The model is told sigma times this.
        prediction_type: What the model predicts.
        clip_range: Bounds of x_0.

    Returns:
        N rows; see ``euler_table``.

    Source:
        Liu et al. 2022 (arXiv 2209.03003); Esser et al. 2024 (arXiv 2403.03206).
    """
    walk = NoiseLevels.from_flow(sigmas, num_train_timesteps=num_train_timesteps)
    return euler_table(walk, prediction_type=prediction_type, clip_range=clip_range)


def flow_heun_table(
    sigmas: Tensor | Sequence[float],
    *,
    num_train_timesteps: float = 1000.0,
    prediction_type: str = "flow_prediction",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Heun's method in a rectified flow: the mean of the velocities at both ends. Order 2.

    Args:
        sigmas: ``[N + 1]``, falling, in [0, 1], shifted already (``get_sigmas_flow``).
        num_train_timesteps: The model is told sigma times this.
        prediction_type: What the model predicts.
        clip_range: Bounds of x_0.

    Returns:
        2N rows, 2N - 1 if the walk ends at a clean sample; see ``heun_table``.
    """
    walk = NoiseLevels.from_flow(sigmas, num_train_timesteps=num_train_timesteps)
    return heun_table(walk, prediction_type=prediction_type, clip_range=clip_range)


def edm_euler_table(
    sigmas: Tensor | Sequence[float],
    *,
    sigma_data: float = 0.5,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Euler's method around an EDM network, which is shown c_in x and told log(sigma) / 4. Order 1.

    Args:
        sigmas: ``[N + 1]``, falling, usually Karras'.
        sigma_data: Standard deviation of the data.
        s_churn: See ``euler_table``.
        s_tmin: Lowest sigma with churn.
        s_tmax: Highest sigma with churn.
        s_noise: Factor of the noise.
        prediction_type: "epsilon" for EDM's F, see ``NoiseLevels.from_edm``.
        clip_range: Bounds of x_0.

    Returns:
        N rows; see ``euler_table``.

    Source:
        Karras et al. 2022 (arXiv 2206.00364).
    """
    return euler_table(
        NoiseLevels.from_edm(sigmas, sigma_data=sigma_data),
        s_churn=s_churn,
        s_tmin=s_tmin,
        s_tmax=s_tmax,
        s_noise=s_noise,
        prediction_type=prediction_type,
        clip_range=clip_range,
    )


def edm_heun_table(
    sigmas: Tensor | Sequence[float],
    *,
    sigma_data: float = 0.5,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """EDM's sampler: Heun's method with churn around an EDM network. Order 2.

    Args:
        sigmas: ``[N + 1]``, falling, usually Karras'.
        sigma_data: Standard deviation of the data.
        s_churn: See ``euler_table``.
        s_tmin: Lowest sigma with churn.
        s_tmax: Highest sigma with churn.
        s_noise: Factor of the noise.
        prediction_type: "epsilon" for EDM's F, see ``NoiseLevels.from_edm``.
        clip_range: Bounds of x_0.

    Returns:
        2N rows, 2N - 1 if the walk ends at a clean sample; see ``heun_table``.

    Source:
        Karras et al. 2022 (arXiv 2206.00364) algorithm 2.
    """
    return heun_table(
        NoiseLevels.from_edm(sigmas, sigma_data=sigma_data),
        s_churn=s_churn,
        s_tmin=s_tmin,
        s_tmax=s_tmax,
        s_noise=s_noise,
        prediction_type=prediction_type,
        clip_range=clip_range,
    )
