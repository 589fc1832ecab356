"""UniPC: a predictor and a corrector that share a model call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from diffcore._checks import as_int, check_choice
from diffcore._types import ClipRange
from diffcore.solvers.exponential import first_order_weight, interpolating_weights, last_finite
from diffcore.solvers.levels import Levels, as_levels
from diffcore.solvers.rows import Rows, check_order, move
from diffcore.solvers.table import SolverTable

SOLVER_TYPES = ("bh1", "bh2")


def unipc_table(
    levels: Levels,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """UniPC of order p: predict with p values of x0, correct with the next one. Order p + 1.

    Predictor: x' = (sigma' / sigma) x_c + alpha' sum of w_k x0_k, with the weights w of the
    polynomial in lambda through the current x0 and the p - 1 before it. Corrector: the same with
    the new x0 as one more node. B(h) = -h ("bh1") or expm1(-h) ("bh2") matters only where the
    solver of Zhao et al. sets a weight to 1/2: predictor of order 2, corrector of order 1. One row
    does both: x is the predicted sample, x_c = x + alpha sum of (w^c_k - w_k) x0_k, because the
    previous x has the same factor in both, and the next prediction starts from x_c.

    The first step has order 1, and the stated order holds where its error decays (for p = 3 the
    corrected first step has a local error of third order). A step to sigma = 0 has order 1; a step
    from alpha = 0 has order 1 and no corrector. Levels may rise: a step from sigma = 0 has order 1
    and no corrector, and a step to alpha = 0 has order 1.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        order: p, 1 to 3.
        solver_type: "bh1" or "bh2".
        lower_order_final: Whether the last steps have order at most 3, 2, 1.
        disable_corrector: Indices of steps whose result is not corrected.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: Order outside 1 .. 3, unknown solver_type, or as ``NoiseLevels``.

    Source:
        Zhao et al. 2023 (arXiv 2302.04867) algorithms 1 and 2, eq. 5 and 9.
    """
    order = check_order(order, 3)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    levels = as_levels(levels, prediction_type)
    if not hasattr(disable_corrector, "__iter__"):
        kind = type(disable_corrector).__name__
        raise TypeError(f"disable_corrector must be a sequence of ints, got {kind}")
    uncorrected = {as_int("disable_corrector", i) for i in disable_corrector}
    rows = Rows(f"unipc-{order}", levels, prediction_type, clip_range)
    points, steps = levels.levels(), len(levels)
    lambdas = [level.lam for level in points]
    predicted: list[float] = []  # weights of the last prediction, of x0 at i-1, i-2, ...
    for i, (here, after) in enumerate(itertools.pairwise(points)):
        used = min(order, steps - i) if lower_order_final else order
        if here.sigma == 0:  # lambda is infinite, up the noise levels
            rows.add(i, here, e_0=1.0, **move(here, after.alpha, after.sigma))
            predicted = [1.0]
            continue
        if after.sigma == 0 or after.alpha == 0 or lambdas[i] == lambdas[i + 1]:
            used = 1
        used = last_finite(lambdas, i, used) if math.isfinite(lambdas[i]) else 1
        weights = _predictor(lambdas, i, used, solver_type)
        c_x = after.sigma / here.sigma
        if used == 1 and after.alpha > 0:  # no logarithm: both ends may be infinite
            weights = [1 - here.alpha * after.sigma / (after.alpha * here.sigma)]
        columns = [after.alpha * w for w in weights] + [0.0] * (4 - used)
        if after.alpha == 0:
            columns[0] = -here.alpha * c_x
        if i > 0 and i - 1 not in uncorrected and math.isfinite(lambdas[i - 1]):
            corrected = _corrector(lambdas, i - 1, len(predicted), solver_type)
            for k, w in enumerate(corrected):
                before = predicted[k - 1] if k else 0.0
                columns[k] += c_x * here.alpha * (w - before)
        rows.add(i, here, c_x=c_x, e_0=1.0, **{f"c_{k}": c for k, c in enumerate(columns)})
        predicted = weights
    return rows.table(order + 1)


def _predictor(lambdas: Sequence[float], i: int, used: int, solver_type: str) -> list[float]:
    """Weights of x0 at i, i-1, ... for the step from i to i+1."""
    if used == 1:
        return [1.0]
    h = lambdas[i + 1] - lambdas[i]
    nodes = [(lambdas[i - k] - lambdas[i]) / h for k in range(used)]
    if used == 2:
        slope = _half_b(h, solver_type) / nodes[1]
        return [first_order_weight(h) - slope, slope]
    return interpolating_weights(nodes, h)


def _corrector(lambdas: Sequence[float], i: int, used: int, solver_type: str) -> list[float]:
    """Weights of x0 at i+1, i, i-1, ... for the same step."""
    h = lambdas[i + 1] - lambdas[i]
    if used == 1:
        slope = _half_b(h, solver_type)
        return [slope, first_order_weight(h) - slope]
    nodes = [(lambdas[i + 1 - k] - lambdas[i]) / h for k in range(used + 1)]
    return interpolating_weights(nodes, h)


def _half_b(h: float, solver_type: str) -> float:
    return (h if solver_type == "bh1" else first_order_weight(h)) / 2
