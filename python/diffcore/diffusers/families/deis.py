"""DEISMultistepScheduler: the predicted noise as a polynomial in log rho."""

from __future__ import annotations

from typing import Any

from diffusers import DEISMultistepScheduler

from diffcore.diffusers.families.multistep import (
    MANY_STEPS,
    Multistep,
    as_diffusers_predicts,
    levels_from,
)
from diffcore.diffusers.families.schedule import prediction_of
from diffcore.diffusers.rows import without_x0
from diffcore.diffusers.scheduler import Choice
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import SolverTable, deis_table


class FusedDEIS(Multistep):
    """Epsilon through its last values, integrated. Zhang and Chen 2023 (arXiv 2204.13902)."""

    stock = DEISMultistepScheduler

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        config = scheduler.config
        levels = levels_from(scheduler, choice.start)
        table = deis_table(
            levels,
            order=min(config.solver_order, 3),  # as diffusers takes a higher one
            lower_order_final=config.lower_order_final and len(scheduler.timesteps) < MANY_STEPS,
            prediction_type=prediction_of(config),
        )
        if choice.rules == "exact":
            return table
        if config.prediction_type == "flow_prediction" and not config.use_flow_sigmas:
            raise Unsupported(
                "prediction_type='flow_prediction' without use_flow_sigmas, where diffusers takes "
                "the noise of sigma / alpha for that of sigma"
            )
        table = as_diffusers_predicts(scheduler, table, levels)
        return table if config.thresholding else without_x0(table)
