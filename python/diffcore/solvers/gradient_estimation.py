"""Gradient estimation: Euler's step along a combination of the last two derivatives."""

from __future__ import annotations

from itertools import pairwise

from diffcore._checks import as_real
from diffcore._types import ClipRange
from diffcore.solvers.levels import Levels, as_levels
from diffcore.solvers.rows import Rows, move
from diffcore.solvers.table import SolverTable


def gradient_estimation_table(
    levels: Levels,
    *,
    gamma: float = 2.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Euler's step along an extrapolated derivative: x' = x + (sigma' - sigma) d_bar. Order 1.

    ``d_bar = gamma d + (1 - gamma) d_last`` with ``d = (x - x0) / sigma``, the derivative of x by
    sigma; in variance preserving levels that of x / alpha by sigma / alpha. The first step and a
    step to sigma = 0 are Euler's. gamma = 1 is ``euler_table``, and 1.5 is ``lms_table(order=2)``
    for equal steps. Levels may rise.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        gamma: Weight of the current derivative; ComfyUI's ``ge_gamma``.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        TypeError: gamma is not a number.
        ValueError: gamma is not finite, or as ``NoiseLevels``.

    Source:
        Permenter and Yuan 2023 (arXiv 2306.04848) algorithm 2; ComfyUI's
        ``sample_gradient_estimation``.
    """
    gamma = as_real("gamma", gamma)
    if not abs(gamma) < float("inf"):
        raise ValueError(f"gamma must be finite, got {gamma}")
    levels = as_levels(levels, prediction_type)
    preserving = levels.path == "vp"
    lost = 1.0 if levels.path == "flow" else 0.0  # a flow's signal falls while its noise rises
    rows = Rows("gradient_estimation", levels, prediction_type, clip_range)
    for i, (here, after) in enumerate(pairwise(levels.levels())):
        if here.sigma == 0:
            history = {"e_0": -lost, "e_eps": 1.0}
        else:
            history = {"e_x": 1 / here.sigma, "e_0": -(here.alpha + lost * here.sigma) / here.sigma}
        if i == 0 or after.sigma == 0:
            rows.add(i, here, **move(here, after.alpha, after.sigma), **history)
            continue
        # Of x / alpha by sigma / alpha in a variance preserving process, else of x by sigma.
        scale = after.alpha / here.alpha if preserving else 1.0
        step = after.sigma - scale * here.sigma
        rows.add(
            i,
            here,
            c_x=scale + gamma * step * history["e_x"],
            c_0=gamma * step * history["e_0"],
            c_1=(1 - gamma) * step,
            **history,
        )
    return rows.table(1)
