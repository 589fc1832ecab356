"""RePaint: ancestral sampling that jumps back to noisier levels."""

from __future__ import annotations

import math
from collections.abc import Iterator

from diffcore._checks import as_int, check_choice
from diffcore._types import ClipRange
from diffcore.coefficients.step import FIXED_VARIANCE_TYPES, LEARNED, posterior_coefficients
from diffcore.solvers.levels import Level, Levels, as_levels
from diffcore.solvers.rows import Rows, jump
from diffcore.solvers.table import SolverTable


def repaint_table(
    levels: Levels,
    *,
    jump_length: int = 10,
    num_resamples: int = 10,
    variance_type: str = "fixed_small",
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Ancestral sampling that jumps back up: x' = r (A x0 + B x) + c_z z. Order 1.

    After every ``jump_length`` steps the samples jump ``jump_length`` levels back up, and take the
    steps down again, ``num_resamples`` times in all. Between two such visits, what is generated
    adapts to the known part of an image that ``sample(before_model=)`` puts in.

    A jump is part of the row that comes before it: both are Gaussian, so one row does the step of
    ``ddpm_table`` and then the jump, with c_z^2 = r^2 variance + sigma_u^2 - r^2 sigma_t^2 and r =
    alpha_u / alpha_t, where t is the level below and u the level above. No model is called for a
    jump. The level below is never visited, so known pixels are put in at the level that is reached,
    u: their distribution there, and that of all other pixels, is as if they had been put in before
    the jump.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        jump_length: How many levels a jump goes up; RePaint's ``jump_length``.
        num_resamples: How often the steps of a jump are taken; RePaint's ``jump_n_sample``. 1 is
            ``ddpm_table``.
        variance_type: "fixed_small" or "fixed_large", see ``ddpm_table``. A predicted variance
            cannot be merged with a jump.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N + (num_resamples - 1) jump_length K rows for K jumps, one at each multiple of
        ``jump_length`` from the second-to-last level up that has ``jump_length`` levels above it.

    Raises:
        TypeError: ``jump_length`` or ``num_resamples`` is not an int.
        ValueError: One of them is below 1, a variance that is learned, or as ``NoiseLevels``.

    Source:
        Lugmayr et al. 2022 (RePaint, arXiv 2201.09865) algorithm 1 and appendix B.
    """
    jump_length = as_int("jump_length", jump_length, 1)
    num_resamples = as_int("num_resamples", num_resamples, 1)
    if variance_type in LEARNED:
        raise ValueError(
            f"variance_type must be one of {', '.join(map(repr, FIXED_VARIANCE_TYPES))} in a table "
            f"with jumps, got {variance_type!r}"
        )
    check_choice("variance_type", variance_type, FIXED_VARIANCE_TYPES)
    levels = as_levels(levels, prediction_type)
    points = levels.levels()
    rows = Rows("repaint", levels, prediction_type, clip_range)
    last = len(levels)
    for i, (here, below, end) in enumerate(_visits(last, jump_length, num_resamples)):
        ends = (points[last - here], points[last - below], points[last - end])
        columns = _row(*ends, variance_type)
        rows.add(i, ends[0], (ends[0].ratio, ends[2].ratio), **columns)
    return rows.table(1)


def _visits(steps: int, jump_length: int, num_resamples: int) -> Iterator[tuple[int, int, int]]:
    """The rows as levels counted from the last, 0: the one of x, the one below it, and its end."""
    left = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), num_resamples - 1)
    here = steps
    while here > 0:
        end = below = here - 1
        if left.get(below, 0):
            left[below] -= 1
            end = below + jump_length
        yield here, below, end
        here = end


def _row(here: Level, below: Level, end: Level, variance_type: str) -> dict[str, float]:
    """c_x, c_0 and c_z of the ancestral step to the level below, and of the jump from there."""
    ends = (here.alpha, here.sigma, below.alpha, below.sigma)
    c_0, c_x, small, large = map(float, posterior_coefficients(*ends))
    variance = 0.0 if below.sigma == 0 else small if variance_type == "fixed_small" else large
    if end is below:
        return {"c_x": c_x, "c_0": c_0, "c_z": math.sqrt(variance)}
    r, added = jump(below, end)
    return {"c_x": r * c_x, "c_0": r * c_0, "c_z": math.sqrt(r * r * variance + added)}
