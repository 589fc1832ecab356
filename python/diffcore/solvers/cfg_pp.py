"""CFG++: x_0 from the guided prediction, the noise that is added back from the unconditional one.

The rows have factors of m_u itself, so these tables need guidance.
"""

from __future__ import annotations

from itertools import pairwise

from diffcore._types import ClipRange
from diffcore.solvers.levels import Level, Levels, as_levels
from diffcore.solvers.rows import Rows, ancestral, at_least_zero
from diffcore.solvers.table import SolverTable


def cfg_pp_table(
    levels: Levels,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """CFG++ with Euler's steps: ``x' = alpha' x0 + sigma_down epsilon_u + sigma_up z``.

    x0 is that of the guided prediction, epsilon_u the noise that m_u predicts.
    sigma_up = eta sqrt(beta_tilde), at most sigma'; sigma_down² = sigma'² - sigma_up². With eta = 0
    the sampler "euler_cfg_pp" of ComfyUI, with eta = 1 "euler_ancestral_cfg_pp". Order 1. Guidance
    with scale 1 gives ``euler_ancestral_table`` where both predictions are equal.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        eta: At least 0; 1 for ancestral noise.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows, for ``guidance_scale=`` or ``guidance=`` of any kind.

    Raises:
        ValueError: eta below 0, eta above 0 with levels that rise, or as ``NoiseLevels``.

    Source:
        Chung et al. 2024 (arXiv 2406.08070).
    """
    eta, s_noise = at_least_zero("eta", eta), at_least_zero("s_noise", s_noise)
    levels = as_levels(levels, prediction_type)
    if eta > 0:
        levels.check_falls("cfg_pp_table with eta > 0")
    rows = Rows("cfg_pp", levels, prediction_type, clip_range)
    for i, (here, after) in enumerate(pairwise(levels.levels())):
        down, up = ancestral(here, after, eta)
        e_x, e_m = levels.epsilon(here, prediction_type)
        rows.add(i, here, c_x=down * e_x, c_0=after.alpha, c_u=down * e_m, c_z=s_noise * up)
    return rows.table(1)


def dpmpp_2m_cfg_pp_table(
    levels: Levels, *, prediction_type: str = "epsilon", clip_range: ClipRange = None
) -> SolverTable:
    """CFG++ with DPM-Solver++ (2M), as ComfyUI's "dpmpp_2m_cfg_pp".

    With k = exp(-h), r the ratio of the last h to this one, and u the x_0 of m_u: ``x' = alpha' (x0
    - k u + (1 - k) (x0 - u_last) / (2 r)) + (sigma' / sigma) x``. The first and the last step have
    no second term.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1. Not from alpha = 0.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the guided x_0: ``c`` for [-c, c], (lowest, highest), or ``None``; u
            is not clipped.

    Returns:
        N rows, for ``guidance_scale=`` or ``guidance=`` of any kind.

    Raises:
        ValueError: Levels that start or end at alpha = 0, or as ``NoiseLevels``.

    Source:
        ComfyUI's ``sample_dpmpp_2m_cfg_pp``; Chung et al. 2024 (arXiv 2406.08070).
    """
    levels = as_levels(levels, prediction_type)
    levels.check_signal("dpmpp_2m_cfg_pp_table")
    rows = Rows("dpmpp_2m_cfg_pp", levels, prediction_type, clip_range)
    points = levels.levels()
    for i, (here, after) in enumerate(pairwise(points)):
        a_x, a_m = levels.x0(here, prediction_type)
        if here.sigma == 0:
            e_x, e_m = levels.epsilon(here, prediction_type)
            c_x, c_u = after.sigma * e_x, after.sigma * e_m
            rows.add(i, here, c_x=c_x, c_0=after.alpha, c_u=c_u, e_x=a_x, e_u=a_m)
            continue
        keep = after.sigma / here.sigma  # alpha' k = keep alpha
        columns = {"c_0": after.alpha, "e_x": a_x, "e_u": a_m}
        if i and after.sigma:
            weight = _difference(points[i - 1], here, after)
            columns |= {"c_0": after.alpha + weight, "c_1": -weight}
        rows.add(
            i,
            here,
            c_x=keep * (1 - here.alpha * a_x),
            c_u=-keep * here.alpha * a_m,
            **columns,
        )
    return rows.table(1)


def _difference(before: Level, here: Level, after: Level) -> float:
    """The factor alpha' (1 - k) / (2 r); 0 where the last step stayed at its level."""
    h, last = after.lam - here.lam, here.lam - before.lam
    kept = here.alpha * after.sigma / (after.alpha * here.sigma)
    return after.alpha * (1 - kept) * h / (2 * last) if last else 0.0
