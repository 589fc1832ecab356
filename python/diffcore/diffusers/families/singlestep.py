"""DPMSolverSinglestepScheduler: DPM-Solver and DPM-Solver++ in blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from diffusers import DPMSolverSinglestepScheduler

from diffcore.diffusers.families.dpm import OfDPMSolver, refuse_undefined
from diffcore.diffusers.families.multistep import as_diffusers_predicts, levels_from
from diffcore.diffusers.families.schedule import prediction_of
from diffcore.diffusers.rows import without_x0
from diffcore.diffusers.scheduler import Choice
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import NoiseLevels, SolverTable
from diffcore.solvers.rows import Rows
from diffcore.solvers.singlestep import block_table, block_weights


class FusedDPMSolverSinglestep(OfDPMSolver):
    """Blocks of p steps, each one step of order p. Lu et al. 2022 (arXiv 2211.01095), algorithm 1.

    A walk that starts within a block starts one of its own, as in diffusers.
    """

    stock = DPMSolverSinglestepScheduler

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        config = scheduler.config
        algorithm = config.algorithm_type
        of_noise = not algorithm.endswith("++")
        refuse_undefined(config, choice.rules)
        if of_noise and config.thresholding and choice.rules != "exact":
            raise Unsupported(
                f"thresholding=True with algorithm_type={algorithm!r}, which diffusers cannot do"
            )
        levels = levels_from(scheduler, choice.start)
        orders = scheduler.order_list[choice.start :]
        places = [min(order, i + 1) for i, order in enumerate(orders)]
        how = {"solver_type": config.solver_type, "prediction_type": prediction_of(config)}
        if algorithm.startswith("sde-"):
            table = _stochastic_table(levels, places, **how)
        else:
            table = block_table(
                levels, places, order=config.solver_order, algorithm_type=algorithm, **how
            )
        if choice.rules == "exact":
            return table
        table = as_diffusers_predicts(scheduler, table, levels, of_noise=of_noise)
        return without_x0(table) if of_noise else table


def _stochastic_table(
    levels: NoiseLevels, places: Sequence[int], *, solver_type: str, prediction_type: str
) -> SolverTable:
    """The blocks of diffusers' "sde-dpmsolver++", which no paper has.

    Both steps of a block start from its first sample x, each with noise of its own: with h from
    there and H = 2 h, x' = (sigma' / sigma) exp(-h) x + alpha' sum of w_k x0_k + sigma' sqrt(1 -
    exp(-H)) z. The first row leaves for the second what that one has of x and its x_0; the noise of
    the first is not in it. A third step would need x and x_0 in another ratio.
    """
    if max(places) > 2:
        raise Unsupported(
            "algorithm_type='sde-dpmsolver++' with solver_order=3: its third step reads the first "
            "sample of its block, without the noise that was added since; take solver_order=2"
        )
    levels.check_falls("'sde-dpmsolver++'")
    rows = Rows("sde-dpmsolver++-blocks", levels, prediction_type, None)
    points = levels.levels()
    following = [*places[1:], 1]
    for i, (here, after) in enumerate(itertools.pairwise(points)):
        first = points[i + 1 - places[i]]
        keep = first.alpha * after.sigma / (after.alpha * first.sigma)  # exp(-h)
        c_z = after.sigma * math.sqrt((1 - keep) * (1 + keep))
        if places[i] == 2:
            own, _ = _two_weights(points[i - 1 : i + 2], solver_type)
            rows.add(i, here, c_0=after.alpha * own, c_1=1.0, c_z=c_z)
            continue
        left = {}
        if following[i] == 2:
            end = points[i + 2]
            _, of_first = _two_weights(points[i : i + 3], solver_type)
            kept = here.alpha * end.sigma / (end.alpha * here.sigma)
            left = {"e_x": end.sigma / here.sigma * kept, "e_0": end.alpha * of_first}
        c_x = after.sigma / here.sigma * keep
        c_0 = after.alpha * (1 - keep) * (1 + keep)
        rows.add(i, here, c_x=c_x, c_0=c_0, c_z=c_z, **left)
    return rows.table(1)


def _two_weights(block: Sequence[Any], solver_type: str) -> tuple[float, float]:
    """The weights of the second x_0 of a block and of its first, in the step to its end."""
    lam = [level.lam for level in block]
    h = lam[2] - lam[0]
    own, of_first = block_weights([(lam[1] - lam[0]) / h, 0.0], 2 * h, solver_type)
    return own, of_first
