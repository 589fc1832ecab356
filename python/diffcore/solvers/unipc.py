"""UniPC: a predictor and a corrector that share a model call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from diffcore._checks import as_flag, as_int, check_choice
from diffcore._types import ClipRange
from diffcore.solvers.dpmpp import multistep_weights
from diffcore.solvers.exponential import first_order_weight, interpolating_weights, last_finite
from diffcore.solvers.levels import Level, Levels, as_levels
from diffcore.solvers.noise_form import combination, first_order, history
from diffcore.solvers.rows import Rows, check_order, move
from diffcore.solvers.table import SolverTable

SOLVER_TYPES = ("bh1", "bh2")
PREDICTORS = ("unip", "midpoint", "heun")


def unipc_table(
    levels: Levels,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    solver_p: str = "unip",
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

    ``predict_x0=False`` takes the predicted noise as the polynomial: x' = (alpha' / alpha) x_c +
    sigma' sum of w_k epsilon_k, with the weights for -h and B(h) = h or expm1(h). ``solver_p``
    predicts with another solver: the multistep DPM-Solver++ (DPM-Solver without ``predict_x0``), of
    type "midpoint" or "heun". The corrector raises its order by one, which is 2 for p = 3 as
    published. Predictor and corrector have the same x0, as in the paper; diffusers' ``solver_p``
    computes another x0 from x_c, which is the same for prediction_type "sample".

    The first step has order 1, and the stated order holds where its error decays (for p = 3 the
    corrected first step has a local error of third order). A step to sigma = 0 has order 1; a step
    from alpha = 0 has order 1 and no corrector. Levels may rise: a step from sigma = 0 has order 1
    and no corrector, and a step to alpha = 0 has order 1.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        order: p, 1 to 3.
        solver_type: "bh1" or "bh2".
        predict_x0: The polynomial is that of x0, and not of epsilon.
        solver_p: The predictor: "unip", "midpoint" or "heun".
        lower_order_final: Whether the last steps have order at most 3, 2, 1.
        disable_corrector: Indices of steps whose result is not corrected.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: Order outside 1 .. 3, unknown solver_type or solver_p, or as ``NoiseLevels``.

    Source:
        Zhao et al. 2023 (arXiv 2302.04867) algorithms 1 and 2, eq. 5 and 9.
    """
    order = check_order(order, 3)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    check_choice("solver_p", solver_p, PREDICTORS)
    of_noise = not as_flag("predict_x0", predict_x0)
    levels = as_levels(levels, prediction_type)
    if not hasattr(disable_corrector, "__iter__"):
        kind = type(disable_corrector).__name__
        raise TypeError(f"disable_corrector must be a sequence of ints, got {kind}")
    uncorrected = {as_int("disable_corrector", i) for i in disable_corrector}
    rows = Rows(f"unipc-{order}", levels, prediction_type, clip_range)
    points, steps = levels.levels(), len(levels)
    lambdas = [level.lam for level in points]
    scheme = _Scheme(lambdas, solver_type, solver_p, -1.0 if of_noise else 1.0)
    predicted: list[float] = []  # weights of the last prediction, of i-1, i-2, ...
    for i, (here, after) in enumerate(itertools.pairwise(points)):
        used = min(order, steps - i) if lower_order_final else order
        if here.sigma == 0:  # lambda is infinite, up the noise levels
            rows.add(i, here, e_0=1.0, **move(here, after.alpha, after.sigma))
            predicted = [1.0]
            continue
        if after.sigma == 0 or after.alpha == 0 or lambdas[i] == lambdas[i + 1]:
            used = 1
        used = last_finite(lambdas, i, used) if math.isfinite(lambdas[i]) else 1
        weights = [_first(here, after, of_noise)] if used == 1 else scheme.predictor(i, used)
        shift = [0.0] * 4  # what the correction adds to x, without alpha or sigma
        if i > 0 and i - 1 not in uncorrected and math.isfinite(lambdas[i - 1]):
            corrected = scheme.corrector(i - 1, len(predicted))
            for k, w in enumerate(corrected):
                shift[k] = w - (predicted[k - 1] if k else 0.0)
        if of_noise:
            _add_of_noise(rows, i, (here, after), weights, shift)
        else:
            _add_of_x0(rows, i, (here, after), weights, shift)
        predicted = weights
    published = solver_p != "unip" and order == 3  # its third order is a second order
    return rows.table(3 if published else order + 1)


def _add_of_x0(
    rows: Rows, i: int, step: tuple[Level, Level], weights: list[float], shift: list[float]
) -> None:
    here, after = step
    c_x = after.sigma / here.sigma
    columns = [after.alpha * w for w in weights] + [0.0] * (4 - len(weights))
    if after.alpha == 0:
        columns[0] = -here.alpha * c_x
    for k, w in enumerate(shift):
        columns[k] += c_x * here.alpha * w
    rows.add(i, here, c_x=c_x, e_0=1.0, **{f"c_{k}": c for k, c in enumerate(columns)})


def _add_of_noise(
    rows: Rows, i: int, step: tuple[Level, Level], weights: list[float], shift: list[float]
) -> None:
    here, after = step
    keeps = history(here)
    if len(weights) > 1:
        keep = after.alpha / here.alpha
        columns = [after.sigma * w for w in weights] + [0.0] * (4 - len(weights))
        columns = [c + keep * here.sigma * w for c, w in zip(columns, shift, strict=True)]
        rows.add(i, here, **combination(here, keep, columns), **keeps)
        return
    # Both ends may be infinite: the step of order 1, and the correction's part of it.
    added = first_order(here, after, 0.0)
    if any(shift):
        keep = after.alpha / here.alpha
        correction = combination(here, 0.0, [keep * here.sigma * w for w in shift])
        for name, value in correction.items():
            added[name] = added.get(name, 0.0) + value
    rows.add(i, here, **added, **keeps)


def _first(here: Level, after: Level, of_noise: bool) -> float:
    """The weight of order 1 without a logarithm; 1 where it is infinite, and read by no row."""
    if of_noise:
        if after.sigma == 0 or here.alpha == 0:
            return 1.0
        return 1 - after.alpha * here.sigma / (after.sigma * here.alpha)
    return 1 - here.alpha * after.sigma / (after.alpha * here.sigma) if after.alpha > 0 else 1.0


class _Scheme:
    """The weights of predictor and corrector; ``sign`` is -1 for those of epsilon."""

    def __init__(
        self, lambdas: Sequence[float], solver_type: str, solver_p: str, sign: float
    ) -> None:
        self._lambdas = lambdas
        self._solver_type = solver_type
        self._solver_p = solver_p
        self._sign = sign

    def predictor(self, i: int, used: int) -> list[float]:
        """Weights of the x0 or epsilon at i, i-1, ..., two or more, for the step to i+1."""
        h, nodes = self._nodes(i, i, used)
        if self._solver_p != "unip":
            return multistep_weights(nodes, self._sign * h, self._solver_p, exact=False)
        if used == 2:
            slope = self._half_b(self._sign * h) / nodes[1]
            return [first_order_weight(self._sign * h) - slope, slope]
        return interpolating_weights(nodes, self._sign * h)

    def corrector(self, i: int, used: int) -> list[float]:
        """Weights of x0 or epsilon at i+1, i, i-1, ... for the same step."""
        h, nodes = self._nodes(i, i + 1, used + 1)
        if used == 1:
            slope = self._half_b(self._sign * h)
            return [slope, first_order_weight(self._sign * h) - slope]
        return interpolating_weights(nodes, self._sign * h)

    def _nodes(self, i: int, latest: int, count: int) -> tuple[float, list[float]]:
        here = self._lambdas[i]
        h = self._lambdas[i + 1] - here
        return h, [(self._lambdas[latest - k] - here) / h for k in range(count)]

    def _half_b(self, big_h: float) -> float:
        return (big_h if self._solver_type == "bh1" else first_order_weight(big_h)) / 2
