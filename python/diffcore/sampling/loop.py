"""The sampling loop: every sampler of the package runs a solver table here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._types import Callback, Model, Tensors
from diffcore.noise import StepNoise
from diffcore.sampling.model import check_model_kwargs, predict
from diffcore.sampling.noise import check_noise_rows, noise_of_row
from diffcore.sampling.progress import progress_bar
from diffcore.sampling.step import callback_state, timestep_inputs
from diffcore.sampling.threshold import Threshold
from diffcore.solvers import SolverTable


@torch.no_grad()
def run_table(
    model: Model,
    x: Tensor,
    table: SolverTable,
    step_noise: StepNoise,
    *,
    guidance_scale: float | Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    threshold: Threshold | None = None,
    callback: Callback | None = None,
    progress: bool | None = False,
    noise_name: str = "step_noise",
    learned: bool = False,
) -> Tensor:
    """Run a solver table from its first row to its last, without gradients.

    Rows are selected by Python ints, so nothing is read back from the device.

    Args:
        model: See ``diffcore.sample``, also for the arguments that are not explained here.
        x: Samples to start from.
        table: The solver.
        step_noise: ``(row, x) -> noise``; a noise key, of which row r takes the stream 1 + r after
            its own; or a tensor ``[S, B, ...]``. The noise that churn adds before the first step is
            that of row S.
        guidance_scale: w of classifier-free guidance.
        model_kwargs: More arguments for the model.
        uncond_kwargs: The same for its unconditional call.
        threshold: Function that gives the bound of x_0.
        callback: Called once a step, after its model call and before the step.
        progress: Show a bar; ``None`` for one on terminals only.
        noise_name: What the caller calls ``step_noise``, for errors.
        learned: Whether the model predicts its variance although the table does not read it. A
            table that reads it needs no such hint.

    Returns:
        The samples.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function, got {type(callback).__name__}")
    check_model_kwargs(model_kwargs)
    check_model_kwargs(uncond_kwargs, "uncond_kwargs")
    check_noise_rows(step_noise, x, table, noise_name)
    if table.start_noise:
        churn = noise_of_row(step_noise, len(table), x, noise_name)
        x = ops.add_noise(x, churn, table.start_scale, table.start_noise)
    timesteps = timestep_inputs(table, x)
    guided, reads_variance = guidance_scale is not None, table.variance is not None
    learned = learned or reads_variance
    history: Tensors = ()
    for i, row in enumerate(progress_bar(table.rows, table.name, progress)):
        prediction = predict(
            model,
            x if row.input_scale == 1 else row.input_scale * x,
            timesteps[i],
            model_kwargs,
            uncond_kwargs,
            guided,
            learned,
        )
        bound = None if threshold is None else threshold(row, x, prediction)
        if callback is not None and row.begins:
            t = timesteps[i]
            callback(callback_state(table, i, x, t, prediction, guidance_scale, bound))
        output, uncond, variance = prediction
        x, history = table.step(
            i,
            x,
            output,
            history,
            noise=noise_of_row(step_noise, i, x, noise_name) if row.noisy else None,
            model_output_uncond=uncond,
            guidance_scale=guidance_scale,
            threshold=bound,
            variance_output=variance if reads_variance else None,
        )
    return x
