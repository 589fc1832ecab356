"""Ancestral steps of a rectified flow: down along the flow, then noise up to the next level."""

from __future__ import annotations

import math
from itertools import pairwise

from diffcore._types import ClipRange
from diffcore.solvers.levels import Level, Levels
from diffcore.solvers.named import flow_levels
from diffcore.solvers.rows import Rows, at_least_zero, toward
from diffcore.solvers.table import SolverTable

# Where ComfyUI's second-order step calls the model first, if it starts at pure noise.
_BELOW_NOISE = 0.9999


def flow_euler_ancestral_table(
    sigmas: Levels,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    num_train_timesteps: float = 1000.0,
    prediction_type: str = "flow_prediction",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Euler's step of a flow to sigma_down < sigma', then noise up to sigma'. Order 1.

    ``sigma_down = sigma' (1 + eta (sigma' / sigma - 1))``, at least 0. The step ends at (1 -
    sigma_down) x0 + sigma_down epsilon, is scaled by (1 - sigma') / (1 - sigma_down), and gets the
    noise that leads to sigma'. ``euler_ancestral_table`` has the ancestral noise of the diffusion
    process instead: another sigma_down, the same marginals. Levels may rise with eta = 0, where
    this is ``flow_euler_table``.

    Args:
        sigmas: As for ``flow_euler_table``.
        eta: Strength of the noise, at least 0.
        s_noise: Factor of the added noise.
        num_train_timesteps: As for ``flow_euler_table``.
        prediction_type: As for ``flow_euler_table``.
        clip_range: As for ``flow_euler_table``.

    Returns:
        N rows.

    Raises:
        ValueError: eta below 0, eta above 0 with sigmas that rise, or as
            ``flow_euler_table``.

    Source:
        ComfyUI's ``sample_euler_ancestral_RF``; diffusers' ``LTXEulerAncestralRFScheduler``.
    """
    eta, s_noise = at_least_zero("eta", eta), at_least_zero("s_noise", s_noise)
    levels = flow_levels(sigmas, num_train_timesteps)
    if eta > 0:
        levels.check_falls("flow_euler_ancestral_table with eta > 0", "sigmas")
    rows = Rows("flow_euler_ancestral", levels, prediction_type, clip_range)
    for i, (here, after) in enumerate(pairwise(levels.levels())):
        down, up = _flow_ancestral(here, after, eta)
        if here.sigma == 0:
            rows.add(i, here, c_0=after.alpha, c_eps=after.sigma)
            continue
        c_x, c_0 = toward(here, after.alpha, down)
        rows.add(i, here, c_x=c_x, c_0=c_0, c_z=s_noise * up)
    return rows.table(1)


def flow_dpmpp_2s_ancestral_table(
    sigmas: Levels,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    num_train_timesteps: float = 1000.0,
    prediction_type: str = "flow_prediction",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DPM-Solver++ (2S) in a flow to sigma_down, then noise up to sigma'. Order 1 (2 for eta = 0).

    sigma_down and the noise are those of ``flow_euler_ancestral_table``; x0 is predicted at the
    middle of lambda and lambda_down. From sigma = 1, where lambda is infinite, that middle is
    sigma = 0.9999. A step to sigma_down = 0 has one call. Levels may rise with eta = 0, and end
    below 1.

    Args:
        sigmas: As for ``flow_euler_table``.
        eta: Strength of the noise, at least 0.
        s_noise: Factor of the added noise.
        num_train_timesteps: As for ``flow_euler_table``.
        prediction_type: As for ``flow_euler_table``.
        clip_range: As for ``flow_euler_table``.

    Returns:
        2N rows, less one for each step to sigma_down = 0 or from sigma = 0.

    Raises:
        ValueError: eta below 0, eta above 0 with sigmas that rise, sigmas that rise to 1,
            or as ``flow_euler_table``.

    Source:
        ComfyUI's ``sample_dpmpp_2s_ancestral_RF``; Lu et al. 2022 (arXiv 2211.01095) algorithm 1.
    """
    eta, s_noise = at_least_zero("eta", eta), at_least_zero("s_noise", s_noise)
    levels = flow_levels(sigmas, num_train_timesteps)
    if eta > 0:
        levels.check_falls("flow_dpmpp_2s_ancestral_table with eta > 0", "sigmas")
    if levels.rising:
        levels.check_signal("flow_dpmpp_2s_ancestral_table")
    rows = Rows("flow_dpmpp_2s_ancestral", levels, prediction_type, clip_range)
    for i, (here, after) in enumerate(pairwise(levels.levels())):
        down, up = _flow_ancestral(here, after, eta)
        if here.sigma == 0:
            rows.add(i, here, c_0=after.alpha, c_eps=after.sigma)
            continue
        c_x, c_0 = toward(here, after.alpha, down)
        if down == 0 or after.ratio == here.ratio:
            rows.add(i, here, c_x=c_x, c_0=c_0, c_z=s_noise * up)
            continue
        if here.alpha == 0:
            middle = levels.at(_BELOW_NOISE / (1 - _BELOW_NOISE))
        else:
            middle = levels.at(math.sqrt(here.ratio) * math.sqrt(down / after.alpha))
        to_x, to_0 = toward(here, middle.alpha, middle.sigma)
        rows.add(i, here, c_x=to_x, c_0=to_0, e_x=c_x)
        rows.add(i, middle, (here.ratio, after.ratio), c_0=c_0, c_1=1.0, c_z=s_noise * up)
    return rows.table(1 if eta else 2)


def _flow_ancestral(here: Level, after: Level, eta: float) -> tuple[float, float]:
    """The part of sigma' that the step keeps, scaled to alpha', and the noise to add."""
    if eta == 0 or after.sigma == 0:
        return after.sigma, 0.0
    down = after.sigma * max(1 + eta * (after.sigma / here.sigma - 1), 0.0)
    kept = down * after.alpha / (1 - down)
    return kept, math.sqrt((after.sigma - kept) * (after.sigma + kept))
