"""SA-Solver: stochastic Adams predictor and corrector, with one or two model calls a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from diffcore._checks import as_flag, as_int, check_choice
from diffcore._types import ClipRange
from diffcore.schedules.tensors import float64_vector
from diffcore.solvers.exponential import first_order_weight, interpolating_weights, last_finite
from diffcore.solvers.levels import Level, Levels, NoiseLevels, as_levels
from diffcore.solvers.noise_form import added_noise, combination, first_order, history
from diffcore.solvers.rows import Rows, at_least_zero, check_order, move
from diffcore.solvers.table import SolverTable

SA_MODES = ("pec", "pece")
# The most values of a predictor and a corrector that three values of history allow.
_MOST = {"pec": (3, 4), "pece": (2, 3)}


def sa_solver_table(
    levels: Levels,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float | Tensor | Sequence[float] = 1.0,
    mode: str = "pec",
    predict_x0: bool = True,
    simple_order_2: bool = False,
    lower_order_final: bool = True,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """SA-Solver: Adams-Bashforth and -Moulton for the SDE with noise of strength tau. Order 1.

    With h = lambda' - lambda, predictor: x' = (sigma' / sigma) exp(-tau^2 h) x_c + alpha' sum of
    w_k x0_k + sigma' sqrt(1 - exp(-2 tau^2 h)) z, with the weights w of the polynomial in lambda
    through the last ``predictor_order`` x0, for (1 + tau^2) h. Corrector: the same step with the
    same z and the polynomial through the last ``corrector_order`` x0, the one at its end included.
    The corrector is a part of the next row, as in ``unipc_table``. With tau = 0 the order is
    ``predictor_order`` without corrector, else the smaller of ``corrector_order`` and
    ``predictor_order`` + 1, where the error of the first steps decays.

    With ``mode="pece"`` the model is called again at x_c, and only these x0 are kept. Levels may
    rise with tau = 0. Steps to sigma = 0 or to alpha = 0, and from there, have order 1.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        predictor_order: 1 to 3; to 4 without corrector, and to 2 for "pece".
        corrector_order: 0 for no corrector, else 1 to 4; 1 to 3 for "pece".
        tau: Strength of the noise in each step, a number or ``[N]``: 0 for the probability flow, 1
            for the diffusion SDE. diffusers has 1 where the timestep at the step's start is in 200
            .. 800 and 0 elsewhere; ComfyUI has 1 where the sigma at its end is in such an interval.
        mode: "pec" (one model call a step) or "pece" (two).
        predict_x0: The polynomial is that of x0. If not, that of epsilon: x' = (alpha' / alpha) x_c
            - (1 + tau^2) sigma' integral + tau sigma' sqrt(exp(2 h) - 1) z.
        simple_order_2: Set a weight of order 2 to half of (1 + tau^2) h, with ``predict_x0``: the
            paper's variant for few steps, which diffusers always has.
        lower_order_final: The last steps have lower orders: to sigma = 0 as in ComfyUI, else as in
            diffusers.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows; 2N - 1 for "pece".

    Raises:
        ValueError: An order outside its range, unknown ``mode``, tau below 0 or not one for each
            step, tau above 0 with levels that rise, epsilon's form with tau above 0 from alpha = 0,
            or as ``NoiseLevels``.

    Source:
        Xue et al. 2023 (arXiv 2309.05019) algorithm 1, eq. 14 to 18 and appendix D.
    """
    check_choice("mode", mode, SA_MODES)
    of_noise = not as_flag("predict_x0", predict_x0)
    simple = as_flag("simple_order_2", simple_order_2) and not of_noise
    lower_order_final = as_flag("lower_order_final", lower_order_final)
    s_noise = at_least_zero("s_noise", s_noise)
    _check_orders(predictor_order, corrector_order, mode)
    levels = as_levels(levels, prediction_type)
    etas = _squares(tau, levels)
    if any(etas):
        levels.check_falls("sa_solver_table with tau > 0")
        if of_noise:
            levels.check_signal("sa_solver_table with predict_x0=False and tau > 0")
    rows = Rows("sa_solver", levels, prediction_type, clip_range)
    points = levels.levels()
    scheme = _Scheme([level.lam for level in points], etas, of_noise, simple)
    to_zero = points[-1].sigma == 0
    left = len(levels) - to_zero  # steps above order 1
    predicted: list[float] = []  # weights of the last prediction, of i-1, i-2, ...
    for i, (here, after) in enumerate(itertools.pairwise(points)):
        used, known = predictor_order, corrector_order
        if lower_order_final:
            used = min(used, left - i)
            known = min(known, left - i + (1 if to_zero else 2))
        used = scheme.values(i, used)
        shift: list[float] = []  # what the correction adds to x, without alpha or sigma
        if i > 0 and known > 0 and scheme.finite(i - 1):
            corrected = scheme.corrector(i - 1, known)
            count = max(len(corrected), len(predicted) + 1)
            corrected += [0.0] * (count - len(corrected))
            predicted = [0.0, *predicted, *[0.0] * (count - 1 - len(predicted))]
            shift = [c - p for c, p in zip(corrected, predicted, strict=True)]
        step = _Step(here, after, etas[i], of_noise)
        weights = scheme.predictor(i, used) if used > 1 else [step.first_weight()]
        gap = []
        if mode == "pece" and shift:
            # Of h_1 to h_3, only what the calls at corrected samples have left is read.
            spaced = [w for pair in zip(shift[1:], [0.0] * 3, strict=False) for w in pair][:3]
            rows.add(i, here, **step.correction([*shift[:1], *spaced]))
            shift, gap = [], [0.0]
        c_z = s_noise * step.noise()
        columns = step.columns([weights[0], *gap, *weights[1:]], shift)
        rows.add(i, here, **columns, **step.history(), c_z=c_z)
        predicted = weights
    if any(etas):
        return rows.table(1)
    order = min(corrector_order, predictor_order + 1) if corrector_order else predictor_order
    return rows.table(order)


class _Scheme:
    """The weights of predictor and corrector, with (1 + tau^2) in those of epsilon."""

    def __init__(
        self, lambdas: Sequence[float], etas: Sequence[float], of_noise: bool, simple: bool
    ) -> None:
        self._lambdas = lambdas
        self._etas = etas
        self._of_noise = of_noise
        self._simple = simple

    def finite(self, i: int) -> bool:
        return math.isfinite(self._lambdas[i])

    def values(self, i: int, count: int) -> int:
        """How many of the last ``count`` values the step from i uses; 1 if h is 0 or infinite."""
        here, after = self._lambdas[i : i + 2]
        if not math.isfinite(here) or not math.isfinite(after) or here == after:
            return 1
        return last_finite(self._lambdas, i, max(1, count))

    def predictor(self, i: int, used: int) -> list[float]:
        """Weights at i, i-1, ..., two or more, for the step to i+1."""
        h, nodes = self._nodes(i, i, used)
        if used == 2 and self._simple:
            return self._two(i, h, h / 2 / nodes[1])
        return self._weights(i, h, nodes)

    def corrector(self, i: int, known: int) -> list[float]:
        """Weights at i+1, i, i-1, ..., for the same step."""
        known = 1 + last_finite(self._lambdas, i, known - 1) if known > 1 else 1
        h, nodes = self._nodes(i, i + 1, known)
        if known == 2 and self._simple:
            return self._two(i, h, h / 2)[::-1]
        return self._weights(i, h, nodes)

    def _nodes(self, i: int, latest: int, count: int) -> tuple[float, list[float]]:
        here = self._lambdas[i]
        h = self._lambdas[i + 1] - here
        return h, [(self._lambdas[latest - k] - here) / h for k in range(count)]

    def _weights(self, i: int, h: float, nodes: Sequence[float]) -> list[float]:
        if self._of_noise:
            return [(1 + self._etas[i]) * w for w in interpolating_weights(nodes, -h)]
        return interpolating_weights(nodes, (1 + self._etas[i]) * h)

    def _two(self, i: int, h: float, other: float) -> list[float]:
        """Weights at i and at another place, which is (1 + tau^2) ``other``."""
        growth = 1 + self._etas[i]
        return [first_order_weight(growth * h) - growth * other, growth * other]


class _Step:
    """One step, and the columns of its row."""

    def __init__(self, here: Level, after: Level, eta: float, of_noise: bool) -> None:
        self._here = here
        self._after = after
        self._eta = eta
        self._of_noise = of_noise
        fixed = here.sigma == 0 or after.alpha == 0
        # exp(-h), without a logarithm
        self._keep = 0.0 if fixed else here.alpha * after.sigma / (after.alpha * here.sigma)

    def first_weight(self) -> float:
        """The weight of order 1; 1 where it is infinite, and read by no row."""
        if self._of_noise:
            return (1 + self._eta) * (1 - 1 / self._keep) if self._keep > 0 else 1.0
        return 1 - math.pow(self._keep, 1 + self._eta)

    def noise(self) -> float:
        """Standard deviation of the noise that it adds."""
        if self._eta == 0:
            return 0.0
        if self._of_noise:
            return added_noise(self._here, self._after, self._eta)
        kept = self._keep**self._eta
        return self._after.sigma * math.sqrt((1 - kept) * (1 + kept))

    def history(self) -> dict[str, float]:
        """The columns of h', x0 or epsilon."""
        return history(self._here) if self._of_noise else {"e_0": 1.0}

    def correction(self, shift: Sequence[float]) -> dict[str, float]:
        """The columns of x_c."""
        if self._of_noise:
            return combination(self._here, 1.0, [self._here.sigma * w for w in shift])
        return {"c_x": 1.0, **{f"c_{k}": self._here.alpha * w for k, w in enumerate(shift)}}

    def columns(self, weights: Sequence[float], shift: Sequence[float]) -> dict[str, float]:
        """The columns of the step from x_c = x + the correction."""
        here, after = self._here, self._after
        if self._of_noise:
            if any(weights[1:]):
                keep = after.alpha / here.alpha
                moved = _sum(
                    [after.sigma * w for w in weights], [keep * here.sigma * w for w in shift]
                )
                return combination(here, keep, moved)
            columns = first_order(here, after, self._eta)
            if shift:
                keep = after.alpha / here.alpha
                added = [keep * here.sigma * w for w in shift]
                for name, value in combination(here, 0.0, added).items():
                    columns[name] = columns.get(name, 0.0) + value
            return columns
        if here.sigma == 0 or after.alpha == 0:
            columns = move(here, after.alpha, after.sigma)
        else:
            c_x = after.sigma / here.sigma * (self._keep**self._eta if self._eta else 1.0)
            scaled = {f"c_{k}": after.alpha * w for k, w in enumerate(weights)}
            columns = {"c_x": c_x, **scaled}
        for k, w in enumerate(shift):
            name = f"c_{k}"
            columns[name] = columns.get(name, 0.0) + columns["c_x"] * here.alpha * w
        return columns


def _sum(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a + b for a, b in itertools.zip_longest(one, other, fillvalue=0.0)]


def _check_orders(predictor_order: int, corrector_order: int, mode: str) -> None:
    most = _MOST[mode]
    corrector_order = as_int("corrector_order", corrector_order)
    if not 0 <= corrector_order <= most[1]:
        raise ValueError(
            f"corrector_order must be in 0 .. {most[1]} for mode={mode!r}, got {corrector_order}"
        )
    if mode == "pec" and corrector_order == 0:
        check_order(predictor_order, 4, "predictor_order")
        return
    if corrector_order == 0:
        raise ValueError("corrector_order must be at least 1 for mode='pece', got 0")
    check_order(predictor_order, most[0], "predictor_order")


def _squares(tau: float | Tensor | Sequence[float], levels: NoiseLevels) -> list[float]:
    """tau^2 of each step."""
    if getattr(tau, "ndim", None) == 0 or not hasattr(tau, "__len__"):
        return [at_least_zero("tau", cast(float, tau)) ** 2] * len(levels)
    values = float64_vector("tau", tau).tolist()
    if len(values) != len(levels):
        raise ValueError(
            f"tau must be a number or hold one for each of the {len(levels)} steps, got "
            f"{len(values)}"
        )
    return [at_least_zero("tau", value) ** 2 for value in values]
