"""EDMDPMSolverMultistepScheduler: DPM-Solver++ with EDM's preconditioning."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from diffusers import EDMDPMSolverMultistepScheduler
from torch import Tensor

from diffcore.diffusers.families.dpm import OfDPMSolver, multistep_table, refuse_third_order
from diffcore.diffusers.families.multistep import held_from
from diffcore.diffusers.scheduler import Choice
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import NoiseLevels, SolverTable


class FusedEDMDPMSolverMultistep(OfDPMSolver):
    """DPM-Solver++ with x_0 = c_skip x + c_out F. Karras et al. 2022 (arXiv 2206.00364)."""

    stock = EDMDPMSolverMultistepScheduler

    is_scale_input_called: bool

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        config = scheduler.config
        if config.algorithm_type.startswith("sde-"):
            refuse_third_order(config, choice.rules)
        if config.prediction_type not in ("epsilon", "v_prediction"):
            raise Unsupported(f"prediction_type={config.prediction_type!r}")
        times, held = held_from(scheduler, choice.start)
        levels = NoiseLevels.from_edm(held, sigma_data=config.sigma_data)
        levels = dataclasses.replace(
            levels, timesteps=times, init_noise_sigma=float(scheduler.init_noise_sigma)
        )
        return multistep_table(scheduler, levels)

    def _level(self, held: float) -> tuple[float, float]:
        return 1.0, held

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """X / sqrt(sigma^2 + sigma_data^2)."""
        walk = self._walk()
        try:
            row = self._row(walk, timestep)
        except Unsupported:  # a timestep that diffusers takes for the last one
            scaled: Tensor = super().scale_model_input(sample, timestep)  # type: ignore[misc]
            return scaled
        if self._step_index is None:
            self._step_index = row
        self.is_scale_input_called = True
        return sample * (1 / math.hypot(walk.sigmas[row], self.config.sigma_data))
