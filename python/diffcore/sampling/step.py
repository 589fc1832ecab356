"""One row of a solver table inside a sampling loop: the model's input, and the launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore._types import Noise, Tensors
from diffcore.sampling.model import Prediction
from diffcore.solvers import SolverTable


def timestep_inputs(table: SolverTable, x: Tensor) -> Tensor:
    """The timestep input of every row, on the device of the samples.

    Args:
        table: The solver.
        x: Samples ``[B, ...]``.

    Returns:
        ``[S, B]``: int64 where the timesteps are integers, else float32, or float64 beside float64
        samples.
    """
    timesteps = table.to(x.device).timesteps
    if timesteps.is_floating_point() and x.dtype != torch.float64:
        timesteps = timesteps.float()
    return timesteps.unsqueeze(1).repeat(1, x.shape[0])


class Step(NamedTuple):
    """What one row of a table needs beside noise and history.

    Attributes:
        table: The solver.
        i: The row.
        x: The samples before it, ``[B, ...]``.
        prediction: What the model returned for them.
        guidance_scale: w of classifier-free guidance, else ``None``.
        threshold: Bound of x_0, ``[B]``, else ``None``.
    """

    table: SolverTable
    i: int
    x: Tensor
    prediction: Prediction
    guidance_scale: float | Tensor | None
    threshold: Tensor | None

    def launch(self, history: Tensors, noise: Noise | None) -> tuple[Tensor, Tensors]:
        """The next x and the next history, see ``SolverTable.step``."""
        output, uncond, variance = self.prediction
        return self.table.step(
            self.i,
            self.x,
            output,
            history,
            noise=noise,
            model_output_uncond=uncond,
            guidance_scale=self.guidance_scale,
            threshold=self.threshold,
            # A model may predict a variance that the table does not read (DDIM).
            variance_output=None if self.table.variance is None else variance,
        )

    def state(self, t: Tensor) -> dict[str, Any]:
        """What a callback gets, at the timestep input t; the predicted x_0 takes one launch."""
        row = self.table.rows[self.i]
        denoised = self.table.denoised(
            self.i,
            self.x,
            self.prediction.output,
            model_output_uncond=self.prediction.uncond,
            guidance_scale=self.guidance_scale,
            threshold=self.threshold,
        )
        return {"x": self.x, "i": row.step, "t": t, "sigma": row.sigma, "denoised": denoised}
