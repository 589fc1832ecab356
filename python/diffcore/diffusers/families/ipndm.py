"""IPNDMScheduler: Adams-Bashforth with the weights of equal steps."""

from __future__ import annotations

from typing import Any

from diffusers import IPNDMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffcore.diffusers.rows import float64, with_history
from diffcore.diffusers.scheduler import Call, Choice, FusedScheduler
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import NoiseLevels, SolverTable
from diffcore.solvers.adams import EQUAL_STEPS
from diffcore.solvers.paths import TimeOf
from diffcore.solvers.rows import Rows

_LEAST_ALPHA = 1e-8
_MOST = len(EQUAL_STEPS) - 1


class FusedIPNDM(FusedScheduler):
    """x' = alpha' (x - sigma e) / alpha + sigma' e. Zhang and Chen 2023 (arXiv 2204.13902)."""

    stock = IPNDMScheduler
    output_class = SchedulerOutput
    casts_to_model = False
    has_history = True
    # Of the stock class.
    ets: list[Tensor]
    # How many outputs of an earlier walk over the same timesteps this one goes on from.
    _kept: int = 0

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; the two rules agree.

        Option ``kept``: how many outputs there are already. diffusers keeps them until
        ``set_timesteps``, also for a second walk.
        """
        start, kept = choice.start, choice.options.get("kept", 0)
        alpha, sigma = (float64(held)[start:] for held in (scheduler.alphas, scheduler.betas))
        times = float64(scheduler.timesteps)[start:]
        if len(sigma) != len(times) + 1:
            raise Unsupported("trained_betas that are not one for each level")
        ratio = sigma[:-1] / alpha[:-1]
        levels = NoiseLevels(alpha, sigma, times, "vp", TimeOf(ratio.flip(0), times.flip(0)))
        # The model predicts v, and e = sigma x + alpha m. The first level is pure noise, alpha = 0:
        # there x = e, and diffusers' x0 = (x - e) / 1e-8 is 0.
        rows = Rows("ipndm", levels, "v_prediction", None)
        *points, _ = levels.levels()
        ends = zip(alpha[1:].tolist(), sigma[1:].tolist(), strict=True)
        for i, (here, (alpha_next, sigma_next)) in enumerate(zip(points, ends, strict=True)):
            keep = alpha_next / max(here.alpha, _LEAST_ALPHA)
            own, *earlier = EQUAL_STEPS[min(i + kept, _MOST)]
            moved = sigma_next - keep * here.sigma
            rows.add(
                i,
                here,
                c_x=keep * (1 - own * here.sigma**2) + sigma_next * own * here.sigma,
                c_m=moved * own * here.alpha,
                e_x=here.sigma,
                e_m=here.alpha,
                **{f"c_{k}": moved * weight for k, weight in enumerate(earlier, 1)},
            )
        table = rows.table(2)
        written = {"e_x": levels.sigma[:-1], "e_m": levels.alpha[:-1]}
        return with_history(table, _MOST, **written)  # the last steps too, for a second walk

    def _refuse(self, call: Call) -> None:
        if self.ets:
            raise Unsupported("a walk that the stock scheduler began")

    def _step(self, call: Call) -> Any:
        if self._step_index is None and not self.ets:
            self._kept = self._begin_again()
        return self._take(call, {"kept": self._kept})

    def _begin_again(self) -> int:
        """How many outputs a walk that begins has, those of the walk before it."""
        walk = self._fusion.walk
        if walk is None or not walk.is_of(self):
            return 0
        walk.start = None
        return len(walk.history)
