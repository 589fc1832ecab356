"""DPMSolverMultistepScheduler: DPM-Solver and DPM-Solver++ with history."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from diffcore.diffusers.families.multistep import (
    MANY_STEPS,
    Multistep,
    as_diffusers_predicts,
    levels_from,
)
from diffcore.diffusers.families.schedule import prediction_of
from diffcore.diffusers.rows import with_column, without_x0
from diffcore.diffusers.scheduler import Choice, Place
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import NoiseLevels, SolverTable, dpmpp_table


class OfDPMSolver(Multistep):
    """A solver with DPM-Solver's options."""

    def _draws(self, place: Place) -> bool:
        return bool(self.config.algorithm_type.startswith("sde-"))

    def _kept(self, sample: Tensor, output: Tensor) -> torch.dtype:
        """The dtype of what diffusers keeps of the model's output, x_0 or epsilon."""
        own = "sample" if self.config.algorithm_type.endswith("++") else "epsilon"
        thresholds = self.config.thresholding and own == "epsilon"
        if prediction_of(self.config) == own and not thresholds:
            return output.dtype
        return torch.promote_types(sample.dtype, output.dtype)

    def _drawn_in(self, sample: Tensor, output: Tensor) -> torch.dtype:
        return self.noise_dtype or self._kept(sample, output)


class FusedDPMSolverMultistep(OfDPMSolver):
    """A polynomial through the last x_0 or epsilon. Lu et al. 2022 (arXiv 2206.00927, 2211.01095).

    diffusers computes in float32 with noise in float32, whatever the dtype of the samples.
    """

    stock = DPMSolverMultistepScheduler
    noise_dtype = torch.float32

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        config = scheduler.config
        refuse_undefined(config, choice.rules)
        if config.algorithm_type == "sde-dpmsolver":
            refuse_third_order(config, choice.rules)
        levels = levels_from(scheduler, choice.start)
        table = multistep_table(scheduler, levels)
        if choice.rules == "exact":
            return table
        of_noise = not config.algorithm_type.endswith("++")
        table = as_diffusers_predicts(scheduler, table, levels, of_noise=of_noise)
        if of_noise:
            return table if config.thresholding else without_x0(table)
        stochastic = config.algorithm_type == "sde-dpmsolver++"
        return _with_other_sign(table, levels) if stochastic else table

    def _dtype(self, sample: Tensor, output: Tensor) -> torch.dtype:
        return self._kept(sample, output)


def multistep_table(scheduler: Any, levels: NoiseLevels) -> SolverTable:
    """DPM-Solver++'s table by our rules.

    Args:
        scheduler: With the options of DPM-Solver++.
        levels: Its levels, or the last of them.

    Returns:
        The table. Whether the last steps have lower orders depends on the number of all steps.
    """
    config = scheduler.config
    return dpmpp_table(
        levels,
        order=min(config.solver_order, 3),  # as diffusers takes a higher one
        algorithm_type=config.algorithm_type,
        solver_type=config.solver_type,
        lower_order_final=config.lower_order_final and len(scheduler.timesteps) < MANY_STEPS,
        euler_at_final=config.euler_at_final,
        prediction_type=prediction_of(config),
        # Up the noise levels, rows read the model's output itself if nothing can clip x_0.
        clip_range=(-math.inf, math.inf) if config.thresholding else None,
    )


def refuse_undefined(config: Any, rules: str) -> None:
    """Refuse a prediction that diffusers refuses.

    Args:
        config: With ``algorithm_type`` and ``prediction_type``.
        rules: Under "exact" ours count.

    Raises:
        Unsupported: A flow's velocity for a solver of epsilon.
    """
    of_noise = not config.algorithm_type.endswith("++")
    if of_noise and config.prediction_type == "flow_prediction" and rules != "exact":
        raise Unsupported(
            f"prediction_type='flow_prediction' with algorithm_type={config.algorithm_type!r}, "
            "which diffusers does not have"
        )


def refuse_third_order(config: Any, rules: str) -> None:
    """Refuse steps of order 3 that diffusers lacks.

    Args:
        config: With ``algorithm_type`` and ``solver_order``.
        rules: Under "exact" there are ours.

    Raises:
        Unsupported: Under diffusers' rules.
    """
    if config.solver_order > 2 and rules != "exact":
        raise Unsupported(
            f"solver_order={config.solver_order} with algorithm_type={config.algorithm_type!r}, "
            "which diffusers does not have"
        )


def _with_other_sign(table: SolverTable, levels: NoiseLevels) -> SolverTable:
    """With diffusers' factor of the second difference D2 in the steps of order 3 of its SDE.

    It is -(phi_2(-2 h) + 1/2) there, and 1/2 - phi_2(-2 h) in k-diffusion and by the derivation: x'
    is less by alpha' D2, the divided difference of the last three x_0 in units of h.
    """
    lam = [level.lam for level in levels.levels()]
    columns = [table.column(name).clone() for name in ("c_0", "c_1", "c_2")]
    for i, after in enumerate(levels.alpha[1:].tolist()):
        if columns[2][i] == 0:  # a step of order 1 or 2
            continue
        h = lam[i + 1] - lam[i]
        nodes = [(lam[i - k] - lam[i]) / h for k in range(3)]
        for k, own in enumerate(nodes):
            others = nodes[:k] + nodes[k + 1 :]
            columns[k][i] -= after / ((own - others[0]) * (own - others[1]))
    for name, values in zip(("c_0", "c_1", "c_2"), columns, strict=True):
        table = with_column(table, name, values)
    return table
