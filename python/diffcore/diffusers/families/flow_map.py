"""FlowMapEulerDiscreteScheduler: steps of a flow map between any two levels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMapEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_map_euler_discrete import (
    FlowMapEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from diffcore import ops
from diffcore.diffusers.guidance import taken_apart
from diffcore.diffusers.rows import float64
from diffcore.diffusers.scheduler import Call, Choice, FusedScheduler, check_samples
from diffcore.diffusers.walk import Unsupported, Walk
from diffcore.solvers import NoiseLevels, SolverTable, flow_map_table

# How far from a timestep of the schedule a number may be to stand for it, as in diffusers.
_NEAR = 1e-3


class FusedFlowMapEuler(FusedScheduler):
    """x' = x - (sigma - sigma') m, from the level of t to that of r. Geng et al. 2025 (2505.13447).

    Both may be off the schedule, so the step is not that of a row.
    """

    stock = FlowMapEulerDiscreteScheduler
    output_class = FlowMapEulerDiscreteSchedulerOutput

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:  # noqa: ARG003
        """See ``FusedScheduler.make_table``; there are no options, and the two rules agree."""
        levels = NoiseLevels.from_flow(
            float64(scheduler.sigmas), timesteps=float64(scheduler.timesteps)
        )
        return flow_map_table(levels, target_name="r_timestep")

    def _step(self, call: Call) -> Any:
        model_output, sample = call.model_output, call.sample
        try:
            walk = self._walk()
            check_samples(model_output, sample)
            sigma, place = self._level(walk, call.timestep)
            if call.r_timestep is not None:
                target, _ = self._level(walk, call.r_timestep)
            elif place is not None:
                target = walk.sigmas[place + 1]
            else:
                raise Unsupported("r_timestep=None at a timestep that is not of the schedule")
        except Unsupported as reason:
            self._count(reason)
            return None
        model_output, _ = taken_apart(model_output, apart=False)
        x = ops.linear_combination(sample, model_output, (1.0, target - sigma))
        if self._step_index is None:
            self._step_index = self._begin_index
        self._done((place or 0) if self._step_index is None else self._step_index)
        return self._output(x.to(model_output.dtype), return_dict=call.return_dict)

    def _level(self, walk: Walk, timestep: Any) -> tuple[float, int | None]:
        """The sigma of a timestep, and its place in the schedule if it has one."""
        value = walk.value_of(timestep)
        nearest = min(range(len(walk)), key=lambda i: abs(walk.times[i] - value))
        if abs(walk.times[nearest] - value) <= _NEAR:
            return walk.sigmas[nearest], nearest
        return value / float(self.config.num_train_timesteps), None

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """X = (1 - sigma) x_0 + sigma noise, sigma = t / T, in one launch.

        The timesteps ``[B]`` or ``[B, F]`` are not rounded to 16 bits.
        """
        if noise is None:
            raise TypeError("noise must be a torch.Tensor, got None")
        sigma = timestep.to(sample.device, torch.float64) / self.config.num_train_timesteps
        if sigma.ndim > 2:
            scaled: Tensor = super().scale_noise(  # type: ignore[misc]
                sample, timestep, noise
            )
            return scaled
        groups = 1 if sigma.ndim == 2 else None
        return ops.add_noise(sample, noise, 1 - sigma, sigma, group_dim=groups)
