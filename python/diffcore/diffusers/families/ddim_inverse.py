"""DDIMInverseScheduler: DDIM from a sample to its noise."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMInverseScheduler
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput

from diffcore.coefficients.step import ddim_coefficients
from diffcore.diffusers.families.schedule import (
    Uncounted,
    clip_of,
    prediction_of,
    schedule_times,
)
from diffcore.diffusers.rows import columns_table, float64
from diffcore.diffusers.scheduler import Choice
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import NoiseLevels, SolverTable, ddim_table
from diffcore.solvers.paths import TimeOf


class FusedDDIMInverse(Uncounted):
    """x' = alpha' x0 + sigma' epsilon, up to the timestep t of the call. Song et al. 2021.

    As in diffusers the step begins at t - T // n, and epsilon is that of the unclipped x0.
    """

    stock = DDIMInverseScheduler
    output_class = DDIMSchedulerOutput
    returns_x0 = True
    casts_to_model = False

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        config = scheduler.config
        if scheduler.num_inference_steps is None:
            raise Unsupported("a step before set_timesteps")
        how: dict[str, Any] = {
            "rederive_epsilon": False,
            "prediction_type": prediction_of(config),
            "clip_range": clip_of(config),
        }
        times = schedule_times(scheduler)
        signal = float64(scheduler.alphas_cumprod)
        clean = float(scheduler.initial_alpha_cumprod)
        if choice.rules == "exact":
            visited = torch.cat([signal.new_tensor([clean]), signal[times]])
            alpha, sigma = visited.sqrt(), (1 - visited).sqrt()
            known = TimeOf(((1 - signal) / signal).sqrt(), torch.arange(len(signal), device="cpu"))
            return ddim_table(NoiseLevels(alpha, sigma, times, "vp", known), **how)
        before = times - config.num_train_timesteps // scheduler.num_inference_steps
        begin = torch.where(before >= 0, signal[before.clamp(min=0)], clean)
        alpha, sigma = begin.sqrt(), (1 - begin).sqrt()
        after = signal[times]
        columns = ddim_coefficients(alpha, sigma, after.sqrt(), (1 - after).sqrt(), **how)
        names = ("c_x", "c_m", "c_0", "c_z", "a_x", "a_m")
        return columns_table(
            "ddim",
            timesteps=times,
            alpha=alpha,
            sigma=sigma,
            end=(float(after[-1].sqrt()), float((1 - after[-1]).sqrt())),
            columns=dict(zip(names, columns[:, :6].unbind(1), strict=True)),
            clip=clip_of(config),
        )
