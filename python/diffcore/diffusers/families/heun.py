"""HeunDiscreteScheduler."""

from __future__ import annotations

import itertools
from typing import Any

from diffusers import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput

from diffcore.diffusers.families.schedule import clip_of
from diffcore.diffusers.families.sigmas import prediction_among
from diffcore.diffusers.families.two_calls import TwoCalls, doubled_levels
from diffcore.diffusers.scheduler import Choice
from diffcore.solvers import SolverTable, heun_table
from diffcore.solvers.rows import Rows


class FusedHeun(TwoCalls):
    """x' = x + (sigma' - sigma) (d + d') / 2. Karras et al. 2022 (arXiv 2206.00364)."""

    stock = HeunDiscreteScheduler
    output_class = HeunDiscreteSchedulerOutput
    widens = True

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options, and the two rules agree."""
        levels = doubled_levels(scheduler, choice.start)
        prediction = prediction_among(scheduler, ("epsilon", "sample", "v_prediction"))
        clip = clip_of(scheduler.config)
        if clip is not None or choice.rules == "exact":
            return heun_table(levels, prediction_type=prediction, clip_range=clip)
        # Without a clip d is the noise that the model predicts. Of x - x0, which ``heun_table``
        # takes, little is left where sigma is small.
        rows = Rows("heun", levels, prediction, None)
        *steps, (last, _) = itertools.pairwise(levels.levels())
        for i, (here, after) in enumerate(steps):
            step = after.sigma - here.sigma
            rows.add(i, here, c_x=1.0, c_eps=step, e_x=1.0, e_eps=step / 2)
            rows.add(i, after, c_1=1.0, c_eps=step / 2)
        rows.add(len(steps), last, c_0=1.0)
        return rows.table(2)
