"""RES, the refined exponential solver, multistep and with ancestral noise."""

from __future__ import annotations

import math
from itertools import pairwise

from diffcore._types import ClipRange
from diffcore.solvers.exponential import interpolating_weights
from diffcore.solvers.levels import Levels, as_levels
from diffcore.solvers.rows import Rows, ancestral, at_least_zero, move
from diffcore.solvers.table import SolverTable


def res_multistep_table(
    levels: Levels,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """RES of two steps: x0 as a line in lambda, integrated exactly; then noise. Order 2 (eta = 0).

    With h the step in lambda to the level with sigma_down, and r the length of the last such step
    divided by h: ``x' = (sigma_down / sigma) x + alpha' h (b_1 x0 + b_2 x0_last) + sigma_up z``,
    ``b_2 = -phi_2(-h) / r`` and ``b_1 = phi_1(-h) - b_2``. sigma_up and sigma_down are those of
    ``euler_ancestral_table``. eta = 0 is ComfyUI's "res_multistep", and ``dpmpp_table`` of the
    "heun" type; eta = 1 is "res_multistep_ancestral". As there, the last step is counted to its
    sigma_down, not to the level that the noise led back to; with noise the order is 1. The first
    step and a step to sigma_down = 0 have order 1. Levels may rise with eta = 0.

    ComfyUI steps in -log(sigma) for rectified flows too, where this steps in lambda. For ComfyUI's
    numbers give this function the sigmas alone and a model that returns x0 ("sample").

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        eta: Strength of the noise, at least 0.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: eta below 0, eta above 0 with levels that rise, or as ``NoiseLevels``.

    Source:
        Zhang et al. 2023 (arXiv 2308.02157); ComfyUI's ``sample_res_multistep`` and
        ``sample_res_multistep_ancestral``.
    """
    eta, s_noise = at_least_zero("eta", eta), at_least_zero("s_noise", s_noise)
    levels = as_levels(levels, prediction_type)
    if eta > 0:
        levels.check_falls("res_multistep_table with eta > 0")
    rows = Rows("res_multistep", levels, prediction_type, clip_range)
    last = math.inf  # the length of the last step in lambda, down to its sigma_down
    for i, (here, after) in enumerate(pairwise(levels.levels())):
        down, up = ancestral(here, after, eta)
        finite = here.sigma > 0 and here.alpha > 0 and down > 0 and after.alpha > 0
        h = math.log(after.alpha / down) - here.lam if finite else math.inf
        columns = move(here, after.alpha, down)
        if i and h and last and math.isfinite(h) and math.isfinite(last):
            now, before = interpolating_weights([0.0, -last / h], h)
            columns = {
                "c_x": down / here.sigma,
                "c_0": after.alpha * now,
                "c_1": after.alpha * before,
            }
        rows.add(i, here, **columns, e_0=1.0, c_z=s_noise * up)
        last = h
    return rows.table(1 if eta else 2)
