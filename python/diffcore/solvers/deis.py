"""DEIS: the predicted noise as a polynomial, in one of three variables, integrated over sigma."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from diffcore._checks import check_choice
from diffcore._kernels.step import MOST_HISTORY
from diffcore._types import ClipRange
from diffcore.solvers.adams import adams_weights
from diffcore.solvers.exponential import interpolating_weights, last_finite
from diffcore.solvers.levels import Level, Levels, as_levels
from diffcore.solvers.noise_form import combination, first_order, history
from diffcore.solvers.rows import Rows, check_order, move
from diffcore.solvers.table import SolverTable

DEIS_VARIABLES = ("log_rho", "rho", "t")

# With at least this many steps, diffusers keeps the order to the end.
_MANY_STEPS = 15
# DDPM's linear schedule in continuous time.
_BETA_MIN, _BETA_MAX = 0.1, 20.0
# Gauss-Legendre with eight points, on this many parts of a step in log rho.
_PARTS = 16
_GAUSS = (
    (0.1834346424956498, 0.3626837833783620),
    (0.5255324099163290, 0.3137066458778873),
    (0.7966664774136267, 0.2223810344533745),
    (0.9602898564975363, 0.1012285362903763),
)


def vp_time(ratio: float, *, beta_min: float = _BETA_MIN, beta_max: float = _BETA_MAX) -> float:
    """The time of the linear variance preserving SDE where sigma / alpha is ``ratio``.

    sigma^2 / alpha^2 = exp((beta_max - beta_min) t^2 / 2 + beta_min t) - 1.

    Args:
        ratio: sigma / alpha, at least 0.
        beta_min: beta at t = 0.
        beta_max: beta at t = 1.

    Returns:
        t; above 1 where the noise is more than at t = 1.
    """
    growth = 2 * math.log(math.hypot(1, ratio)) if ratio > 1 else math.log1p(ratio * ratio)
    return 2 * growth / (beta_min + math.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * growth))


def deis_table(
    levels: Levels,
    *,
    order: int = 3,
    variable: str = "log_rho",
    time_of: Callable[[float], float] = vp_time,
    lower_order_final: bool = True,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DEIS, multistep: epsilon as a polynomial through the last predictions. Order 1 to 4.

    With rho = sigma / alpha: x' / alpha' = x / alpha + integral of epsilon from rho to rho', where
    epsilon is the polynomial through its last ``order`` values in log rho (diffusers'
    ``DEISMultistepScheduler``), in rho (rhoAB), or in a time t (tAB; ComfyUI's ``sample_deis``).
    The first step has order 1, the second at most 2, and so on. The stated order holds where the
    error of the first steps decays. A step to sigma = 0 or to alpha = 0 has order 1, and so has one
    whose history begins at alpha = 0 or, up the noise levels, at sigma = 0. Levels may rise.

    In log rho the weights of order 1 and 2 are those of ``dpmpp_table`` with "dpmsolver" and
    "heun", and of order 3 with ``exact_third_order``; in rho, without clip, those of ``lms_table``.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        order: 1 to 4.
        variable: "log_rho", "rho" or "t".
        time_of: t as a smooth rising function of sigma / alpha, for "t"; by default that of DDPM's
            linear schedule. ComfyUI has ``vp_time`` with beta_min and beta_max for its range of
            sigmas.
        lower_order_final: With fewer than 15 steps, the last has order 1, the one before it at
            most 2, and the one before that at most 3.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: Order outside 1 .. 4, unknown ``variable``, or as ``NoiseLevels``.

    Source:
        Zhang and Chen 2023 (arXiv 2204.13902) section 3.2 and appendix.
    """
    order = check_order(order, MOST_HISTORY + 1)
    check_choice("variable", variable, DEIS_VARIABLES)
    if not callable(time_of):
        raise TypeError(f"time_of must be callable, got {type(time_of).__name__}")
    levels = as_levels(levels, prediction_type)
    rows = Rows(f"deis-{order}", levels, prediction_type, clip_range)
    points, steps = levels.levels(), len(levels)
    lambdas = [level.lam for level in points]
    for i, (here, after) in enumerate(itertools.pairwise(points)):
        if here.sigma == 0 or after.alpha == 0:  # lambda is infinite, up the noise levels
            rows.add(i, here, **move(here, after.alpha, after.sigma))
            continue
        limit = min(order, steps - i) if lower_order_final and steps < _MANY_STEPS else order
        if after.sigma == 0 or lambdas[i] == lambdas[i + 1]:
            limit = 1
        used = last_finite(lambdas, i, limit) if math.isfinite(lambdas[i]) else 1
        if used == 1:
            columns = first_order(here, after, 0.0)
        else:
            known = points[i + 1 - used : i + 1][::-1]
            weights = _weights(known, after, variable, time_of)
            columns = combination(here, after.alpha / here.alpha, weights)
        rows.add(i, here, **columns, **history(here))
    return rows.table(order)


def _weights(
    known: Sequence[Level], after: Level, variable: str, time_of: Callable[[float], float]
) -> list[float]:
    """Weights of epsilon at the levels ``known``, the current one first, in x'."""
    here = known[0]
    if variable == "log_rho":
        h = after.lam - here.lam
        nodes = [(level.lam - here.lam) / h for level in known]
        return [after.sigma * w for w in interpolating_weights(nodes, -h)]
    ratios = [level.ratio for level in known]
    if variable == "rho":
        return [after.alpha * w for w in adams_weights(ratios, after.ratio)]
    times = [time_of(ratio) for ratio in ratios]
    total = [0.0] * len(times)
    logs = math.log(ratios[0]), math.log(after.ratio)
    half = (logs[1] - logs[0]) / _PARTS / 2
    for part in range(_PARTS):
        middle = logs[0] + half * (2 * part + 1)
        for node, weight in _GAUSS:
            for sign in (-1, 1):
                ratio = math.exp(middle + sign * node * half)
                t = time_of(ratio)
                for j, own in enumerate(times):
                    value = weight * half * ratio
                    for k, other in enumerate(times):
                        if k != j:
                            value *= (t - other) / (own - other)
                    total[j] += value
    return [after.alpha * w for w in total]
