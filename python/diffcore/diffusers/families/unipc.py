"""UniPCMultistepScheduler: a predictor and a corrector that share a model call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

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
from diffcore.solvers import SolverTable, unipc_table


class FusedUniPC(Multistep):
    """UniPC: x is predicted, and corrected with the next x_0. Zhao et al. 2023 (arXiv 2302.04867).

    The corrector is a part of the next row, which never forms the corrected sample.
    """

    stock = UniPCMultistepScheduler

    predict_x0: bool
    solver_p: Any

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        config, of_noise = scheduler.config, not scheduler.predict_x0
        prediction = prediction_of(config)
        exact = choice.rules == "exact"
        if of_noise and prediction == "flow_prediction" and not exact:
            raise Unsupported(
                "prediction_type='flow_prediction' with predict_x0=False, which diffusers does not "
                "have"
            )
        levels = levels_from(scheduler, choice.start)
        predictor = scheduler.solver_p
        if predictor is not None and not exact:
            _check_predictor(scheduler, predictor, choice.start)
        table = unipc_table(
            levels,
            order=config.solver_order,
            solver_type=config.solver_type,
            predict_x0=not of_noise,
            solver_p="unip" if predictor is None else predictor.config.solver_type,
            lower_order_final=config.lower_order_final,
            disable_corrector=[i - choice.start for i in scheduler.disable_corrector],
            prediction_type=prediction,
        )
        if exact:
            return table
        table = as_diffusers_predicts(scheduler, table, levels, of_noise=of_noise)
        return without_x0(table) if of_noise else table

    def _threshold(
        self, table: SolverTable, row: int, sample: Tensor, output: Tensor, guided: dict[str, Any]
    ) -> Tensor | float | None:
        """In diffusers x_0 alone is thresholded, and not the x_0 of a predicted noise."""
        return super()._threshold(table, row, sample, output, guided) if self.predict_x0 else None

    def _dtype(self, sample: Tensor, output: Tensor) -> torch.dtype:
        return sample.dtype if self.solver_p is None else output.dtype


def _check_predictor(scheduler: Any, predictor: Any, start: int) -> None:
    """Refuse a ``solver_p`` whose steps are not those of a predictor of ``unipc_table``.

    diffusers gives it the corrected sample and the model's output for the sample before. So it has
    an x_0 or epsilon of its own, unless that is the model's output.

    Args:
        scheduler: With a ``solver_p``.
        predictor: That one.
        start: The first row of the walk.

    Raises:
        Unsupported: Another solver, prediction, list of levels or order.
    """
    own = "sample" if scheduler.predict_x0 else "epsilon"
    algorithm = "dpmsolver++" if scheduler.predict_x0 else "dpmsolver"
    kind = type(predictor)
    if not issubclass(kind, DPMSolverMultistepScheduler):
        raise Unsupported(f"solver_p={kind.__name__}")
    config, theirs = scheduler.config, predictor.config
    if theirs.algorithm_type != algorithm:
        raise Unsupported(f"solver_p with algorithm_type={theirs.algorithm_type!r}")
    for name, other in (("scheduler", config), ("solver_p", theirs)):
        if prediction_of(other) != own or other.thresholding:
            raise Unsupported(
                f"solver_p where the {name} predicts {prediction_of(other)!r} or thresholds: it "
                "has another x_0 than the corrector"
            )
    if not torch.equal(predictor.sigmas, scheduler.sigmas):
        raise Unsupported("solver_p with other sigmas than the scheduler")
    steps = len(scheduler.timesteps)
    lowers = theirs.lower_order_final and steps < MANY_STEPS
    ends_at_1 = theirs.euler_at_final or lowers or theirs.final_sigmas_type == "zero"
    for i in range(start, steps):
        left = steps - i
        ours = min(config.solver_order, left) if config.lower_order_final else config.solver_order
        last = 1 if left == 1 and ends_at_1 else 2 if left == 2 and lowers else 3
        if min(ours, i - start + 1) != min(theirs.solver_order, last, i - start + 1):
            raise Unsupported(f"solver_p with another order than the corrector in step {i}")
