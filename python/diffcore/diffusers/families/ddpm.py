"""DDPMScheduler and DDPMParallelScheduler: ancestral sampling."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm_parallel import DDPMParallelSchedulerOutput
from torch import Tensor

from diffcore.coefficients.step import posterior_coefficients, tensors
from diffcore.diffusers.families.schedule import (
    ByTimestep,
    clip_of,
    levels_of,
    prediction_of,
    schedule_times,
)
from diffcore.diffusers.scheduler import Choice, Place
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import NoiseLevels, SolverTable, ddpm_table
from diffcore.solvers.rows import one_call_coefficients, one_call_table

# "fixed_small_log" takes the square root by a logarithm: the same value.
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
_REFUSED = {
    "fixed_large_log": "variance_type='fixed_large_log', whose noise is nan in diffusers",
    "learned": "variance_type='learned', where diffusers takes v for the variance itself",
}
_LEAST_VARIANCE = 1e-20


class FusedDDPM(ByTimestep):
    """x' = A x0 + B x + c_z z. Ho et al. 2020 (arXiv 2006.11239), algorithm 2."""

    stock: ClassVar[type] = DDPMScheduler
    output_class: ClassVar[Any] = DDPMSchedulerOutput
    coefficients = ("float64", "diffusers")
    returns_x0 = True
    casts_to_model = False

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        config = scheduler.config
        named = _VARIANCES.get(scheduler.variance_type)
        if named is None:
            kind = scheduler.variance_type
            raise Unsupported(_REFUSED.get(kind, f"variance_type={kind!r}"))
        levels = levels_of(scheduler)
        prediction, clip = prediction_of(config), clip_of(config)
        if choice.rules == "exact":
            return ddpm_table(
                levels, variance_type=named, prediction_type=prediction, clip_range=clip
            )
        posterior = _in_float32(scheduler) if choice.coefficients == "diffusers" else None
        return _as_diffusers(levels, named, prediction, clip, posterior)

    def _draws(self, place: Place) -> bool:
        return place.timestep > 0


class FusedDDPMParallel(FusedDDPM):
    """As DDPM; ``batch_step_no_noise`` is diffusers'."""

    stock = DDPMParallelScheduler
    output_class = DDPMParallelSchedulerOutput


def _as_diffusers(
    levels: NoiseLevels,
    variance_type: str,
    prediction_type: str,
    clip_range: float | None,
    posterior: tuple[Tensor, ...] | None,
) -> SolverTable:
    """With noise in every step but that of timestep 0, even if the last one ends at sigma = 0."""
    if posterior is None:
        ends = levels.alpha[:-1], levels.sigma[:-1], levels.alpha[1:], levels.sigma[1:]
        posterior = tensors(posterior_coefficients(*ends))
    c_0, c_x, beta_tilde, beta = posterior
    beta_tilde = beta_tilde.clamp(min=_LEAST_VARIANCE)
    noisy = levels.timesteps > 0
    # diffusers' beta is that of the step, 1 - alpha_t^2 / alpha_s^2; in the last it is sigma^2.
    learned = None
    if variance_type == "learned_range":
        small, large = (torch.where(noisy, v, 1.0).log() for v in (beta_tilde, beta))
        learned = torch.stack([small + large, large - small], dim=1) / 4
        c_z = noisy.double()
    else:
        variance = beta_tilde if variance_type == "fixed_small" else beta
        c_z = torch.where(noisy, variance, 0.0).sqrt()
    coefficients = one_call_coefficients(
        "ddpm", levels, prediction_type, clip_range, c_x=c_x, c_0=c_0, c_z=c_z
    )
    return one_call_table("ddpm", levels, coefficients, variance=learned)


def _in_float32(scheduler: Any) -> tuple[Tensor, ...]:
    """A, B, beta_tilde and beta of the steps with diffusers' operations, each rounded to float32.

    1 - a_t / a_s of neighbouring timesteps has few digits there: A is off by up to 2e-4 of itself.
    """
    signal = scheduler.alphas_cumprod.to("cpu", torch.float32)[schedule_times(scheduler)]
    after = torch.cat([signal[1:], signal.new_ones(1)])
    kept, spread, spread_after = signal / after, 1 - signal, 1 - after
    beta = 1 - kept
    c_0 = after.sqrt() * beta / spread
    c_x = kept.sqrt() * spread_after / spread
    return tuple(x.double() for x in (c_0, c_x, spread_after / spread * beta, beta))
