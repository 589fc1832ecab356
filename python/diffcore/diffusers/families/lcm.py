"""LCMScheduler: steps of a latent consistency model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LCMScheduler
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from torch import Tensor

from diffcore.coefficients.consistency import lcm_coefficients
from diffcore.coefficients.step import tensors
from diffcore.diffusers.families.schedule import Counted, clip_of, levels_of, prediction_of
from diffcore.diffusers.rows import columns_table, float64, with_history
from diffcore.diffusers.scheduler import Choice, Place
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import SolverTable, lcm_table

_SIGMA_DATA = 0.5  # written into diffusers' function


class FusedLCM(Counted):
    """x' = alpha' (c_skip x + c_out x0) + sigma' z. Luo et al. 2023 (arXiv 2310.04378).

    diffusers leaves the noise out in the last step of ``num_inference_steps``, not of the list: a
    list that ``strength`` has shortened ends with noise, at the level of its last timestep.
    """

    stock = LCMScheduler
    output_class = LCMSchedulerOutput
    returns_x0 = True
    casts_to_model = False

    num_inference_steps: int | None

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        if scheduler.num_inference_steps is None:
            raise Unsupported("a step before set_timesteps")
        levels = levels_of(scheduler)
        prediction, clip = prediction_of(scheduler.config), clip_of(scheduler.config)
        scaling = scheduler.config.timestep_scaling
        if choice.rules == "exact":
            return lcm_table(
                levels, timestep_scaling=scaling, prediction_type=prediction, clip_range=clip
            )
        times = levels.timesteps
        signal = float64(scheduler.alphas_cumprod)[torch.cat([times[1:], times[-1:]])]
        quiet = torch.arange(len(times), device="cpu") == scheduler.num_inference_steps - 1
        signal = torch.where(quiet, 1.0, signal)
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        c_skip, c_out = _scalings(scheduler, times)
        a_x, a_m = levels.x0_columns(prediction)
        return columns_table(
            "lcm",
            timesteps=times,
            alpha=levels.alpha[:-1],
            sigma=levels.sigma[:-1],
            end=(float(alpha[-1]), float(sigma[-1])),
            columns={
                "a_x": a_x,
                "a_m": a_m,
                "c_x": alpha * c_skip,
                "c_0": alpha * c_out,
                "c_z": sigma,
            },
            clip=clip,
        )

    def _draws(self, place: Place) -> bool:
        if self._fusion.manner.rules == "exact":
            return place.noisy
        assert self.num_inference_steps is not None
        return place.row != self.num_inference_steps - 1

    def _drawn_in(self, sample: Tensor, output: Tensor) -> torch.dtype:
        return torch.promote_types(sample.dtype, output.dtype)

    def _returning(self, table: SolverTable) -> SolverTable:
        c_skip, c_out = _scalings(self, table.timesteps)
        return with_history(table, 1, e_x=c_skip, e_0=c_out)


def _scalings(scheduler: Any, times: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at timesteps."""
    c_skip, c_out = tensors(
        lcm_coefficients(
            times.double(),
            sigma_data=_SIGMA_DATA,
            timestep_scaling=scheduler.config.timestep_scaling,
        )
    )
    return c_skip, c_out
