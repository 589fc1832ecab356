"""Steps with the noise that the model predicts as a polynomial in lambda, integrated exactly.

In lambda = log(alpha / sigma) the probability flow is also x' = (alpha' / alpha) x - sigma'
integral of exp(lambda' - l) epsilon(l) dl from lambda to lambda'. So the weights of epsilon are
those of ``diffcore.solvers.exponential`` with H = -h, times sigma'. In the diffusion SDE of
strength eta, the integral has the factor 1 + eta, and the noise the variance eta (exp(2 h) - 1)
sigma'^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffcore.solvers.levels import Level
from diffcore.solvers.rows import move


def first_order(here: Level, after: Level, eta: float) -> dict[str, float]:
    """The columns of x' for a constant epsilon; its noise is ``added_noise``.

    Args:
        here: The level of x.
        after: The level to step to.
        eta: Strength of the noise; not read in a step to sigma = 0.

    Returns:
        Columns for ``Rows.add``.
    """
    columns = move(here, after.alpha, after.sigma)
    if eta == 0 or after.sigma == 0:
        return columns
    keep = after.alpha / here.alpha
    return {
        "c_x": (1 + eta) * columns["c_x"] - eta * keep,
        "c_0": (1 + eta) * columns["c_0"],
    }


def added_noise(here: Level, after: Level, eta: float) -> float:
    """Standard deviation of the noise that a step adds; 0 to sigma = 0.

    Args:
        here: The level of x.
        after: The level to step to.
        eta: Strength of the noise.

    Returns:
        sigma' sqrt(eta (exp(2 h) - 1)).
    """
    if eta == 0 or after.sigma == 0:
        return 0.0
    carried = after.alpha * here.sigma / here.alpha  # sigma' exp(h)
    return math.sqrt(eta * (carried - after.sigma) * (carried + after.sigma))


def combination(level: Level, c_x: float, weights: Sequence[float]) -> dict[str, float]:
    """The columns of x' = c_x x + sum of w_k epsilon_k, with epsilon_0 from this level.

    epsilon is (x - alpha x_0) / sigma with the x_0 that was clipped or thresholded.

    Args:
        level: The level of x, above sigma = 0.
        c_x: Factor of x.
        weights: w, those of h_1, h_2, h_3 after that of the level itself.

    Returns:
        Columns for ``Rows.add``.
    """
    own, *before = weights
    return {
        "c_x": c_x + own / level.sigma,
        "c_0": -own * level.alpha / level.sigma,
        **{f"c_{k}": w for k, w in enumerate(before, 1)},
    }


def history(level: Level) -> dict[str, float]:
    """The columns of h' = epsilon, see ``combination``.

    Args:
        level: The level of x.

    Returns:
        Columns for ``Rows.add``.
    """
    if level.sigma == 0:
        return {"e_eps": 1.0}
    return {"e_x": 1 / level.sigma, "e_0": -level.alpha / level.sigma}
