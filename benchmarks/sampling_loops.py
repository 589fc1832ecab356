"""One solver in three forms: a diffcore table, formulas in plain torch, a scheduler of diffusers.

All three take the same steps over the same schedule. diffusers is optional: without it, the other
two remain.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffcore.schedules import NoiseSchedule, make_betas, respaced_timesteps
from diffcore.solvers import NoiseLevels, ddim_table, ddpm_table, dpmpp_table, euler_table

TRAINING_STEPS = 1000
CLIP = 1.0
NO_DIFFUSERS = "diffusers is not installed and did not take part"

Model = Callable[[Tensor, Tensor], Tensor]
Noises = Callable[[Tensor], Tensor]
Pair = tuple[Tensor, Tensor | None]
Formula = Callable[..., Pair]
"""(x, m, h, z) -> x' and the h of the next step; h and z are None where a step has none."""

_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPM": ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": CLIP}),
    "DDIM": ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": CLIP}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    "Euler": ("EulerDiscreteScheduler", {}),
}


def has_diffusers() -> bool:
    """Whether diffusers can take part."""
    return importlib.util.find_spec("diffusers") is not None


class SamplingLoop:
    """A solver over the linear schedule, at evenly spaced ("trailing") timesteps.

    Args:
        kind: "DDPM" or "DDIM", which clip x_0 to [-1, 1]; "DPM++ 2M"; or "Euler", for x / alpha as
            in diffusers.
        steps: Number of steps.
    """

    def __init__(self, kind: str, steps: int) -> None:
        self.kind, self.steps = kind, steps
        schedule = NoiseSchedule.from_betas(make_betas("linear", TRAINING_STEPS))
        self.timesteps = respaced_timesteps(TRAINING_STEPS, steps, "trailing")
        levels = NoiseLevels.from_schedule(schedule, self.timesteps)
        if kind == "DDPM":
            self.table = ddpm_table(levels, clip_range=CLIP)
        elif kind == "DDIM":
            self.table = ddim_table(levels, rederive_epsilon=False, clip_range=CLIP)
        elif kind == "DPM++ 2M":
            self.table = dpmpp_table(levels)
        else:
            levels = levels.sigma_space()
            self.table = euler_table(levels)
        self.levels = levels.levels()

    def formula(self, i: int) -> Formula:
        """Step i in plain torch; its coefficients are numbers."""
        here, after = self.levels[i], self.levels[i + 1]
        a, s, a_next, s_next = here.alpha, here.sigma, after.alpha, after.sigma
        if self.kind == "DDPM":
            ratio = a / a_next
            beta = s**2 - (ratio * s_next) ** 2
            c_0, c_x = a_next * beta / s**2, ratio * s_next**2 / s**2
            c_z = math.sqrt(beta) * s_next / s

            def ddpm(x: Tensor, m: Tensor, h: Tensor | None, z: Tensor | None) -> Pair:
                x0 = ((x - s * m) / a).clamp(-CLIP, CLIP)
                mean = c_0 * x0 + c_x * x
                return mean if z is None else mean + c_z * z, None

            return ddpm
        if self.kind == "DDIM":

            def ddim(x: Tensor, m: Tensor, h: Tensor | None, z: Tensor | None) -> Pair:
                x0 = ((x - s * m) / a).clamp(-CLIP, CLIP)
                return a_next * x0 + s_next * m, None

            return ddim
        if self.kind == "Euler":

            def euler(x: Tensor, m: Tensor, h: Tensor | None, z: Tensor | None) -> Pair:
                return x + (s_next - s) * m, None

            return euler
        shrink = a * s_next / (a_next * s)  # exp(-(lambda' - lambda)), 0 at the end
        half = 0.0
        if i > 0 and s_next > 0:
            half = (after.lam - here.lam) / (here.lam - self.levels[i - 1].lam) / 2

        def dpmpp(x: Tensor, m: Tensor, h: Tensor | None, z: Tensor | None) -> Pair:
            x0 = (x - s * m) / a
            slope = x0 if h is None or half == 0 else (1 + half) * x0 - half * h
            return s_next / s * x + a_next * (1 - shrink) * slope, x0

        return dpmpp

    def plain_torch(self, device: torch.device) -> Callable[..., Tensor]:
        """The complete loop in plain torch: (model, x, noise=torch.randn_like) -> samples.

        Args:
            device: Where it runs; its constants are made here, outside the loop.
        """
        timesteps = self.table.timesteps.to(device)
        formulas = [self.formula(i) for i in range(self.steps)]
        steps = list(zip(formulas, timesteps, self.table.rows, strict=True))

        def loop(model: Model, x: Tensor, noise: Noises = torch.randn_like) -> Tensor:
            h = None
            for formula, t, row in steps:
                scaled = x if row.input_scale == 1 else row.input_scale * x
                m = model(scaled, t.expand(len(x)))
                x, h = formula(x, m, h, noise(x) if row.noisy else None)
            return x

        return loop

    def diffusers(self, device: torch.device) -> Callable[..., Tensor]:
        """The loop of diffusers' pipelines: (model, x) -> samples.

        Args:
            device: Where it runs; the scheduler is made here, outside the loop.
        """
        scheduler = self.scheduler(device)

        def loop(model: Model, x: Tensor) -> Tensor:
            # Reset, as by set_timesteps, which pipelines call first and which is not timed.
            scheduler._step_index, scheduler.lower_order_nums = None, 0
            for t in scheduler.timesteps:
                m = model(scheduler.scale_model_input(x, t), t.expand(len(x)))
                x = scheduler.step(m, t, x, return_dict=False)[0]
            return x

        return loop

    def scheduler(self, device: torch.device) -> Any:
        """The scheduler of diffusers, before its first step.

        Args:
            device: Device of its timesteps.
        """
        name, options = _SCHEDULERS[self.kind]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its use of NumPy
            scheduler = getattr(importlib.import_module("diffusers"), name)(
                TRAINING_STEPS,
                beta_start=1e-4,
                beta_end=0.02,
                beta_schedule="linear",
                timestep_spacing="trailing",
                **options,
            )
            scheduler.set_timesteps(self.steps, device=device)
        return scheduler
