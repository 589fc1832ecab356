"""ER-SDE-Solvers: the extended reverse-time SDE, whose noise is a function of the level."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from diffcore._checks import as_int
from diffcore._types import ClipRange
from diffcore.solvers.exponential import last_finite
from diffcore.solvers.levels import Levels, NoiseLevels, as_levels
from diffcore.solvers.rows import Rows, at_least_zero, check_order, move
from diffcore.solvers.table import SolverTable

# 1 - (what is kept of the noise) below this is rounding: the scaler is that of the ODE.
_NO_NOISE = 1e-14
_MOST_POINTS = 10**6
_LARGEST_EXPONENT = 600.0  # beyond sigma / alpha = 2e9, whose exponential is no float64


def er_sde_table(
    levels: Levels,
    *,
    order: int = 3,
    noise_scaler: Callable[[float], float] | None = None,
    s_noise: float = 1.0,
    num_integration_points: int = 200,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """ER-SDE-Solver of order 1, 2 or 3: x0 expanded in l = sigma / alpha. Order 1 with noise.

    With phi the ``noise_scaler`` and r = phi(l') / phi(l): ``x' = (alpha' / alpha) r x + alpha' (1
    - r) x0 + alpha' (l' - l + phi(l') S) D + alpha' ((l' - l)^2 / 2 + phi(l') S_u) U + alpha'
    sqrt(l'^2 - l^2 r^2) z``. D is the divided difference of the last two x0, U that of the last two
    D (over half the distance of three levels), S the integral of 1 / phi from l' to l, and S_u that
    of (u - l) / phi(u). order = 2 leaves out U, order = 1 D as well. The first step has order 1,
    the second at most 2. A step to sigma = 0 is x0.

    phi(u) = u is the probability flow, without noise (order 1, 2, 2); phi(u) = u^2 the
    reverse-time SDE, ``ddpm_table`` for order 1. The default is ``u (exp(u^0.3) + 10)``.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        order: 1, 2 or 3; ComfyUI's ``max_stage``.
        noise_scaler: phi, a function of sigma / alpha, above 0; phi(u) / u must not fall.
        s_noise: Factor of the added noise.
        num_integration_points: Of the left Riemann sums for S and S_u; 200 as published.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        TypeError: noise_scaler is not a function, or num_integration_points not an int.
        ValueError: order outside 1 .. 3, num_integration_points outside 1 .. 10^6, levels that
            rise, a noise_scaler that is not above 0 or asks for negative noise, levels that start
            at alpha = 0 with a custom noise_scaler, or as ``NoiseLevels``.

    Source:
        Cui et al. 2023 (arXiv 2309.06169) and its published code; ComfyUI's ``sample_er_sde``.
    """
    order, s_noise = check_order(order, 3), at_least_zero("s_noise", s_noise)
    points = as_int("num_integration_points", num_integration_points, 1)
    if points > _MOST_POINTS:
        raise ValueError(f"num_integration_points must be at most {_MOST_POINTS}, got {points}")
    levels = as_levels(levels, prediction_type)
    levels.check_falls("er_sde_table")
    scale = _scaler(noise_scaler, levels)
    rows = Rows("er_sde", levels, prediction_type, clip_range)
    all_levels = levels.levels()
    ratios, lambdas = [x.ratio for x in all_levels], [x.lam for x in all_levels]
    noisy = False
    for i, (here, after) in enumerate(pairwise(all_levels)):
        if after.sigma == 0 or after.ratio == here.ratio:
            rows.add(i, here, **move(here, after.alpha, after.sigma))
            continue
        used = last_finite(lambdas, i, order) if here.alpha > 0 else 1
        l_next, l_here = after.ratio, here.ratio
        # r, and l r / l', the part of the noise at the end that is kept from the start.
        r = scale(l_next) / scale(l_here) if here.alpha > 0 else 0.0
        kept = l_here / l_next * r if here.alpha > 0 else 0.0
        if 1 - kept < -_NO_NOISE:
            raise ValueError(
                "noise_scaler must be a function f with f(u) / u that does not fall, got one that "
                f"falls from sigma / alpha = {l_next:.6g} to {l_here:.6g}"
            )
        c_z = 0.0 if 1 - kept <= _NO_NOISE else after.sigma * math.sqrt((1 - kept) * (1 + kept))
        noisy = noisy or c_z * s_noise > 0
        weights = [1 - r, 0.0, 0.0]
        if used > 1:
            terms = _corrections(ratios, i, l_next, used, scale, points)
            weights = [w + t for w, t in zip(weights, terms, strict=True)]
        rows.add(
            i,
            here,
            c_x=after.alpha * kept * l_next / here.sigma,
            c_z=s_noise * c_z,
            e_0=1.0,
            **{f"c_{k}": after.alpha * weight for k, weight in enumerate(weights[:used])},
        )
    return rows.table(1 if noisy else min(order, 2))


def _corrections(
    ratios: list[float],
    i: int,
    l_next: float,
    used: int,
    scale: Callable[[float], float],
    points: int,
) -> list[float]:
    """What the second and third stage add to the weights of x0 of this step and the last two."""
    l_here, l_last = ratios[i], ratios[i - 1]
    dt, pace = l_next - l_here, (l_here - l_next) / points
    places = [l_next + k * pace for k in range(points)]
    inverse = [1 / scale(u) for u in places]
    stage_2 = dt + scale(l_next) * math.fsum(inverse) * pace
    slope = 1 / (l_here - l_last)
    first = [slope, -slope, 0.0]
    weights = [stage_2 * d for d in first]
    if used < 3:
        return weights
    moment = math.fsum((u - l_here) * v for u, v in zip(places, inverse, strict=True)) * pace
    stage_3 = dt * dt / 2 + scale(l_next) * moment
    earlier = 1 / (l_last - ratios[i - 2])
    across = 2 / (l_here - ratios[i - 2])
    second = [d - e for d, e in zip(first, (0.0, earlier, -earlier), strict=True)]
    return [w + stage_3 * across * d for w, d in zip(weights, second, strict=True)]


def _scaler(
    noise_scaler: Callable[[float], float] | None, levels: NoiseLevels
) -> Callable[[float], float]:
    """The function phi, whose values are checked."""
    if noise_scaler is None:
        return _published
    if not callable(noise_scaler):
        raise TypeError(f"noise_scaler must be a function, got {type(noise_scaler).__name__}")
    levels.check_signal("er_sde_table with a noise_scaler")

    def scale(u: float) -> float:
        value = float(noise_scaler(u))
        if not 0 < value < math.inf:
            raise ValueError(
                f"noise_scaler must return a number above 0, got {value} at sigma / alpha = {u:.6g}"
            )
        return value

    return scale


def _published(u: float) -> float:
    return u * (math.exp(min(u**0.3, _LARGEST_EXPONENT)) + 10)
