"""Solvers that step along the derivative (x - x0) / sigma: Euler, Heun, DPM-Solver-2, LMS.

The derivative is taken in coordinates where it is constant on a straight path: of x by sigma with
alpha = 1 (x / alpha by sigma / alpha for a variance preserving process), and of x by sigma in a
rectified flow, where it is the velocity noise - x0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from diffcore._checks import as_real
from diffcore._kernels.step import MOST_HISTORY
from diffcore._types import ClipRange
from diffcore.solvers.levels import Level, Levels, NoiseLevels, as_levels
from diffcore.solvers.rows import Rows, ancestral, at_least_zero, check_order, move, toward
from diffcore.solvers.table import SolverTable

# The most by which EDM raises a noise level, as a fraction of it.
_MAX_CHURN = math.sqrt(2) - 1
# Gauss's rule of two points is exact up to degree 3, the highest degree used here.
_GAUSS_NODE = math.sqrt(1 / 3)


def euler_table(
    levels: Levels,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Euler's method: x' = x + (sigma' - sigma) (x - x0) / sigma, with churn if asked for. Order 1.

    The step is alpha' x0 + sigma' noise on every path: DDIM with eta = 0 for a variance preserving
    process, x + (sigma' - sigma) m for a flow. Levels may rise. Churn raises the level to sigma
    (1 + gamma) before the model is called, gamma = min(s_churn / N, sqrt(2) - 1) where s_tmin <=
    sigma <= s_tmax.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        s_churn: How much noise is renewed over all steps; 0 for none.
        s_tmin: Lowest sigma that churn raises.
        s_tmax: Highest sigma that churn raises.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: Churn with alpha other than 1 or with levels that rise, or as ``NoiseLevels``.

    Source:
        Karras et al. 2022 (arXiv 2206.00364) algorithm 2 without its correction; Song et al. 2021
        (arXiv 2010.02502) eq. 13.
    """
    levels = as_levels(levels, prediction_type)
    churn = _Churn(levels, s_churn, s_tmin, s_tmax, s_noise)
    rows = Rows("euler", levels, prediction_type, clip_range)
    for i, after in enumerate(levels.levels()[1:]):
        here = churn.level(i)
        columns = move(here, after.alpha, after.sigma)
        rows.add(i, here, churn.interval(i + 1), **columns, c_z=churn.noise(i + 1))
    return rows.table(1, start=(1.0, churn.noise(0)))


def heun_table(
    levels: Levels,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Heun's method: Euler's step, then the mean of the derivatives at both ends. Order 2.

    d = (x - x0) / sigma, x_mid = x + (sigma' - sigma) d, d' at (x_mid, sigma'), x' = x + (sigma' -
    sigma) (d + d') / 2. A step to sigma = 0 is Euler's. Levels may rise. Churn as in
    ``euler_table``.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        s_churn: How much noise is renewed over all steps; 0 for none.
        s_tmin: Lowest sigma that churn raises.
        s_tmax: Highest sigma that churn raises.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        2N rows, 2N - 1 if the last sigma is 0.

    Raises:
        ValueError: Churn with alpha other than 1 or with levels that rise, variance preserving
            levels that start or end at alpha = 0, or as ``NoiseLevels``.

    Source:
        Karras et al. 2022 (arXiv 2206.00364) algorithms 1 and 2.
    """
    levels = as_levels(levels, prediction_type)
    churn = _Churn(levels, s_churn, s_tmin, s_tmax, s_noise)
    rows = Rows("heun", levels, prediction_type, clip_range)
    straight = _straight(levels, "heun_table")
    for i, after in enumerate(levels.levels()[1:]):
        here, c_z = churn.level(i), churn.noise(i + 1)
        columns = move(here, after.alpha, after.sigma)
        if after.sigma == 0 or after.ratio == here.ratio:
            rows.add(i, here, churn.interval(i + 1), **columns, c_z=c_z)
            continue
        # x / scale + (s' - s) / 2 d, times scale', is half of Euler's step.
        (scale, s), (scale_after, s_after) = straight(here), straight(after)
        half = (s_after - s) / 2
        if here.sigma == 0:  # s is 0, and half the step leads to s = half
            kept = {"e_0": scale_after - straight.lost * half, "e_eps": scale_after * half}
        else:
            e_x, e_0 = scale_after / scale * (1 + half / s), -scale_after * half / s
            kept = {"e_x": e_x, "e_0": e_0}
        rows.add(i, here, **columns, **kept)
        rows.add(
            i,
            after,
            churn.interval(i + 1),
            c_x=half / s_after,
            c_0=-scale_after * half / s_after,
            c_1=1.0,
            c_z=c_z,
        )
    return rows.table(2, start=(1.0, churn.noise(0)))


def dpm2_table(
    levels: Levels,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DPM-Solver-2: the derivative at the geometric middle of sigma and sigma'. Order 2.

    x_mid by Euler's step to sqrt(sigma sigma'), d there, x' = x + (sigma' - sigma) d. A step to
    sigma = 0 or from there is Euler's. Levels may rise. Churn as in ``euler_table``.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        s_churn: How much noise is renewed over all steps; 0 for none.
        s_tmin: Lowest sigma that churn raises.
        s_tmax: Highest sigma that churn raises.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        2N rows, 2N - 1 if the first or the last sigma is 0.

    Raises:
        ValueError: As ``heun_table``, with levels of any path.

    Source:
        Lu et al. 2022 (arXiv 2206.00927) algorithm 1, in k-diffusion's form (``sample_dpm_2``).
    """
    levels = as_levels(levels, prediction_type)
    churn = _Churn(levels, s_churn, s_tmin, s_tmax, s_noise)
    rows = Rows("dpm2", levels, prediction_type, clip_range)
    for i, after in enumerate(levels.levels()[1:]):
        _dpm2_step(
            rows,
            levels,
            i,
            churn.level(i),
            (after.alpha, after.sigma),
            churn.noise(i + 1),
            churn.interval(i + 1),
        )
    return rows.table(2, start=(1.0, churn.noise(0)))


def dpm2_ancestral_table(
    levels: Levels,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DPM-Solver-2 to sigma_down, then noise up to sigma'. Order 1 (2 for eta = 0).

    sigma_up = eta sqrt(beta_tilde), at most sigma'; sigma_down^2 = sigma'^2 - sigma_up^2. Levels
    may rise with eta = 0.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        eta: At least 0: 0 for ``dpm2_table``, 1 for ancestral noise.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        2N rows, less one for each step to sigma_down = 0 or from sigma = 0.

    Raises:
        ValueError: eta below 0, eta above 0 with levels that rise, or as ``dpm2_table``.

    Source:
        k-diffusion's ``sample_dpm_2_ancestral``.
    """
    levels = as_levels(levels, prediction_type)
    eta, s_noise = at_least_zero("eta", eta), at_least_zero("s_noise", s_noise)
    if eta > 0:
        levels.check_falls("dpm2_ancestral_table with eta > 0")
    rows = Rows("dpm2_ancestral", levels, prediction_type, clip_range)
    points = levels.levels()
    for i, (here, after) in enumerate(itertools.pairwise(points)):
        down, up = ancestral(here, after, eta)
        _dpm2_step(rows, levels, i, here, (after.alpha, down), s_noise * up, None)
    return rows.table(2 if eta == 0 else 1)


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
    straight = _straight(levels, "lms_table")
    rows = Rows("lms", levels, prediction_type, clip_range)
    points = levels.levels()
    places = [straight(level) for level in points]
    for i, here in enumerate(points[:-1]):
        (scale, s), (scale_after, s_after) = places[i], places[i + 1]
        known = [places[i - k][1] for k in range(min(order, i + 1))]
        weights = [w * scale_after for w in _adams_weights(known, s_after)]
        history = {f"c_{k}": w for k, w in enumerate(weights[1:], 1)}
        if here.sigma == 0:
            lost = straight.lost
            c_0 = scale_after / scale * here.alpha - lost * weights[0]
            rows.add(i, here, c_0=c_0, c_eps=weights[0], e_0=-lost, e_eps=1.0)
            continue
        rows.add(
            i,
            here,
            c_x=scale_after / scale + weights[0] / (scale * s),
            c_0=-weights[0] / s,
            e_x=1 / (scale * s),
            e_0=-1 / s,
            **history,
        )
    return rows.table(order)


class _Churn:
    """The levels that EDM's churn raises, where the model is called, and the noise it adds."""

    def __init__(
        self, levels: NoiseLevels, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
    ) -> None:
        s_churn, s_tmin = at_least_zero("s_churn", s_churn), at_least_zero("s_tmin", s_tmin)
        s_noise, s_tmax = at_least_zero("s_noise", s_noise), as_real("s_tmax", s_tmax)
        if not s_tmin <= s_tmax:
            raise ValueError(f"s_tmin must be at most s_tmax, {s_tmax}, got {s_tmin}")
        if s_churn > 0:
            levels.check_falls("s_churn > 0")
        if s_churn > 0 and levels.path != "ve":
            raise ValueError(
                f"s_churn must be 0 unless alpha = 1, got {s_churn} on the path {levels.path!r}; "
                "use sigmas, NoiseLevels.from_edm, or sigma_space() of variance preserving levels"
            )
        gamma = min(s_churn / len(levels), _MAX_CHURN)
        self._before = levels.levels()[:-1]
        self._hat: list[Level] = []
        self._noise: list[float] = []
        for level in self._before:
            raised = gamma > 0 and s_tmin <= level.sigma <= s_tmax
            self._hat.append(levels.at(level.sigma * (1 + gamma)) if raised else level)
            up = level.sigma * math.sqrt(gamma * (2 + gamma)) * s_noise if raised else 0.0
            self._noise.append(up)

    def level(self, i: int) -> Level:
        return self._hat[i]

    def noise(self, i: int) -> float:
        """The noise added before step i; 0 after the last step."""
        return self._noise[i] if i < len(self._noise) else 0.0

    def interval(self, i: int) -> tuple[float, float] | None:
        if self.noise(i) == 0:
            return None
        return self._before[i].ratio, self._hat[i].ratio


class _Straight:
    """(scale, s) of a level, such that d(x / scale) / ds is constant on a straight path.

    The derivative is epsilon - lost x_0: in a flow the signal falls while the noise rises.
    """

    def __init__(self, path: str) -> None:
        self._vp = path == "vp"
        self.lost = 1.0 if path == "flow" else 0.0

    def __call__(self, level: Level) -> tuple[float, float]:
        return (level.alpha, level.ratio) if self._vp else (1.0, level.sigma)


def _straight(levels: NoiseLevels, name: str) -> _Straight:
    if levels.path == "vp":
        levels.check_signal(name)
    return _Straight(levels.path)


def _dpm2_step(
    rows: Rows,
    levels: NoiseLevels,
    i: int,
    here: Level,
    target: tuple[float, float],
    c_z: float,
    interval: tuple[float, float] | None,
) -> None:
    """One step of DPM-Solver-2 to (alpha, sigma), and noise after it."""
    alpha, sigma = target
    if sigma == 0 or here.sigma == 0 or sigma * here.alpha == alpha * here.sigma:
        rows.add(i, here, interval, **move(here, alpha, sigma), c_z=c_z)
        return
    levels.check_signal("dpm2_table")
    middle = levels.at(math.sqrt(here.ratio) * math.sqrt(sigma / alpha))
    straight = _Straight(levels.path)
    (scale, s), (_, s_middle) = straight(here), straight(middle)
    # (alpha, sigma_down) is off the path: step to the level with the same ratio, and rescale.
    end = levels.at(sigma / alpha)
    scale_end, s_end = straight(end)
    scale_end *= alpha / end.alpha
    c_x, c_0 = toward(here, middle.alpha, middle.sigma)
    rows.add(i, here, c_x=c_x, c_0=c_0, e_x=scale_end / scale)
    step = (s_end - s) / s_middle
    c_x, c_0 = step * scale_end / straight(middle)[0], -step * scale_end
    rows.add(
        i, middle, interval or (here.ratio, _end(levels, i)), c_x=c_x, c_0=c_0, c_1=1.0, c_z=c_z
    )


def _end(levels: NoiseLevels, i: int) -> float:
    return float(levels.sigma[i + 1] / levels.alpha[i + 1])


def _adams_weights(known: Sequence[float], end: float) -> list[float]:
    """Integrals from known[0] to end of the Lagrange polynomials with the nodes ``known``."""
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
