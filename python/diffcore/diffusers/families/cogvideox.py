"""CogVideoXDDIMScheduler: DDIM without noise, from x and x0."""

from __future__ import annotations

from typing import Any

from diffusers import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_ddim_cogvideox import DDIMSchedulerOutput

from diffcore.diffusers.families.schedule import (
    ByTimestep,
    levels_of,
    prediction_of,
    signal_before,
)
from diffcore.diffusers.rows import columns_table
from diffcore.diffusers.scheduler import Choice
from diffcore.solvers import SolverTable, ddim_table


class FusedCogVideoXDDIM(ByTimestep):
    """x' = (sigma' / sigma) x + (alpha' - alpha sigma' / sigma) x0. Song et al. 2021 (2010.02502).

    diffusers ignores ``eta`` and the clip here.
    """

    stock = CogVideoXDDIMScheduler
    output_class = DDIMSchedulerOutput
    returns_x0 = True
    casts_to_model = False

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        levels, prediction = levels_of(scheduler), prediction_of(scheduler.config)
        end = signal_before(scheduler, levels.timesteps)
        if choice.rules == "exact":
            return ddim_table(levels, prediction_type=prediction)
        alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
        alpha_after, sigma_after = end.sqrt(), (1 - end).sqrt()
        keep = sigma_after / sigma
        a_x, a_m = levels.x0_columns(prediction)
        return columns_table(
            "ddim",
            timesteps=levels.timesteps,
            alpha=alpha,
            sigma=sigma,
            end=(float(alpha_after[-1]), float(sigma_after[-1])),
            columns={"a_x": a_x, "a_m": a_m, "c_x": keep, "c_0": alpha_after - alpha * keep},
        )
