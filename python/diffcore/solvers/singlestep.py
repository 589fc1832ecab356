"""DPM-Solver and DPM-Solver++ in blocks: p steps form a block, which is one step of order p."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from diffcore._checks import check_choice
from diffcore._types import ClipRange
from diffcore.solvers.dpmpp import SOLVER_TYPES
from diffcore.solvers.exponential import first_order_weight, interpolating_weights, phi
from diffcore.solvers.levels import Levels, NoiseLevels, as_levels
from diffcore.solvers.noise_form import combination, first_order, history
from diffcore.solvers.rows import Rows, check_order, move
from diffcore.solvers.table import SolverTable

BLOCK_TYPES = ("dpmsolver++", "dpmsolver")


def dpmpp_singlestep_table(
    levels: Levels,
    *,
    order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """DPM-Solver++ or DPM-Solver, singlestep: blocks of ``order`` steps from their first sample.

    Within a block, step j goes from the block's first sample x_0 to the next level with the j
    values of x0 predicted since: x' = (sigma' / sigma_0) x_0 + alpha' sum of w_k x0_k. The w are
    the weights of the polynomial through these in lambda ("heun"), or of 1 and half the slope, as
    in ``dpmpp_table`` ("midpoint", order 2), or of the slope to the last one alone ("midpoint",
    order 3; exact where the last one lies at 2/3 of the step). A row recovers the block's first
    sample from the current one, by subtracting what the block has added. With "dpmsolver" the
    polynomial is that of the predicted noise: x' = (alpha' / alpha_0) x_0 + sigma' sum of w_k
    epsilon_k, with the weights for -h.

    Blocks are shorter where the number of steps requires it, at a step to sigma = 0 or from there,
    and with ``lower_order_final``, so that the last step has order 1. Levels may rise.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        order: 1, 2 or 3.
        algorithm_type: "dpmsolver++" or "dpmsolver".
        solver_type: "midpoint" or "heun".
        lower_order_final: End with a step of order 1.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: Order outside 1 .. 3, unknown algorithm_type or solver_type, levels that start
            or end at alpha = 0, or as ``NoiseLevels``.

    Source:
        Lu et al. 2022 (arXiv 2211.01095) algorithm 1; Lu et al. 2022 (arXiv 2206.00927) appendix
        D.3 for the division into blocks, as in diffusers.
    """
    order = check_order(order, 3)
    check_choice("algorithm_type", algorithm_type, BLOCK_TYPES)
    check_choice("solver_type", solver_type, SOLVER_TYPES)
    levels = as_levels(levels, prediction_type)
    levels.check_signal("dpmpp_singlestep_table")
    steps, final = len(levels), levels.levels()[-2:]
    to_clean = final[1].sigma == 0
    # A step from a clean sample is a block: lambda is infinite at its start.
    from_clean = [1] if levels.sigma[0] == 0 else []
    left = steps - len(from_clean)
    lower = lower_order_final or to_clean or left % order != 0
    places = [*from_clean, *_places(left, order, lower)]
    if final[1].ratio == final[0].ratio or to_clean:
        places[-1] = 1
    return block_table(
        levels,
        places,
        order=order,
        algorithm_type=algorithm_type,
        solver_type=solver_type,
        prediction_type=prediction_type,
        clip_range=clip_range,
    )


def block_table(
    levels: NoiseLevels,
    places: Sequence[int],
    *,
    order: int,
    algorithm_type: str,
    solver_type: str,
    prediction_type: str,
    clip_range: ClipRange = None,
) -> SolverTable:
    """The table of ``dpmpp_singlestep_table`` with given blocks.

    Args:
        levels: Noise levels, above alpha = 0.
        places: The position of each step in its block, counted from 1: each is 1, or one more than
            the one before. 1 for a step to or from sigma = 0.
        order: That of the longest block.
        algorithm_type: "dpmsolver++" or "dpmsolver".
        solver_type: "midpoint" or "heun".
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: See ``dpmpp_singlestep_table``.

    Returns:
        N rows.
    """
    of_noise = algorithm_type == "dpmsolver"
    rows = Rows(
        f"{algorithm_type}-{order}s-blocks" if of_noise else f"dpmpp-{order}s-blocks",
        levels,
        prediction_type,
        clip_range,
    )
    points = levels.levels()
    lambdas = [level.lam for level in points]
    added: list[float] = []  # what the block has added of x0 or the noise, latest first
    for i, (here, after) in enumerate(pairwise(points)):
        place = places[i]
        first = i - place + 1
        if here.sigma == 0:
            rows.add(i, here, **move(here, after.alpha, after.sigma))
            continue
        if place == 1:
            weights = [1 - here.alpha * after.sigma / (after.alpha * here.sigma)]
            added = []
        else:
            h = lambdas[i + 1] - lambdas[first]
            nodes = [(lambdas[i - k] - lambdas[first]) / h for k in range(place)]
            weights = block_weights(nodes, -h if of_noise else h, solver_type)
        if of_noise:
            keep = after.alpha / here.alpha
            if place == 1:  # no logarithm: the step may end at sigma = 0
                added = [after.sigma - keep * here.sigma]
                moved = first_order(here, after, 0.0)
            else:
                new = [after.sigma * weight for weight in weights]
                weights = [w - keep * old for w, old in zip(new, [0.0, *added], strict=True)]
                added, moved = new, combination(here, keep, weights)
            rows.add(i, here, **moved, **history(here))
            continue
        keep = after.sigma / here.sigma
        new = [after.alpha * weight for weight in weights]
        columns = [w - keep * old for w, old in zip(new, [0.0, *added], strict=True)]
        rows.add(i, here, c_x=keep, e_0=1.0, **{f"c_{k}": c for k, c in enumerate(columns)})
        added = new
    return rows.table(order)


def _places(steps: int, order: int, lower: bool) -> list[int]:
    """The position of each step in its block, counted from 1."""
    blocks = [list(range(1, order + 1))] * (steps // order)
    left = steps % order
    if lower and left == 0:  # replace the last block by a shorter one and a step of order 1
        blocks = [*blocks[:-1], list(range(1, order)), [1]] if order > 1 else blocks
    elif left:
        blocks = [*blocks, list(range(1, left + 1))]
    return [place for block in blocks for place in block]


def block_weights(nodes: Sequence[float], h: float, solver_type: str) -> list[float]:
    """Weights of x0 at the nodes.

    Args:
        nodes: v of the values, the current one first; the last is 0, the first of the block.
        h: H from there to the end of the step.
        solver_type: "midpoint" or "heun".

    Returns:
        One weight for each node.
    """
    if solver_type == "heun":
        return interpolating_weights(nodes, h)
    slope = first_order_weight(h) / 2 if len(nodes) == 2 else h * phi(2, -h)
    slope /= nodes[0]
    return [slope, *[0.0] * (len(nodes) - 2), first_order_weight(h) - slope]
