"""DPM-Solver and DPM-Solver++: multistep, and DPM-Solver++ with two model calls a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from diffcore._checks import as_real, check_choice
from diffcore._types import ClipRange
from diffcore.solvers.exponential import first_order_weight, interpolating_weights, last_finite, phi
from diffcore.solvers.levels import Levels, as_levels
from diffcore.solvers.noise_form import added_noise, combination, first_order, history
from diffcore.solvers.rows import Rows, ancestral, at_least_zero, check_order, move, toward
from diffcore.solvers.table import SolverTable

ALGORITHM_TYPES = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
SOLVER_TYPES = ("midpoint", "heun")

# With at least this many steps, diffusers keeps the order to the end.
_MANY_STEPS = 15


def dpmpp_table(
    levels: Levels,
    *,
    order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    exact_third_order: bool = False,
    eta: float = 1.0,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DPM-Solver++ and DPM-Solver, multistep: a polynomial through the last x0. Order 1, 2, 2 (3).

    With h = lambda' - lambda, H = h ("dpmsolver++") or (1 + eta) h ("sde-dpmsolver++"), and
    differences D1, D2 of x0 in units of h: x' = (sigma' / sigma) exp(h - H) x + alpha' (H phi_1 x0
    + H phi_2 D1 + H phi_3 D2) + sigma' sqrt(1 - exp(-2 eta h)) z, the phi at -H. "midpoint"
    replaces H phi_2 by H phi_1 / 2 where the order is 2. The first step has order 1, the second at
    most 2. A step to sigma = 0 has order 1 and no noise; a step whose history begins at alpha = 0
    has order 1. Levels may rise where no noise is added: a step from sigma = 0 or to alpha = 0, and
    one whose history begins at sigma = 0, has order 1.

    "dpmsolver" and "sde-dpmsolver" take the predicted noise as the polynomial: x' = (alpha' /
    alpha) x - (1 + eta) sigma' (h phi_1 epsilon + h phi_2 D1 + h phi_3 D2) + sigma' sqrt(eta (exp(2
    h) - 1)) z, the phi at h, and "midpoint" with h phi_1 / 2. eta is 0 without "sde".

    As published, the third-order step has half of the second difference (D2 above is the divided
    difference, not the second derivative), so it converges with order 2, with a small constant.
    ``exact_third_order=True`` takes all of it.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        order: 1, 2 or 3.
        algorithm_type: One of ``ALGORITHM_TYPES``.
        solver_type: "midpoint" or "heun", for the steps of order 2.
        lower_order_final: With fewer than 15 steps, the last has order 1, the one before it at
            most 2.
        euler_at_final: The last step has order 1 with any number of steps.
        exact_third_order: Use the full second difference in steps of order 3.
        eta: Strength of the noise with "sde-..." (1 is the diffusion SDE); else not read.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: Order outside 1 .. 3, unknown algorithm_type or solver_type, eta below 0, noise
            with levels that rise, "sde-dpmsolver" from alpha = 0, or as ``NoiseLevels``.

    Source:
        Lu et al. 2022 (arXiv 2211.01095) algorithm 2 and appendix; eta as in k-diffusion.
        "dpmsolver": Lu et al. 2022 (arXiv 2206.00927), with history as in diffusers.
    """
    order = check_order(order, 3)
    check_choice("algorithm_type", algorithm_type, ALGORITHM_TYPES)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    eta, s_noise = at_least_zero("eta", eta), at_least_zero("s_noise", s_noise)
    levels = as_levels(levels, prediction_type)
    eta = eta if algorithm_type.startswith("sde-") else 0.0
    of_noise = not algorithm_type.endswith("++")
    if eta > 0:
        levels.check_falls(f"{algorithm_type!r} with eta > 0")
        if of_noise:
            levels.check_signal(f"{algorithm_type!r} with eta > 0")
    rows = Rows(f"{algorithm_type}-{order}m", levels, prediction_type, clip_range)
    points, steps = levels.levels(), len(levels)
    lambdas = [level.lam for level in points]
    for i, (here, after) in enumerate(itertools.pairwise(points)):
        left = steps - i
        limit = order
        if lower_order_final and steps < _MANY_STEPS:
            limit = min(limit, left)
        if here.sigma == 0 or after.alpha == 0:  # lambda is infinite, up the noise levels
            rows.add(i, here, **move(here, after.alpha, after.sigma))
            continue
        if after.sigma == 0 or lambdas[i] == lambdas[i + 1] or (euler_at_final and left == 1):
            limit = 1
        used = last_finite(lambdas, i, limit) if math.isfinite(lambdas[i]) else 1
        weights = []
        if used > 1:
            h = lambdas[i + 1] - lambdas[i]
            nodes = [(lambdas[i - k] - lambdas[i]) / h for k in range(used)]
            big_h = -h if of_noise else (1 + eta) * h
            weights = multistep_weights(nodes, big_h, solver_type, exact_third_order)
        if of_noise:
            columns = first_order(here, after, eta)
            if weights:
                weights = [(1 + eta) * after.sigma * w for w in weights]
                columns = combination(here, after.alpha / here.alpha, weights)
            c_z = s_noise * added_noise(here, after, eta)
            rows.add(i, here, c_z=c_z, **columns, **history(here))
            continue
        keep = here.alpha * after.sigma / (after.alpha * here.sigma)  # exp(-h), h may be infinite
        weights = weights or [1 - keep ** (1 + eta)]
        rows.add(
            i,
            here,
            c_x=after.sigma / here.sigma * (keep**eta if eta else 1.0),
            c_z=s_noise * after.sigma * math.sqrt((1 - keep**eta) * (1 + keep**eta)),
            e_0=1.0,
            **{f"c_{k}": after.alpha * weight for k, weight in enumerate(weights)},
        )
    achieved = min(order, 2) if not exact_third_order else order
    return rows.table(1 if eta else achieved)


def dpmpp_2s_table(
    levels: Levels,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DPM-Solver++ (2S): steps with the x0 predicted at the midpoint in lambda. Order 2.

    A step goes to (alpha', sigma_down) through the level at (lambda + lambda_down) / 2: the first
    model call moves x to that level, the second gives x0_mid there, and x' = (sigma_down / sigma) x
    + (alpha' - alpha sigma_down / sigma) x0_mid + sigma_up z. eta = 0 is the deterministic solver,
    eta = 1 k-diffusion's ``sample_dpmpp_2s_ancestral``; with noise the order is 1. A step to
    sigma_down = 0 or from sigma = 0 has one call. Levels may rise with eta = 0.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        eta: Strength of the noise, at least 0.
        s_noise: Factor of the added noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        2N rows, less one for each step to sigma_down = 0 or from sigma = 0.

    Raises:
        ValueError: eta below 0, eta above 0 with levels that rise, levels that start or end at
            alpha = 0, or as ``NoiseLevels``.

    Source:
        Lu et al. 2022 (arXiv 2211.01095) algorithm 1.
    """
    eta, s_noise = at_least_zero("eta", eta), at_least_zero("s_noise", s_noise)
    levels = as_levels(levels, prediction_type)
    levels.check_signal("dpmpp_2s_table")
    if eta > 0:
        levels.check_falls("dpmpp_2s_table with eta > 0")
    rows = Rows("dpmpp_2s", levels, prediction_type, clip_range)
    points = levels.levels()
    for i, (here, after) in enumerate(itertools.pairwise(points)):
        down, up = ancestral(here, after, eta)
        c_z = s_noise * up
        if down == 0 or here.sigma == 0 or after.ratio == here.ratio:
            rows.add(i, here, **move(here, after.alpha, down), c_z=c_z)
            continue
        c_x, c_0 = toward(here, after.alpha, down)
        middle = levels.at(math.sqrt(here.ratio) * math.sqrt(down / after.alpha))
        to_x, to_0 = toward(here, middle.alpha, middle.sigma)
        rows.add(i, here, c_x=to_x, c_0=to_0, e_x=c_x)
        rows.add(i, middle, (here.ratio, after.ratio), c_0=c_0, c_1=1.0, c_z=c_z)
    return rows.table(1 if eta else 2)


def dpmpp_sde_table(
    levels: Levels,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DPM-Solver++ (SDE): two calls a step, noise after both. Order 1 (2 for eta = 0, r = 1/2).

    The first model call steps to lambda + r h: down to its sigma_down, then noise. The second steps
    from x to lambda + h with x0 (1 - 1 / (2 r)) + x0_mid / (2 r): down to sigma_down, then noise. A
    step to sigma = 0 or from there has one call and no noise. Levels may rise with eta = 0.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        eta: Strength of the noise, at least 0.
        s_noise: Factor of the added noise.
        r: Position of the second call within the step in lambda, in (0, 1].
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        2N rows, 2N - 1 if the first or the last sigma is 0.

    Raises:
        ValueError: eta below 0, eta above 0 with levels that rise, r outside (0, 1], levels that
            start or end at alpha = 0, or as ``NoiseLevels``.

    Source:
        k-diffusion's ``sample_dpmpp_sde``.
    """
    eta, s_noise = at_least_zero("eta", eta), at_least_zero("s_noise", s_noise)
    r = as_real("r", r)
    if not 0 < r <= 1:
        raise ValueError(f"r must lie in (0, 1], got {r}")
    levels = as_levels(levels, prediction_type)
    levels.check_signal("dpmpp_sde_table")
    if eta > 0:
        levels.check_falls("dpmpp_sde_table with eta > 0")
    rows = Rows("dpmpp_sde", levels, prediction_type, clip_range)
    points = levels.levels()
    for i, (here, after) in enumerate(itertools.pairwise(points)):
        if after.sigma == 0 or here.sigma == 0 or after.ratio == here.ratio:
            rows.add(i, here, **move(here, after.alpha, after.sigma))
            continue
        middle = levels.at(here.ratio ** (1 - r) * after.ratio**r)
        down, up = ancestral(here, middle, eta)
        to_x, to_0 = toward(here, middle.alpha, down)
        to_z, between = s_noise * up, (here.ratio, middle.ratio)
        down, up = ancestral(here, after, eta)
        c_x, c_0 = toward(here, after.alpha, down)
        late = 1 / (2 * r)
        e_0 = (1 - late) * c_0
        rows.add(i, here, between, c_x=to_x, c_0=to_0, c_z=to_z, e_x=c_x, e_0=e_0)
        complete = (here.ratio, after.ratio)
        rows.add(i, middle, complete, c_0=late * c_0, c_1=1.0, c_z=s_noise * up)
    return rows.table(1 if eta else 2)


def multistep_weights(
    nodes: Sequence[float], big_h: float, solver_type: str, exact: bool
) -> list[float]:
    """Weights of x0 at two or three ``nodes``, the current one first, without alpha'.

    Args:
        nodes: v of the values, see ``interpolating_weights``.
        big_h: H.
        solver_type: "midpoint" or "heun", where there are two.
        exact: Use the full second difference, where there are three.

    Returns:
        One weight for each node.
    """
    if len(nodes) == 2 and solver_type == "midpoint":
        slope = first_order_weight(big_h) / 2 / -nodes[1]
        return [first_order_weight(big_h) + slope, -slope]
    if len(nodes) == 2 or exact:
        return interpolating_weights(nodes, big_h)
    # Without half of the second difference, as published and as in other implementations.
    curve = big_h * phi(3, -big_h)
    weights = interpolating_weights(nodes, big_h)
    second = [
        curve / math.prod(own - other for k, other in enumerate(nodes) if k != j)
        for j, own in enumerate(nodes)
    ]
    return [w - s for w, s in zip(weights, second, strict=True)]
