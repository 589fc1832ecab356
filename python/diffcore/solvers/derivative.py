"""Solvers that step along the derivative (x - x0) / sigma: Euler, Heun, DPM-Solver-2.

The coordinates are those of ``diffcore.solvers.straight``.
"""

from __future__ import annotations

import itertools
import math

from diffcore._checks import as_real
from diffcore._types import ClipRange
from diffcore.solvers.levels import Level, Levels, NoiseLevels, as_levels
from diffcore.solvers.rows import Rows, ancestral, at_least_zero, move, toward
from diffcore.solvers.straight import Straight, straight_of
from diffcore.solvers.table import SolverTable

# The most by which EDM raises a noise level, as a fraction of it.
_MAX_CHURN = math.sqrt(2) - 1


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
    straight = straight_of(levels, "heun_table")
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


def heunpp2_table(
    levels: Levels,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Heun++: a mean of the derivatives at three levels, weighted by sigma. Order 1.

    With d at (x, sigma), and d_1 and d_2 at the next two levels, reached by Euler's steps: x' = x +
    (sigma_1 - sigma) (w d + w_1 d_1 + w_2 d_2), w_k = sigma_k / (3 sigma_max), w = 1 - w_1 - w_2.
    The step before the last has d and d_1 alone, with w_1 = sigma_1 / (2 sigma_max), and the last
    step is Euler's. These are not the weights of a method of order 2. sigma_max is the noisiest
    level's. Churn as in ``euler_table``. Levels may rise.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        s_churn: How much noise is renewed over all steps; 0 for none.
        s_tmin: Lowest sigma that churn raises.
        s_tmax: Highest sigma that churn raises.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        3N - 3 rows, one if N = 1.

    Raises:
        ValueError: As ``heun_table``.

    Source:
        ComfyUI's ``sample_heunpp2``.
    """
    levels = as_levels(levels, prediction_type)
    churn = _Churn(levels, s_churn, s_tmin, s_tmax, s_noise)
    rows = Rows("heunpp2", levels, prediction_type, clip_range)
    straight = straight_of(levels, "heunpp2_table")
    points = levels.levels()
    places = [straight(level)[1] for level in points]
    for i, after in enumerate(points[1:]):
        # Derivatives at this level, and at one or two more but not at the last.
        count = min(3, len(levels) - i)
        visited = [churn.level(i), *points[i + 1 : i + count]]
        s = [straight(visited[0])[1], *places[i + 1 : i + count]]
        weights = [place / (count * max(places)) for place in s[1:]]
        weights = [1 - sum(weights), *weights]
        # What Euler's steps through the levels have added of each derivative, to be taken off.
        added = [b - a for a, b in itertools.pairwise(s)]
        *known, own = [(places[i + 1] - s[0]) * w for w in weights]
        *kept, last = visited
        for level, target in itertools.pairwise(visited):
            history = _derivative(level, straight)
            rows.add(i, level, **move(level, target.alpha, target.sigma), **history)
        if not kept:
            columns = move(last, after.alpha, after.sigma)
        else:
            scale, scale_after = straight(last)[0], straight(after)[0]
            columns = {
                "c_x": scale_after / scale * (1 + own / s[-1]),
                "c_0": -scale_after * own / s[-1],
            }
            for k, (wanted, part) in enumerate(zip(known, added, strict=True)):
                columns[f"c_{len(kept) - k}"] = scale_after * (wanted - part)
        rows.add(i, last, churn.interval(i + 1), **columns, c_z=churn.noise(i + 1))
    return rows.table(1, start=(1.0, churn.noise(0)))


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
    straight = Straight(levels.path)
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


def _derivative(level: Level, straight: Straight) -> dict[str, float]:
    """The columns of h' = d(x / scale) / ds."""
    if level.sigma == 0:
        return {"e_0": -straight.lost, "e_eps": 1.0}
    scale, s = straight(level)
    return {"e_x": 1 / (scale * s), "e_0": -1 / s}


def _end(levels: NoiseLevels, i: int) -> float:
    return float(levels.sigma[i + 1] / levels.alpha[i + 1])
