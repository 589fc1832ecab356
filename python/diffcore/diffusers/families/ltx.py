"""LTXEulerAncestralRFScheduler: ancestral steps of a rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTXEulerAncestralRFScheduler
from diffusers.schedulers.scheduling_ltx_euler_ancestral_rf import (
    LTXEulerAncestralRFSchedulerOutput,
)
from torch import Tensor

from diffcore.diffusers.families.schedule import Stateless
from diffcore.diffusers.rows import columns_table, float64
from diffcore.diffusers.scheduler import Call, Choice, Place
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import NoiseLevels, SolverTable, flow_euler_ancestral_table

# Numbers of diffusers: what counts as the clean end, and what keeps a divisor from 0.
_CLEAN = 1e-8
_TINY = 1e-12


class FusedLTXEulerAncestralRF(Stateless):
    """Euler's step to sigma_down, then noise up to sigma': ComfyUI's sample_euler_ancestral_RF.

    sigma_down = sigma' (1 + eta (sigma' / sigma - 1)). With ``s_noise=0`` diffusers also leaves out
    the scale to the signal of sigma'.
    """

    stock = LTXEulerAncestralRFScheduler
    refuses_integers = True
    output_class = LTXEulerAncestralRFSchedulerOutput
    noise_dtype = torch.float32

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        if scheduler.sigmas is None:
            raise Unsupported("a step before set_timesteps")
        eta, s_noise = float(scheduler.config.eta), float(scheduler.config.s_noise)
        sigmas = float64(scheduler.sigmas)
        sigma, after = sigmas[:-1], sigmas[1:]
        times = scheduler.timesteps[: len(sigma)]  # of own sigmas there is one more
        if choice.rules == "exact":
            levels = NoiseLevels.from_flow(sigmas, timesteps=float64(times))
            return flow_euler_ancestral_table(levels, eta=eta, s_noise=s_noise)
        ends = after.abs() < _CLEAN
        down = torch.where(ends, 0.0, after * (1 + eta * (after / sigma - 1)))
        keep = down / sigma
        scale, c_z = torch.ones_like(keep), torch.zeros_like(keep)
        if eta > 0 and s_noise > 0:
            scale = torch.where(ends, 1.0, (1 - after) / (1 - down + _TINY))
            kept = (down * (1 - after)) ** 2 / ((1 - down) ** 2 + _TINY)
            c_z = torch.where(ends, 0.0, s_noise * (after**2 - kept).clamp_min(0.0).sqrt())
        one = torch.ones_like(sigma)
        return columns_table(
            "flow_euler_ancestral",
            timesteps=times,
            alpha=1 - sigma,
            sigma=sigma,
            end=(1 - float(after[-1]), float(after[-1])),
            columns={
                "a_x": one,
                "a_m": -sigma,
                "c_x": scale * keep,
                "c_0": scale * (1 - keep),
                "c_z": c_z,
            },
        )

    def _draws(self, place: Place) -> bool:
        if self._fusion.manner.rules == "exact":
            return place.noisy
        after = self._walk().sigmas[place.row + 1]
        return bool(self.config.eta > 0 and self.config.s_noise > 0 and abs(after) >= _CLEAN)

    def _dtype(self, sample: Tensor, output: Tensor) -> torch.dtype:
        return sample.dtype

    def _done(self, row: int) -> None:
        self._step_index = min(row + 1, len(self._walk().sigmas) - 1)

    def _step(self, call: Call) -> Any:
        sigmas: Any = self.sigmas  # type: ignore[attr-defined]
        if self._step_index is not None and self._step_index >= len(sigmas) - 1:
            # The end, as in diffusers.
            return self._output(call.sample, return_dict=call.return_dict)
        return super()._step(call)
