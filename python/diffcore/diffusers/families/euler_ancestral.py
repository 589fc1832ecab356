"""EulerAncestralDiscreteScheduler: Euler's method with ancestral noise."""

from __future__ import annotations

from typing import Any

from diffusers import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import (
    EulerAncestralDiscreteSchedulerOutput,
)

from diffcore.diffusers.families.sigmas import ScaledInput, prediction_among, ve_levels
from diffcore.diffusers.scheduler import Choice, Place
from diffcore.solvers import SolverTable, euler_ancestral_table


class FusedEulerAncestral(ScaledInput):
    """x' = x + (sigma_down - sigma) (x - x0) / sigma + sigma_up z, as k-diffusion has it."""

    stock = EulerAncestralDiscreteScheduler
    output_class = EulerAncestralDiscreteSchedulerOutput
    refuses_integers = True
    returns_x0 = True

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options, and the two rules agree."""
        prediction = prediction_among(scheduler, ("epsilon", "v_prediction"))
        levels = ve_levels(scheduler, 1.0, choice.start)
        return euler_ancestral_table(levels, prediction_type=prediction)

    def _draws(self, place: Place) -> bool:
        return True  # also in the last step, where the factor is 0
