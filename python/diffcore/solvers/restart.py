"""Restart sampling: Heun's steps down, noise back up, and down again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from diffcore._checks import as_int, as_positive
from diffcore._types import ClipRange
from diffcore.schedules import get_sigmas_karras
from diffcore.solvers.heun_steps import heun_rows
from diffcore.solvers.levels import Level, Levels, NoiseLevels, as_levels
from diffcore.solvers.rows import Rows, at_least_zero
from diffcore.solvers.table import SolverTable

_FIELDS = ("sigma_min", "sigma_max", "num_steps", "num_repeats")

_Restart: TypeAlias = tuple[float, float, int, int]


def restart_table(
    levels: Levels,
    *,
    restarts: Sequence[_Restart] = (),
    s_noise: float = 1.0,
    rho: float = 7.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Heun's method, with jumps back up to noisier levels: new noise contracts old errors.

    At the level nearest to each ``sigma_min`` the samples get the noise that leads up to the level
    nearest to ``sigma_max``, and go down again in ``num_steps`` steps of ``heun_table``, along
    Karras' levels between the two; this ``num_repeats`` times. Then the steps of ``levels`` go on.
    A jump is part of the row before it, x' = r (...) + c_z z with r = alpha_u / alpha_t and c_z^2
    = sigma_u^2 - r^2 sigma_t^2, so it takes no launch. Order 1 (2 without restarts).

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        restarts: (sigma_min, sigma_max, num_steps, num_repeats) of each, in units of sigma / alpha.
            In implementations that count levels, ``restart_steps`` is num_steps + 1.
        s_noise: Factor of the added noise.
        rho: Of Karras' levels within an interval, see ``get_sigmas_karras``.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        2N rows (2N - 1 if the last sigma is 0) and 2 num_steps num_repeats more for each restart.
        A step of the table is one of Heun's.

    Raises:
        TypeError: restarts is not a sequence of four numbers each, or a count no int.
        ValueError: Counts below 1, an interval whose ends are at one level or not between levels
            with alpha and sigma above 0, two restarts from one level, levels that rise, variance
            preserving levels that start at alpha = 0, or as ``NoiseLevels``.

    Source:
        Xu et al. 2023 (arXiv 2306.14878) algorithm 1.
    """
    s_noise, rho = at_least_zero("s_noise", s_noise), as_positive("rho", rho)
    levels = as_levels(levels, prediction_type)
    levels.check_falls("restart_table")
    if levels.path == "vp":
        levels.check_signal("restart_table")
    points = levels.levels()
    jumps = _jumps(points, restarts)
    rows = Rows("restart", levels, prediction_type, clip_range)
    visits: list[Level] = [points[0]]  # the levels in their order; where they rise, noise does it
    for i, after in enumerate(points[1:], 1):
        visits.append(after)
        if i in jumps:
            top, steps, repeats = jumps[i]
            visits += _way_down(levels, points[top], after, steps, rho) * repeats
    step = 0
    for i, (here, after) in enumerate(pairwise(visits)):
        if after.ratio > here.ratio:
            continue
        later = visits[i + 2] if i + 2 < len(visits) else after
        up = later if later.ratio > after.ratio else None
        heun_rows(rows, levels.path, step, here, after, up, s_noise)
        step += 1
    return rows.table(1 if jumps else 2)


def _way_down(
    levels: NoiseLevels, top: Level, bottom: Level, steps: int, rho: float
) -> list[Level]:
    """The levels of one repeat, both ends included."""
    inner = get_sigmas_karras(steps + 1, bottom.ratio, top.ratio, rho).tolist()[1:-2]
    return [top, *map(levels.at, inner), bottom]


def _jumps(
    points: Sequence[Level], restarts: Sequence[_Restart]
) -> dict[int, tuple[int, int, int]]:
    """The index of the level of each jump: of the level above, the steps down, the repeats."""
    found: dict[int, tuple[int, int, int]] = {}
    if not isinstance(restarts, Sequence) or isinstance(restarts, str):
        raise TypeError(f"restarts must be a sequence, got {type(restarts).__name__}")
    for number, restart in enumerate(restarts):
        name = f"restarts[{number}]"
        if not isinstance(restart, Sequence) or len(restart) != len(_FIELDS):
            raise TypeError(f"{name} must be ({', '.join(_FIELDS)}), got {restart!r}")
        named = [(f"{name}: {field}", value) for field, value in zip(_FIELDS, restart, strict=True)]
        low, high = (as_positive(*one) for one in named[:2])
        steps, repeats = (as_int(*one, 1) for one in named[2:])
        bottom, top = _nearest(points, low), _nearest(points, high)
        if points[bottom].sigma == 0 or points[top].alpha == 0:
            raise ValueError(
                f"{name} must lie between levels with alpha and sigma above 0, got {restart!r}"
            )
        if not top < bottom:
            raise ValueError(
                f"{name} must have a level of sigma_max above that of sigma_min, got {restart!r}, "
                f"where both are nearest to sigma / alpha = {points[bottom].ratio:.6g}"
            )
        if bottom in found:
            raise ValueError(
                f"{name} must not start at the level of another restart, got {restart!r}"
            )
        found[bottom] = top, steps, repeats
    return found


def _nearest(points: Sequence[Level], ratio: float) -> int:
    return min(range(len(points)), key=lambda i: abs(points[i].ratio - ratio))
