"""DDIMScheduler and DDIMParallelScheduler."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import DDIMParallelScheduler, DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddim_parallel import DDIMParallelSchedulerOutput

from diffcore.coefficients.step import ddim_coefficients
from diffcore.diffusers.families.schedule import (
    ByTimestep,
    clip_of,
    levels_of,
    prediction_of,
    signal_before,
)
from diffcore.diffusers.rows import columns_table
from diffcore.diffusers.scheduler import Call, Choice, Place
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import SolverTable, ddim_table


class FusedDDIM(ByTimestep):
    """x' = alpha' x0 + sqrt(sigma'^2 - c_z^2) epsilon + c_z z. Song et al. 2021 (2010.02502)."""

    stock: ClassVar[type] = DDIMScheduler
    output_class: ClassVar[Any] = DDIMSchedulerOutput
    options = ("eta", "use_clipped_model_output")
    returns_x0 = True
    casts_to_model = False

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; options: ``eta``, ``use_clipped_model_output``."""
        config = scheduler.config
        if scheduler.num_inference_steps is None:
            raise Unsupported("a step before set_timesteps")
        levels = levels_of(scheduler)
        how: dict[str, Any] = {
            "eta": float(choice.options.get("eta", 0.0)),
            "rederive_epsilon": bool(choice.options.get("use_clipped_model_output", False)),
            "prediction_type": prediction_of(config),
            "clip_range": clip_of(config),
        }
        if choice.rules == "exact":
            return ddim_table(levels, **how)
        end = signal_before(scheduler, levels.timesteps)
        alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
        columns = ddim_coefficients(alpha, sigma, end.sqrt(), (1 - end).sqrt(), **how)
        names = ("c_x", "c_m", "c_0", "c_z", "a_x", "a_m")
        return columns_table(
            "ddim",
            timesteps=levels.timesteps,
            alpha=alpha,
            sigma=sigma,
            end=(float(end[-1].sqrt()), float((1 - end[-1]).sqrt())),
            columns=dict(zip(names, columns[:, :6].unbind(1), strict=True)),
            clip=clip_of(config),
        )

    def _refuse(self, call: Call) -> None:
        if call.generator is not None and call.variance_noise is not None and call.eta > 0:
            raise Unsupported("generator and variance_noise together")

    def _draws(self, place: Place) -> bool:
        return bool(place.options["eta"] > 0)


class FusedDDIMParallel(FusedDDIM):
    """As DDIM; ``batch_step_no_noise`` is diffusers'."""

    stock = DDIMParallelScheduler
    output_class = DDIMParallelSchedulerOutput
