"""Adams-Bashforth along the derivative (x - x0) / sigma: LMS, iPNDM and PNDM.

The coordinates are those of ``diffcore.solvers.straight``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffcore._checks import as_flag, check_choice
from diffcore._kernels.step import MOST_HISTORY
from diffcore._types import ClipRange
from diffcore.solvers.levels import Levels, NoiseLevels, as_levels
from diffcore.solvers.rows import Rows, check_order
from diffcore.solvers.straight import Straight, straight_of
from diffcore.solvers.table import SolverTable

# Gauss's rule of two points is exact up to degree 3, the highest degree used here.
_GAUSS_NODE = math.sqrt(1 / 3)
# Adams-Bashforth for equal steps, the latest derivative first.
EQUAL_STEPS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
IPNDM_STEPS = ("equal", "variable")
# How far 1 - g k may be from 0 where ``pndm_table`` divides by it.
_SMALLEST_PIVOT = 1e-3


def lms_table(
    levels: Levels,
    *,
    order: int = 4,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Adams-Bashforth for steps of any length (linear multistep).

    x' = x + integral from sigma to sigma' of the polynomial through the last ``order`` derivatives.
    The first steps have fewer derivatives: the first is Euler's, and its second-order error
    remains. The stated order holds where the first steps are short or their error decays. Levels
    may rise.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        order: 1 to 4.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: order outside 1 .. 4, or as ``heun_table``.

    Source:
        Liu et al. 2022 (arXiv 2202.09778) eq. 12 for equal steps; k-diffusion's ``sample_lms``.
    """
    order = check_order(order, MOST_HISTORY + 1)
    levels = as_levels(levels, prediction_type)
    straight = straight_of(levels, "lms_table")
    rows = Rows("lms", levels, prediction_type, clip_range)
    along = _Along(rows, levels, straight)
    for i in range(len(levels)):
        known = along.places[max(0, i + 1 - order) : i + 1][::-1]
        along.add(i, adams_weights(known, along.places[i + 1]))
    return rows.table(order)


def ipndm_table(
    levels: Levels,
    *,
    order: int = 4,
    steps: str = "equal",
    euler_at_final: bool = True,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """iPNDM: Adams-Bashforth with the weights of equal steps, whatever the steps are. Order 2.

    x' = x + (sigma' - sigma) (55 d - 59 d_1 + 37 d_2 - 9 d_3) / 24 with the last derivatives d, and
    the weights (23, -16, 5) / 12, (3, -1) / 2, 1 where fewer are known. On levels that become
    smooth as they become more, the order is min(order, 2). ``steps="variable"`` is ipndm_v of
    ComfyUI and diff-sampler, exact for steps of any length with ``order`` 1 and 2. Their weights of
    order 3 differ from Adams-Bashforth's for unequal steps. Those of order 4 differ for equal ones,
    too, and sum to 1 only where the steps have a constant ratio, so a step of another ratio leaves
    a straight path. ``lms_table`` has the exact weights for steps of any length. Levels may rise.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        order: 1 to 4, the number of derivatives used.
        steps: "equal" (ipndm) or "variable" (ipndm_v).
        euler_at_final: A step to sigma = 0 is Euler's, as in ComfyUI. diffusers' ``IPNDMScheduler``
            has ``False``.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: order outside 1 .. 4, unknown ``steps``, or as ``heun_table``.

    Source:
        Zhang and Chen 2023 (arXiv 2204.13902) eq. 15; ComfyUI's ``sample_ipndm`` and
        ``sample_ipndm_v``.
    """
    order = check_order(order, MOST_HISTORY + 1)
    check_choice("steps", steps, IPNDM_STEPS)
    euler_at_final = as_flag("euler_at_final", euler_at_final)
    levels = as_levels(levels, prediction_type)
    straight = straight_of(levels, "ipndm_table")
    rows = Rows("ipndm" if steps == "equal" else "ipndm_v", levels, prediction_type, clip_range)
    along = _Along(rows, levels, straight)
    for i, after in enumerate(levels.levels()[1:]):
        used = 1 if after.sigma == 0 and euler_at_final else min(order, i + 1)
        lengths = [b - a for a, b in zip(along.places[:-1], along.places[1:], strict=True)]
        recent = lengths[i + 1 - used : i + 1][::-1]
        known = EQUAL_STEPS[used - 1] if steps == "equal" else _variable_weights(recent)
        along.add(i, [lengths[i] * w for w in known])
    return rows.table(min(order, 2) if steps == "equal" or order == 4 else order)


def pndm_table(
    levels: Levels,
    *,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """PNDM without Runge-Kutta steps (PLMS): Heun's step first, then Adams-Bashforth. Order 2.

    The first step calls the model at both of its ends, x' = x + (sigma' - sigma) (d + d') / 2, and
    again at the second level, which is in the schedule twice. Then the weights are those of
    ``ipndm_table`` with the first derivative and not d': (3, -1) / 2, (23, -16, 5) / 12 and (55,
    -59, 37, -9) / 24, also in a step to sigma = 0. The fourth of the last derivatives is older than
    the history of a row where it is first used, and follows there from the samples since. Levels
    may rise.

    The warm-up by pseudo Runge-Kutta steps (``skip_prk_steps=False`` in diffusers) has no table: it
    needs derivatives that are 12 model calls old.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N + 1 rows, one if N = 1.

    Raises:
        ValueError: Steps that grow such that the first derivative does not follow, or as
            ``heun_table``.

    Source:
        Liu et al. 2022 (arXiv 2202.09778) eq. 9 and 12; diffusers' ``PNDMScheduler`` with
        ``skip_prk_steps=True``.
    """
    levels = as_levels(levels, prediction_type)
    straight = straight_of(levels, "pndm_table")
    rows = Rows("pndm", levels, prediction_type, clip_range)
    along = _Along(rows, levels, straight)
    lengths = [b - a for a, b in zip(along.places[:-1], along.places[1:], strict=True)]
    along.add(0, [lengths[0]])
    if len(levels) > 1:
        # Its h is d' + (2 / length) x, from which the first derivative follows later.
        half = lengths[0] / 2
        along.correct(half)
    for i, length in enumerate(lengths[1:], 1):
        weights = [length * w for w in EQUAL_STEPS[min(i, 3)]]
        if i == 1:
            along.add(i, [weights[0], 0.0, weights[1]])
        elif i == 2:
            along.add(i, [weights[0], weights[1], 0.0, weights[2]])
        elif i == 3:
            by_x, by_history = _first_derivative(lengths)
            *recent, oldest = weights
            recent = [w + oldest * b for w, b in zip([*recent, 0.0], by_history, strict=True)]
            along.add(i, recent, by_x=oldest * by_x)
        else:
            along.add(i, weights)
    return rows.table(2)


class _Along:
    """Adds rows x' = scale' (x / scale + sum of w_k d_k), whose h is d; d_0 is the row's."""

    def __init__(self, rows: Rows, levels: NoiseLevels, straight: Straight) -> None:
        self._rows = rows
        self._levels = levels.levels()
        self._lost = straight.lost
        self._scales = [straight(level)[0] for level in self._levels]
        self.places = [straight(level)[1] for level in self._levels]

    def add(self, i: int, weights: Sequence[float], *, by_x: float = 0.0) -> None:
        """Append step i.

        Args:
            i: Index of the step.
            weights: w, the latest first; those of a row's own d, h_1, h_2 and h_3.
            by_x: What is added to the factor of x / scale, 1.
        """
        here, scale, scale_after = self._levels[i], self._scales[i], self._scales[i + 1]
        weights = [w * scale_after for w in weights]
        history = {f"c_{k}": w for k, w in enumerate(weights[1:], 1)}
        if here.sigma == 0:
            lost = self._lost
            c_0 = scale_after / scale * here.alpha - lost * weights[0]
            self._rows.add(i, here, c_0=c_0, c_eps=weights[0], e_0=-lost, e_eps=1.0)
            return
        s = self.places[i]
        self._rows.add(
            i,
            here,
            c_x=scale_after / scale * (1 + by_x) + weights[0] / (scale * s),
            c_0=-weights[0] / s,
            e_x=1 / (scale * s),
            e_0=-1 / s,
            **history,
        )

    def correct(self, half: float) -> None:
        """Append x' = x + scale half (d - h_1) at the second level, with h' = d + x / scale half.

        Args:
            half: Half of the first step.
        """
        here, scale, s = self._levels[1], self._scales[1], self.places[1]
        self._rows.add(
            0,
            here,
            c_x=1 + half / s,
            c_0=-scale * half / s,
            c_1=-scale * half,
            e_x=1 / (scale * s) + 1 / (scale * half),
            e_0=-1 / s,
        )


def adams_weights(known: Sequence[float], end: float) -> list[float]:
    """Integrals from known[0] to end of the Lagrange polynomials with the nodes ``known``.

    Args:
        known: One to four places, the current one first.
        end: End of the step.

    Returns:
        One weight for each node; they sum to the length of the step.
    """
    middle, half = (known[0] + end) / 2, (end - known[0]) / 2
    total = [0.0] * len(known)
    for at in (middle - half * _GAUSS_NODE, middle + half * _GAUSS_NODE):
        for j, own in enumerate(known):
            value = half
            for k, other in enumerate(known):
                if k != j:
                    value *= (at - other) / (own - other)
            total[j] += value
    return total


def _variable_weights(lengths: Sequence[float]) -> list[float]:
    """Weights of d, d_1, ... in ipndm_v, as published.

    With g = d - d_1, g_1 = d_1 - d_2, g_2 = d_2 - d_3 and q = h_1 / h_2, p = h_2 / h_3: d + h / (2
    h_1) g + b (g - q g_1) + c (g - (q + u) g_1 + u p g_2), where Adams-Bashforth has another b, and
    d_3 the weight -c u q instead of -c u p.

    Args:
        lengths: One to four step lengths, that of the current step first.

    Returns:
        One weight for each length.
    """
    h, *before = lengths
    weights = [1.0] + [0.0] * len(before)

    def add(factor: float, differences: Sequence[float]) -> None:
        """``factor`` times the sum of differences[k] (d_k - d_(k + 1))."""
        for k, value in enumerate(differences):
            weights[k] += factor * value
            weights[k + 1] -= factor * value

    if before:
        add(h / before[0] / 2, [1.0])
    if len(before) > 1:
        h1, h2 = before[:2]
        add((1 - h * h / (3 * h1 * (h1 + h2))) / 2, [1.0, -h1 / h2])
    if len(before) > 2:
        h1, h2, h3 = before
        two, three = h + h1, h + h1 + h2
        late = (1 - h / (3 * two)) / 2 + (1 - h / (2 * two)) * h / (6 * three)
        third = late * h * two * three / (h1 * (h1 + h2) * (h1 + h2 + h3))
        u = (h1 + h2) / (h2 + h3) * h1 / h2
        add(third, [1.0, -h1 / h2 - u, u * h2 / h3])
        weights[3] = -third * u * h1 / h2  # as published; h2 / h3 instead would sum to 1
    return weights


def _first_derivative(lengths: Sequence[float]) -> tuple[float, list[float]]:
    """The derivative of the first level in the fourth step of ``pndm_table``.

    With y = x / scale, d_1 that at the second level and h = d' + (2 / length) y from before it was
    corrected, d_0 = h - g y_1, g = 2 / length. The two steps since then give y_3 = y_1 + a d_1 + b
    d_2 + k d_0. Both together are solved for d_0.

    Args:
        lengths: Those of the steps.

    Returns:
        The factor of y_3, and those of d_3 (0), d_2, d_1 and h.

    Raises:
        ValueError: There is no solution.
    """
    g = 2 / lengths[0]
    one, two = lengths[1], lengths[2]
    a, b = 3 / 2 * one - 16 / 12 * two, 23 / 12 * two
    k = -one / 2 + 5 / 12 * two
    pivot = 1 - g * k
    if abs(pivot) < _SMALLEST_PIVOT:
        raise ValueError(
            "levels must not have a third step of 6 / 5 of the first two together for pndm_table, "
            f"got steps of {lengths[0]:.6g}, {one:.6g} and {two:.6g}; use lms_table or ipndm_table"
        )
    return -g / pivot, [0.0, g * b / pivot, g * a / pivot, 1 / pivot]
