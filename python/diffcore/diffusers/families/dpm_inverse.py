"""DPMSolverMultistepInverseScheduler: DPM-Solver from a sample up to the noise that leads to it."""

from __future__ import annotations

from typing import Any

from diffusers import DPMSolverMultistepInverseScheduler

from diffcore.diffusers.families.dpm import (
    OfDPMSolver,
    multistep_table,
    refuse_third_order,
    refuse_undefined,
)
from diffcore.diffusers.families.multistep import as_diffusers_predicts, levels_from
from diffcore.diffusers.rows import without_x0
from diffcore.diffusers.scheduler import Choice
from diffcore.solvers import SolverTable


class FusedDPMSolverMultistepInverse(OfDPMSolver):
    """DPM-Solver's steps at levels that rise. Lu et al. 2022 (arXiv 2206.00927, 2211.01095).

    diffusers keeps the levels of ``use_flow_sigmas`` in falling order. The SDE cannot rise.
    """

    stock = DPMSolverMultistepInverseScheduler

    _begin_index = None  # the stock scheduler has none

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        config = scheduler.config
        refuse_undefined(config, choice.rules)
        if config.algorithm_type.startswith("sde-"):
            refuse_third_order(config, choice.rules)
        levels = levels_from(scheduler, choice.start)
        table = multistep_table(scheduler, levels)
        if choice.rules == "exact":
            return table
        of_noise = not config.algorithm_type.endswith("++")
        table = as_diffusers_predicts(scheduler, table, levels, of_noise=of_noise)
        return without_x0(table) if of_noise and not config.thresholding else table
