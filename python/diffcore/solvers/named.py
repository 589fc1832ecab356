"""Solvers under names from the literature; each is a table of another module with settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypedDict

from diffcore._types import ClipRange
from diffcore.solvers.derivative import euler_table, heun_table
from diffcore.solvers.dpmpp import dpmpp_table
from diffcore.solvers.heun_steps import churned_levels, heun_rows, renoise
from diffcore.solvers.levels import Levels, NoiseLevels
from diffcore.solvers.rows import Rows, at_least_zero
from diffcore.solvers.table import SolverTable

if TYPE_CHECKING:
    from typing_extensions import Unpack


def dpmpp_2m_table(
    levels: Levels, *, prediction_type: str = "epsilon", clip_range: ClipRange = None
) -> SolverTable:
    """DPM-Solver++ (2M) as in k-diffusion: full order to the end. Order 2.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

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
    """DPM-Solver++ (2M) SDE as in k-diffusion: noise of strength eta. Order 1 (2 for eta = 0).

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        eta: Strength of the noise, at least 0.
        s_noise: Factor of the added noise.
        solver_type: "midpoint" or "heun".
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

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
    """DPM-Solver++ (3M) SDE as in k-diffusion; its second step is of the "heun" type.

    Order 1 (2 for eta = 0).

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        eta: Strength of the noise, at least 0.
        s_noise: Factor of the added noise.
        exact_third_order: See ``dpmpp_table``.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

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
    sigmas: Levels,
    *,
    num_train_timesteps: float = 1000.0,
    prediction_type: str = "flow_prediction",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Euler's method in a rectified flow: x' = x + (sigma' - sigma) m. Order 1.

    Args:
        sigmas: ``[N + 1]``, falling or rising, in [0, 1], already shifted (``get_sigmas_flow``); or
            ``NoiseLevels.from_flow``.
        num_train_timesteps: The timestep input is sigma times this. Not with ``NoiseLevels``, which
            have their own.
        prediction_type: As for ``euler_table``, but "flow_prediction" by default.
        clip_range: As for ``euler_table``.

    Returns:
        N rows: ``euler_table`` of ``NoiseLevels.from_flow``.

    Source:
        Liu et al. 2022 (arXiv 2209.03003); Esser et al. 2024 (arXiv 2403.03206).
    """
    levels = flow_levels(sigmas, num_train_timesteps)
    return euler_table(levels, prediction_type=prediction_type, clip_range=clip_range)


def flow_heun_table(
    sigmas: Levels,
    *,
    num_train_timesteps: float = 1000.0,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    prediction_type: str = "flow_prediction",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Heun's method in a rectified flow: the mean of the velocities at both ends. Order 2.

    Churn raises sigma / alpha by the factor 1 + gamma before the model is called, gamma =
    min(s_churn / N, sqrt(2) - 1) where s_tmin <= sigma <= s_tmax and sigma < 1: x is scaled to the
    signal of the raised level and gets the noise that is missing there, so the marginals stay.

    Args:
        sigmas: As for ``flow_euler_table``.
        num_train_timesteps: As for ``flow_euler_table``.
        s_churn: How much noise is renewed over all steps; 0 for none.
        s_tmin: Lowest sigma that churn raises.
        s_tmax: Highest sigma that churn raises.
        s_noise: Factor of the added noise.
        prediction_type: As for ``heun_table``, but "flow_prediction" by default.
        clip_range: As for ``heun_table``.

    Returns:
        2N rows, 2N - 1 if the last sigma is 0: without churn ``heun_table`` of
        ``NoiseLevels.from_flow``.

    Raises:
        ValueError: A number below 0, s_tmin above s_tmax, churn with sigmas that rise, or as
            ``flow_euler_table``.
    """
    levels = flow_levels(sigmas, num_train_timesteps)
    churn = churned_levels(levels, s_churn, s_tmin, s_tmax)
    s_noise = at_least_zero("s_noise", s_noise)
    if churn is None:
        return heun_table(levels, prediction_type=prediction_type, clip_range=clip_range)
    rows = Rows("flow_heun", levels, prediction_type, clip_range)
    points = levels.levels()
    for i, after in enumerate(points[1:]):
        up = churn[i + 1] if i + 1 < len(churn) and churn[i + 1].ratio > after.ratio else None
        heun_rows(rows, levels.path, i, churn[i], after, up, s_noise)
    if churn[0].ratio == points[0].ratio:
        return rows.table(2)
    scale, noise = renoise(points[0], churn[0])
    return rows.table(2, start=(scale, s_noise * noise))


class ChurnOptions(TypedDict, total=False):
    """The keyword arguments of ``euler_table`` and ``heun_table``."""

    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float
    prediction_type: str
    clip_range: ClipRange


def edm_euler_table(
    sigmas: Levels, *, sigma_data: float = 0.5, **options: Unpack[ChurnOptions]
) -> SolverTable:
    """Euler's method for a network with EDM's preconditioning. Order 1.

    Args:
        sigmas: ``[N + 1]``, falling, usually from ``get_sigmas_karras``; or
            ``NoiseLevels.from_edm``.
        sigma_data: Standard deviation of the data. Not with ``NoiseLevels``, which have their own.
        **options: The keyword arguments of ``euler_table``; prediction_type "epsilon" is EDM's F,
            see ``NoiseLevels.from_edm``.

    Returns:
        N rows: ``euler_table`` of ``NoiseLevels.from_edm``.

    Source:
        Karras et al. 2022 (arXiv 2206.00364).
    """
    return euler_table(edm_levels(sigmas, sigma_data), **options)


def edm_heun_table(
    sigmas: Levels, *, sigma_data: float = 0.5, **options: Unpack[ChurnOptions]
) -> SolverTable:
    """EDM's sampler: Heun's method with churn for a preconditioned network. Order 2.

    Args:
        sigmas: ``[N + 1]``, falling, usually from ``get_sigmas_karras``; or
            ``NoiseLevels.from_edm``.
        sigma_data: Standard deviation of the data. Not with ``NoiseLevels``, which have their own.
        **options: The keyword arguments of ``heun_table``; prediction_type "epsilon" is EDM's F,
            see ``NoiseLevels.from_edm``.

    Returns:
        2N rows, 2N - 1 if the last sigma is 0: ``heun_table`` of ``NoiseLevels.from_edm``.

    Source:
        Karras et al. 2022 (arXiv 2206.00364) algorithm 2.
    """
    return heun_table(edm_levels(sigmas, sigma_data), **options)


# The defaults of num_train_timesteps and sigma_data above.
_TRAIN_TIMESTEPS, _SIGMA_DATA = 1000.0, 0.5


def flow_levels(sigmas: Levels, num_train_timesteps: float) -> NoiseLevels:
    """The noise levels of a rectified flow.

    Args:
        sigmas: See ``flow_euler_table``.
        num_train_timesteps: See ``flow_euler_table``.

    Returns:
        The levels.

    Raises:
        ValueError: ``NoiseLevels`` on another path, or with a second ``num_train_timesteps``.
    """
    if not isinstance(sigmas, NoiseLevels):
        return NoiseLevels.from_flow(sigmas, num_train_timesteps=num_train_timesteps)
    if sigmas.path != "flow":
        raise ValueError(
            f"sigmas must be on the path 'flow', got NoiseLevels on {sigmas.path!r}; pass "
            "NoiseLevels.from_flow(...), or use euler_table or heun_table"
        )
    refuse_second("num_train_timesteps", num_train_timesteps, _TRAIN_TIMESTEPS)
    return sigmas


def edm_levels(sigmas: Levels, sigma_data: float) -> NoiseLevels:
    """The noise levels of a network with EDM's preconditioning.

    Args:
        sigmas: See ``edm_euler_table``.
        sigma_data: See ``edm_euler_table``.

    Returns:
        The levels.

    Raises:
        ValueError: ``NoiseLevels`` that are not preconditioned, or with a second ``sigma_data``.
    """
    if not isinstance(sigmas, NoiseLevels):
        return NoiseLevels.from_edm(sigmas, sigma_data=sigma_data)
    if not sigmas.preconditioned:
        raise ValueError(
            "sigmas must be preconditioned, got NoiseLevels that are not; pass "
            "NoiseLevels.from_edm(...), or use euler_table or heun_table"
        )
    refuse_second("sigma_data", sigma_data, _SIGMA_DATA)
    return sigmas


def refuse_second(name: str, value: float, default: float) -> None:
    """Refuse a setting that noise levels have already.

    Args:
        name: Name of the setting.
        value: The argument.
        default: Its default.

    Raises:
        ValueError: ``value`` is not the default.
    """
    if value != default:
        raise ValueError(f"{name} must be left out with NoiseLevels, which have it, got {value}")
