"""DPM-Solver-fast: a given number of model calls in steps of order 3, and fewer at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffcore._checks import as_int
from diffcore._types import ClipRange
from diffcore.solvers.levels import Level, Levels, NoiseLevels, as_levels
from diffcore.solvers.noise_form import combination, history
from diffcore.solvers.rows import Rows, ancestral, at_least_zero
from diffcore.solvers.table import SolverTable

# Where a step calls the model, as fractions of it in lambda, by the order of the step.
_PLACES = ((0.0,), (0.0, 1 / 2), (0.0, 1 / 3, 2 / 3))


def dpm_fast_table(
    levels: Levels,
    num_calls: int,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DPM-Solver-fast: ``num_calls`` model calls in equal steps of lambda. Order 2.

    From the first of the levels to the last, those between are not read. There are floor(num_calls
    / 3) + 1 steps of order 3, the last of order num_calls modulo 3, or the last two of order 2 and
    1. Within a step of length h in lambda, with epsilon, epsilon_1 and epsilon_2 predicted at 0, 1
    / 3 and 2 / 3 of it: x' = (alpha' / alpha) x - sigma' ((exp(h) - 1) epsilon + 3 / 2 ((exp(h) -
    1) / h - 1) (epsilon_2 - epsilon)), and the same from epsilon_1 for the sample at 2 / 3. A step
    of order 2 has epsilon_1 at the middle. With noise, a step goes to sigma_down and sigma_up z is
    added, as in ``dpmpp_2s_table``, and the order is 1. Levels may rise with eta = 0.

    Args:
        levels: Noise levels or sigmas with alpha = 1, of which the first and the last are read.
        num_calls: How often the model is called, at least 1.
        eta: Strength of the noise, at least 0.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        ``num_calls`` rows.

    Raises:
        ValueError: num_calls below 1, levels that start or end at sigma = 0 or alpha = 0, eta below
            0, eta above 0 with levels that rise, or as ``NoiseLevels``.

    Source:
        Lu et al. 2022 (arXiv 2206.00927) algorithms 1 and 2 and section 3.4; k-diffusion's
        ``sample_dpm_fast``.
    """
    num_calls = as_int("num_calls", num_calls, 1)
    eta, s_noise = at_least_zero("eta", eta), at_least_zero("s_noise", s_noise)
    levels = as_levels(levels, prediction_type)
    levels.check_signal("dpm_fast_table")
    if eta > 0:
        levels.check_falls("dpm_fast_table with eta > 0")
    first, *_, last = levels.levels()
    for which, level in (("start", first), ("end", last)):
        if level.sigma == 0:
            raise ValueError(
                f"levels must {which} at sigma > 0 for dpm_fast_table, got sigma = 0 (lambda is "
                "infinite); use a small sigma there"
            )
    rows = Rows("dpm_fast", levels, prediction_type, clip_range)
    count = num_calls // 3 + 1
    orders = [3] * (count - 1) + [num_calls % 3]
    if num_calls % 3 == 0:
        orders = [3] * (count - 2) + [2, 1]
    ends = [_between(levels, first, last, k / count) for k in range(1, count)]
    for i, (here, after) in enumerate(zip([first, *ends], [*ends, last], strict=True)):
        down, up = ancestral(here, after, eta)
        if eta > 0 and down * last.alpha < last.sigma * after.alpha:  # not below the last level
            down = last.sigma * after.alpha / last.alpha
            up = math.sqrt(max(0.0, (after.sigma - down) * (after.sigma + down)))
        target = after._replace(sigma=down)
        _add_step(rows, levels, i, (here, target, after), orders[i], s_noise * up)
    return rows.table(1 if eta else 2)


def _add_step(
    rows: Rows,
    levels: NoiseLevels,
    i: int,
    step: tuple[Level, Level, Level],
    order: int,
    c_z: float,
) -> None:
    """The rows of a step from here to a level, and the noise from there to the one after it."""
    here, target, after = step
    h = math.log(here.ratio / target.ratio)
    places = _PLACES[order - 1]
    visited = [here, *[_between(levels, here, target, place) for place in places[1:]]]
    # What the step has added so far to (alpha' / alpha) x, of the noise at each of the levels.
    added: list[float] = []
    for k, level in enumerate(visited):
        end, place = (target, 1.0) if k + 1 == order else (visited[k + 1], places[k + 1])
        weights = [end.sigma * w for w in _weights(place * h, places[: k + 1], place)]
        keep = end.alpha / level.alpha
        left = [w - keep * old for w, old in zip(weights, [*added, 0.0], strict=True)]
        rows.add(
            i,
            level,
            (here.ratio, after.ratio),
            **combination(level, keep, left[::-1]),
            **history(level),
            c_z=c_z if k + 1 == order else 0.0,
        )
        added = weights


def _weights(h: float, places: Sequence[float], end: float) -> list[float]:
    """Weights of epsilon at the places, for a part of a step of length h that ends at ``end``."""
    growth = math.expm1(h)
    if len(places) == 1:
        return [-growth]
    if len(places) == 2 and end == 1:  # a step of order 2
        slope = growth / 2 * end / places[1]
    else:
        slope = (growth / h - 1 if h else 0.0) * end / places[-1]
    return [slope - growth, *[0.0] * (len(places) - 2), -slope]


def _between(levels: NoiseLevels, here: Level, after: Level, place: float) -> Level:
    """The level at a fraction of the way in lambda."""
    return levels.at(here.ratio ** (1 - place) * after.ratio**place)
