"""FlowMatchHeunDiscreteScheduler: Heun's method in a rectified flow."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import (
    FlowMatchHeunDiscreteSchedulerOutput,
)
from torch import Tensor

from diffcore import ops
from diffcore.diffusers.families.euler import Churn
from diffcore.diffusers.families.sigmas import BySigma
from diffcore.diffusers.rows import columns_table, float64, with_history
from diffcore.diffusers.scheduler import Call, Choice, Place
from diffcore.diffusers.walk import Unsupported
from diffcore.schedules.tensors import as_float64
from diffcore.solvers import NoiseLevels, SolverTable, flow_heun_table


class FusedFlowMatchHeun(BySigma):
    """x' = x + (sigma' - sigma) (m + m') / 2. Karras et al. 2022 (arXiv 2206.00364), algorithm 1.

    The churn is diffusers': x^ = x + n z after the first model call, n^2 = sigma^^2 - sigma^2, and
    then x' = x^ + (sigma' - sigma^) (m sigma / sigma^ + m') / 2. It draws noise in the second call,
    too, where it cancels.
    """

    stock = FlowMatchHeunDiscreteScheduler
    options = Churn._fields
    refuses_integers = True
    output_class = FlowMatchHeunDiscreteSchedulerOutput

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; options: those of the churn."""
        churn = Churn(**choice.options)
        if choice.rules == "exact":
            return _exact(scheduler, choice.start, churn)
        sigmas = float64(scheduler.sigmas)
        steps = len(sigmas) - 1
        held = sigmas.tolist()[choice.start :]
        names = ("c_m", "c_z", "c_1", "e_m")
        columns: dict[str, list[float]] = {name: [] for name in names}
        for i in range(len(held) - 1):
            first = i - i % 2
            sigma, after = held[first], held[first + 1]
            raised = sigma * (1 + churn.gamma(sigma, steps))
            length = after - raised
            move = length * sigma / raised
            if i == first:
                noise = churn.s_noise * math.sqrt((raised - sigma) * (raised + sigma))
                # h takes back half of the move, which the second call makes with its m.
                row = (move, noise, 0.0, -move / 2 if i + 2 < len(held) else 0.0)
            else:
                row = (length / 2, 0.0, float(move != 0), 0.0)
            for name, value in zip(names, row, strict=True):
                columns[name].append(value)
        known = {name: as_float64(values) for name, values in columns.items()}
        level = sigmas[choice.start : -1]
        known |= {"a_x": torch.ones_like(level), "a_m": -level, "c_x": torch.ones_like(level)}
        table = columns_table(
            "flow_heun",
            timesteps=scheduler.timesteps[choice.start :],
            alpha=1 - level,
            sigma=level,
            end=(1 - held[-1], held[-1]),
            columns=known,
        )
        return with_history(table, 1)

    def _draws(self, place: Place) -> bool:
        if self._fusion.manner.rules == "exact":
            return place.noisy
        walk = self._walk()
        assert walk.start is not None
        first = place.row - (place.row - walk.start) % 2
        return Churn(**place.options).gamma(walk.sigmas[first], len(walk.sigmas) - 1) > 0

    def _dtype(self, sample: Tensor, output: Tensor) -> torch.dtype:
        return torch.promote_types(sample.dtype, output.dtype)

    def _step(self, call: Call) -> Any:
        # What the first call leaves for the second stays in float32, as in diffusers, and is that
        # of the first call, whatever sample the second one gets.
        walk = self._walk()
        left = walk.history
        x = left[1] if left else call.sample
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        taken = super()._step(call._replace(sample=x, return_dict=False))
        if taken is None:
            return None
        ends = left or self._step_index == len(walk)
        walk.history = () if ends else (*walk.history, *taken)
        dtype = call.model_output.dtype
        return self._output(taken[0].to(dtype), return_dict=call.return_dict)

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first of its step."""
        return not self._walk().history

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """X = (1 - sigma) x_0 + sigma noise, in one launch, at the sigma where the walk is."""
        walk = self._walk()
        if self._step_index is None:
            self._step_index = self._row(walk, timestep)
        sigma = walk.sigmas[self._step_index]
        return ops.add_noise(sample, noise, 1 - sigma, sigma)


def _exact(scheduler: Any, start: int, churn: Churn) -> SolverTable:
    """Heun's method with the churn of a flow, before the model call."""
    if start % 2:
        raise Unsupported(f"step {start}, the second call of a step, as the first of a walk")
    sigmas = float64(scheduler.sigmas)
    levels = NoiseLevels.from_flow(
        torch.cat([sigmas[start:-1:2], sigmas[-1:]]),
        timesteps=float64(scheduler.timesteps[start::2]),
    )
    table = flow_heun_table(levels, **churn._asdict())
    if table.start_noise:
        raise Unsupported("s_churn at the first step with rules='exact', before which no noise is")
    return table
