"""LMSDiscreteScheduler: Adams-Bashforth over sigma."""

from __future__ import annotations

from typing import Any

from diffusers import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from torch import Tensor

from diffcore.diffusers.families.sigmas import ScaledInput, prediction_among, ve_levels
from diffcore.diffusers.scheduler import Call, Choice
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import SolverTable, lms_table
from diffcore.solvers.adams import adams_weights
from diffcore.solvers.rows import Rows

_MOST = 4


class FusedLMS(ScaledInput):
    """x' = x + the integral of the polynomial through the last derivatives, as k-diffusion's."""

    stock = LMSDiscreteScheduler
    options = ("order",)
    output_class = LMSDiscreteSchedulerOutput
    returns_x0 = True
    casts_to_model = False
    has_history = True
    # Of the stock class.
    derivatives: list[Tensor]

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; option: ``order``."""
        order = choice.options.get("order", _MOST)
        if not 1 <= order <= _MOST:
            raise Unsupported(f"order={order}, where a table has 1 to {_MOST}")
        prediction = prediction_among(scheduler, ("epsilon", "sample", "v_prediction"))
        levels = ve_levels(scheduler, 1.0, choice.start)
        if choice.rules == "exact":
            return lms_table(levels, order=order, prediction_type=prediction)
        places = ve_levels(scheduler, 1.0).sigma.tolist()
        rows = Rows("lms", levels, prediction, None)
        for i, here in enumerate(levels.levels()[:-1]):
            row = choice.start + i
            # From the middle diffusers has the weights of the full order at once, and drops those
            # of the derivatives that there are not, so they do not sum to the length of the step.
            known = places[row + 1 - min(row + 1, order) : row + 1][::-1]
            own, *earlier = adams_weights(known, places[row + 1])[: i + 1]
            history = {f"c_{k}": weight for k, weight in enumerate(earlier, 1)}
            # By the noise, which is the derivative: of x - x0 little is left where sigma is small.
            rows.add(i, here, c_x=1.0, c_eps=own, e_eps=1.0, **history)
        return rows.table(order if choice.start == 0 else 1)

    def _refuse(self, call: Call) -> None:
        super()._refuse(call)
        if self.derivatives:
            raise Unsupported("a walk that the stock scheduler began")
