"""CMStochasticIterativeScheduler: consistency models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler
from diffusers.schedulers.scheduling_consistency_models import (
    CMStochasticIterativeSchedulerOutput,
)

from diffcore.coefficients import consistency_coefficients
from diffcore.coefficients.step import tensors
from diffcore.diffusers.families.sigmas import ScaledInput, ends_of, ve_levels
from diffcore.diffusers.rows import columns_table
from diffcore.diffusers.scheduler import Choice, Place
from diffcore.solvers import SolverTable, consistency_table


class FusedConsistency(ScaledInput):
    """x' = f + sqrt(sigma'^2 - sigma_min^2) z. Song et al. 2023 (arXiv 2303.01469), algorithm 1."""

    stock = CMStochasticIterativeScheduler
    output_class = CMStochasticIterativeSchedulerOutput
    refuses_integers = True
    casts_to_model = False

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        config = scheduler.config
        how: dict[str, float] = {"sigma_data": config.sigma_data, "sigma_min": config.sigma_min}
        clip = 1.0 if config.clip_denoised else None
        sigma, after = ends_of(scheduler, choice.start)
        if choice.rules == "exact":
            levels = ve_levels(scheduler, config.sigma_data, choice.start)
            return consistency_table(
                replace(levels, preconditioned=True),
                sigma_min=config.sigma_min,
                s_noise=config.s_noise,
                clip_range=clip,
            )
        c_skip, c_out = tensors(consistency_coefficients(sigma, **how))
        one = torch.ones_like(sigma)
        # The last sigma is sigma_min in float32, and not above it by more than its rounding.
        reached = after.clamp(config.sigma_min, config.sigma_max)
        variance = ((reached - config.sigma_min) * (reached + config.sigma_min)).clamp(min=0)
        noisy = config.s_noise if len(scheduler.timesteps) > 1 else 0.0
        return columns_table(
            "consistency",
            timesteps=scheduler.timesteps[choice.start :],
            alpha=one,
            sigma=sigma,
            end=(1.0, float(after[-1])),
            columns={"c_0": one, "c_z": noisy * variance.sqrt(), "a_x": c_skip, "a_m": c_out},
            clip=clip,
            input_scale=(sigma**2 + config.sigma_data**2).rsqrt(),
            init_noise_sigma=float(scheduler.init_noise_sigma),
        )

    def _draws(self, place: Place) -> bool:
        return len(self.timesteps) > 1  # also in the last step

    def _input_std(self) -> float:
        return float(self.config.sigma_data)
