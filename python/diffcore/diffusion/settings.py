"""What every method of ``GaussianDiffusion`` reads, and the arguments that many share."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore._checks import as_flag
from diffcore._engine.kept import constant_in_traces
from diffcore.diffusion.checks import check_batch, check_timestep_values, check_timesteps
from diffcore.diffusion.tables import DiffusionTables


class Settings:
    """The settings of a diffusion; ``GaussianDiffusion`` describes them."""

    num_timesteps: int
    prediction_type: str
    variance_type: str
    clip_sample: bool
    clip_sample_range: float
    loss_type: str
    tables: DiffusionTables

    def _clip_range(self, clip_denoised: bool | None) -> float | None:
        """Largest magnitude of the predicted x_0; ``None`` for no clip."""
        clip = self.clip_sample if clip_denoised is None else clip_denoised
        if not as_flag("clip_denoised", clip):
            return None
        if torch.compiler.is_dynamo_compiling():
            # With dynamic=True a float is no constant, but tables are made for one.
            known = self._constant_clip_range()
            if known == self.clip_sample_range:  # a guard
                return known
        return self.clip_sample_range

    @constant_in_traces
    def _constant_clip_range(self) -> float:
        return self.clip_sample_range

    def _timesteps_of(self, x: Tensor, t: Tensor | int) -> Tensor:
        """Checked timesteps of x_t, for steps that call the model before a kernel checks ``t``."""
        check_batch("x", x)  # the model reads it before a kernel does
        t = check_timesteps(t, x, self.num_timesteps, name="x")
        check_timestep_values(t, self.num_timesteps)
        return t
