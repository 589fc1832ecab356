"""Heun's steps with noise between them that leads back up: restarts, and churn on any path."""

from __future__ import annotations

import math

from diffcore._checks import as_real
from diffcore.solvers.levels import Level, NoiseLevels
from diffcore.solvers.rows import Rows, at_least_zero, move

# The most by which EDM raises a noise level, as a fraction of it.
_MAX_CHURN = math.sqrt(2) - 1


def renoise(level: Level, up: Level) -> tuple[float, float]:
    """The factors of x and of new noise that lead from a level to a noisier one.

    Args:
        level: The level of x.
        up: The noisier one.

    Returns:
        The two factors.
    """
    scale = up.alpha / level.alpha
    kept = scale * level.sigma
    return scale, math.sqrt((up.sigma - kept) * (up.sigma + kept))


def heun_rows(
    rows: Rows,
    path: str,
    step: int,
    here: Level,
    after: Level,
    up: Level | None,
    s_noise: float,
) -> None:
    """Add the rows of a step of ``heun_table``, and of the noise up that comes after it.

    Args:
        rows: The table under construction.
        path: The path of the levels.
        step: Index of the step.
        here: The level of x.
        after: Where the step leads.
        up: The noisier level that noise leads to from there, ``None`` for no noise.
        s_noise: Factor of the added noise.
    """
    scale, c_z, end = 1.0, 0.0, after.ratio
    interval = here.ratio, after.ratio
    if up is not None:
        scale, c_z = renoise(after, up)
        c_z *= s_noise
        interval = after.ratio, up.ratio
    columns = move(here, after.alpha, after.sigma)
    if after.sigma == 0 or end == here.ratio:
        columns = {name: scale * c for name, c in columns.items()}
        rows.add(step, here, interval, **columns, c_z=c_z)
        return
    # (x / size) moves with the derivative (x / size - x0) / s by s.
    size, s = (here.alpha, here.ratio) if path == "vp" else (1.0, here.sigma)
    size_after, s_after = (after.alpha, after.ratio) if path == "vp" else (1.0, after.sigma)
    half = (s_after - s) / 2
    e_x, e_0 = size_after / size * (1 + half / s), -size_after * half / s
    rows.add(step, here, (here.ratio, after.ratio), **columns, e_x=e_x, e_0=e_0)
    c_x, c_0 = scale * half / s_after, -scale * size_after * half / s_after
    rows.add(step, after, interval, c_x=c_x, c_0=c_0, c_1=scale, c_z=c_z)


def churned_levels(
    levels: NoiseLevels, s_churn: float, s_tmin: float, s_tmax: float
) -> list[Level] | None:
    """Where the model is called under churn: levels with sigma / alpha raised by 1 + gamma.

    Args:
        levels: The levels, falling.
        s_churn: How much noise is renewed over all steps.
        s_tmin: Lowest sigma that churn raises.
        s_tmax: Highest sigma that churn raises.

    Returns:
        The N levels, ``None`` without churn.

    Raises:
        ValueError: A number below 0, s_tmin above s_tmax, or levels that rise.
    """
    s_churn, s_tmin = at_least_zero("s_churn", s_churn), at_least_zero("s_tmin", s_tmin)
    s_tmax = as_real("s_tmax", s_tmax)
    if not s_tmin <= s_tmax:
        raise ValueError(f"s_tmin must be at most s_tmax, {s_tmax}, got {s_tmin}")
    if s_churn == 0:
        return None
    levels.check_falls("s_churn > 0", "sigmas")
    gamma = min(s_churn / len(levels), _MAX_CHURN)
    return [
        levels.at(level.ratio * (1 + gamma))
        if level.alpha > 0 and s_tmin <= level.sigma <= s_tmax
        else level
        for level in levels.levels()[:-1]
    ]
