"""SEEDS: exponential Runge-Kutta methods for the diffusion SDE, with two or three model calls."""

from __future__ import annotations

import math
from itertools import pairwise

from diffcore._checks import as_real, check_choice
from diffcore._types import ClipRange
from diffcore.solvers.exponential import first_order_weight, phi
from diffcore.solvers.levels import Level, Levels, NoiseLevels, as_levels
from diffcore.solvers.rows import Rows, at_least_zero, move
from diffcore.solvers.table import SolverTable

SEEDS_SOLVER_TYPES = ("phi_1", "phi_2")


def seeds_2_table(
    levels: Levels,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    solver_type: str = "phi_1",
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """SEEDS-2: two calls a step, whose noises are one path. Order 1 (2 for eta = 0).

    With h = lambda' - lambda and H = (1 + eta) h, the first call leads to lambda + r h, and the
    second from there to lambda', with x0 and x0_mid weighted by the exponential integrals over the
    complete step: ``H phi_1`` times ``(1 - 1 / (2 r)) x0 + x0_mid / (2 r)`` ("phi_1"), or ``H phi_1
    x0 + H phi_2 (x0_mid - x0) / r`` ("phi_2"), the phi at -H. The noise of the first part is kept
    in the second, decayed, so the two are increments of one Brownian motion. ``dpmpp_sde_table``
    has the same x0 with two independent noises. r = 1 with "phi_2" is ComfyUI's
    "exp_heun_2_x0_sde", and with eta = 0 its "exp_heun_2_x0". A step to sigma = 0 or from there
    has one call and no noise. Levels may rise with eta = 0.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        eta: Strength of the noise, at least 0; 1 is the diffusion SDE.
        s_noise: Factor of the added noise.
        r: Position of the second call within the step in lambda, in (0, 1].
        solver_type: "phi_1" or "phi_2".
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        2N rows, 2N - 1 if the first or the last sigma is 0.

    Raises:
        ValueError: eta below 0, eta above 0 with levels that rise, r outside (0, 1], unknown
            solver_type, levels that start or end at alpha = 0, or as ``NoiseLevels``.

    Source:
        Gonzalez et al. 2023 (arXiv 2305.14267); ComfyUI's ``sample_seeds_2``.
    """
    r = as_real("r", r)
    if not 0 < r <= 1:
        raise ValueError(f"r must lie in (0, 1], got {r}")
    check_choice("solver_type", solver_type, SEEDS_SOLVER_TYPES)
    step = _Step("seeds_2_table", levels, eta, s_noise, prediction_type, clip_range)
    for i, (here, after) in enumerate(pairwise(step.levels.levels())):
        if step.is_plain(i, here, after):
            continue
        middle = step.level(here, after, r)
        big_h = (1 + step.eta) * (after.lam - here.lam)
        late = first_order_weight(big_h) / (2 * r)
        if solver_type == "phi_2":
            late = big_h * phi(2, -big_h) / r
        early = first_order_weight(big_h) - late
        first = middle.alpha * first_order_weight(r * big_h)
        step.add(i, here, middle, [first])
        kept = step.kept(middle, after)
        step.add(i, middle, after, [after.alpha * late, after.alpha * early - kept * first])
    return step.rows.table(1 if step.eta else 2)


def seeds_3_table(
    levels: Levels,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """SEEDS-3: three calls a step, whose noises are one path. Order 1 (3 for eta = 0, r_2 = 2/3).

    The calls are at lambda, lambda + r_1 h and lambda + r_2 h. The third part ends at lambda' with
    ``H phi_1 x0 + H phi_2 (x0_2 - x0) / r_2``, and the second at lambda + r_2 h with the same
    formula for r_2 H and r_1 / r_2. The noise is as in ``seeds_2_table``. A step to sigma = 0 or
    from there has one call and no noise. Levels may rise with eta = 0.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        eta: Strength of the noise, at least 0; 1 is the diffusion SDE.
        s_noise: Factor of the added noise.
        r_1: Position of the second call within the step in lambda, above 0.
        r_2: Position of the third call, above r_1 and at most 1.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        3N rows, 3N - 2 if the first or the last sigma is 0.

    Raises:
        ValueError: eta below 0, eta above 0 with levels that rise, not 0 < r_1 < r_2 <= 1, levels
            that start or end at alpha = 0, or as ``NoiseLevels``.

    Source:
        Gonzalez et al. 2023 (arXiv 2305.14267); ComfyUI's ``sample_seeds_3``.
    """
    r_1, r_2 = as_real("r_1", r_1), as_real("r_2", r_2)
    if not 0 < r_1 < r_2 <= 1:
        raise ValueError(f"r_1 must be above 0 and below r_2 <= 1, got {r_1} and r_2={r_2}")
    step = _Step("seeds_3_table", levels, eta, s_noise, prediction_type, clip_range)
    for i, (here, after) in enumerate(pairwise(step.levels.levels())):
        if step.is_plain(i, here, after):
            continue
        one, two = step.level(here, after, r_1), step.level(here, after, r_2)
        big_h = (1 + step.eta) * (after.lam - here.lam)
        first = one.alpha * first_order_weight(r_1 * big_h)
        part = r_2 * big_h
        new = two.alpha * (r_2 / r_1) * part * phi(2, -part)
        old = two.alpha * first_order_weight(part) - new
        late = big_h * phi(2, -big_h) / r_2
        early = first_order_weight(big_h) - late
        step.add(i, here, one, [first])
        step.add(i, one, two, [new, old - step.kept(one, two) * first])
        kept = step.kept(two, after)
        step.add(i, two, after, [after.alpha * late, -kept * new, after.alpha * early - kept * old])
    order = 3 if abs(r_2 - 2 / 3) < 1e-12 else 2
    return step.rows.table(1 if step.eta else order)


class _Step:
    """The rows of a SEEDS solver: parts of steps that each begin where the last one ended."""

    def __init__(
        self,
        name: str,
        levels: Levels,
        eta: float,
        s_noise: float,
        prediction_type: str,
        clip_range: ClipRange,
    ) -> None:
        self.eta = at_least_zero("eta", eta)
        self._s_noise = at_least_zero("s_noise", s_noise)
        self.levels: NoiseLevels = as_levels(levels, prediction_type)
        self.levels.check_signal(name)
        if self.eta > 0:
            self.levels.check_falls(f"{name} with eta > 0")
        self.rows = Rows(name.removesuffix("_table"), self.levels, prediction_type, clip_range)

    def is_plain(self, i: int, here: Level, after: Level) -> bool:
        """Whether a step has one call and no noise; then its row is added."""
        plain = after.sigma == 0 or here.sigma == 0 or after.ratio == here.ratio
        if plain:
            self.rows.add(i, here, **move(here, after.alpha, after.sigma))
        return plain

    def level(self, here: Level, after: Level, r: float) -> Level:
        """The level at lambda + r h."""
        return after if r == 1 else self.levels.at(here.ratio ** (1 - r) * after.ratio**r)

    def kept(self, here: Level, after: Level) -> float:
        """The factor of x in a part from one level to another: sigma' / sigma exp(-eta h)."""
        return after.sigma / here.sigma * self._decay(here, after)

    def _decay(self, here: Level, after: Level) -> float:
        """The part of the noise that is kept: exp(-eta h)."""
        return math.pow(after.ratio / here.ratio, self.eta)

    def add(self, i: int, here: Level, after: Level, weights: list[float]) -> None:
        """The row of one part.

        Args:
            i: Index of the step.
            here: Where the model is called.
            after: Where the part ends.
            weights: Factors of x0 of this call, and of the calls before it in the step, the latest
                first.
        """
        decay = self._decay(here, after)
        self.rows.add(
            i,
            here,
            (here.ratio, after.ratio),
            c_x=self.kept(here, after),
            c_z=self._s_noise * after.sigma * math.sqrt((1 - decay) * (1 + decay)),
            e_0=1.0,
            **{f"c_{k}": weight for k, weight in enumerate(weights)},
        )
