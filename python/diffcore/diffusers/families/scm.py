"""SCMScheduler: sampling of continuous-time consistency models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SCMScheduler
from diffusers.schedulers.scheduling_scm import SCMSchedulerOutput
from torch import Tensor

from diffcore.diffusers.families.schedule import Stateless
from diffcore.diffusers.rows import columns_table, float64, with_column
from diffcore.diffusers.scheduler import Call, Choice, Place
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import SolverTable, trigflow_table


class FusedSCM(Stateless):
    """x' = cos t' x0 + sin t' sigma_data z, x0 = cos t x - sin t m. Lu and Song 2024 (2410.11081).

    m is sigma_data times the network's output. diffusers starts at 1.5708, a little above pi / 2,
    draws noise in the last step, too, and always in torch's default dtype.
    """

    stock = SCMScheduler
    output_class = SCMSchedulerOutput
    returns_x0 = True

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options.

        The model of the table gets x itself, and returns m.
        """
        if scheduler.num_inference_steps is None:
            raise Unsupported("a step before set_timesteps")
        if scheduler.config.prediction_type != "trigflow":
            raise Unsupported(f"prediction_type={scheduler.config.prediction_type!r}")
        data = float(scheduler.config.sigma_data)
        times = float64(scheduler.timesteps)
        t, after = times[:-1], times[1:]
        if choice.rules == "exact":
            table = trigflow_table(times, sigma_data=data)
            return with_column(table, "a_m", table.column("a_m") / data)
        return columns_table(
            "trigflow",
            timesteps=t,
            alpha=t.cos(),
            sigma=data * t.sin(),
            end=(float(after[-1].cos()), data * float(after[-1].sin())),
            columns={
                "a_x": t.cos(),
                "a_m": -t.sin(),
                "c_0": after.cos(),
                "c_z": data * after.sin(),
            },
            init_noise_sigma=data,
        )

    def _draws(self, place: Place) -> bool:
        return place.noisy if self._fusion.manner.rules == "exact" else True

    def _drawn_in(self, sample: Tensor, output: Tensor) -> torch.dtype:
        return torch.get_default_dtype()

    def _dtype(self, sample: Tensor, output: Tensor) -> torch.dtype:
        widest = torch.promote_types(sample.dtype, output.dtype)
        return torch.promote_types(widest, torch.get_default_dtype())

    def _step(self, call: Call) -> Any:
        taken = super()._step(call._replace(return_dict=False))
        if taken is None:
            return None
        x, x0 = taken
        x0 = x0.to(torch.promote_types(call.sample.dtype, call.model_output.dtype))
        return self._output(x, x0, return_dict=call.return_dict)
