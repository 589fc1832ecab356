"""`sample`: the sampling loop with any solver table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffcore._types import Callback, Model, StepNoise
from diffcore.noise import PhiloxNoise
from diffcore.sampling.loop import check_samples, or_drawn, thresholding, walk
from diffcore.solvers import SolverTable


def sample(
    model: Model,
    x: Tensor,
    table: SolverTable,
    *,
    guidance_scale: float | Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    noise: StepNoise | None = None,
    dynamic_thresholding_ratio: float | None = None,
    sample_max_value: float = math.inf,
    callback: Callback | None = None,
    progress: bool | None = False,
) -> Tensor:
    """Walk from noise to samples with any solver: one launch a model call, no waiting in between.

    Nothing is remembered between calls, and nothing in the table changes: any number of threads
    may sample from one table at once. For a loop of your own, see ``SolverTable.step``.

    Args:
        model: ``model(x, t, **model_kwargs)`` with ``t`` ``[B]``, the table's timesteps (int64, or
            floating point numbers); its answer has the shape of ``x`` and is of the
            prediction_type that the table was made for. Under guidance without ``uncond_kwargs`` it
            answers ``[2 B, ...]``, the unconditional half first. For a table with a learned
            variance it answers with twice the channels: the prediction, then what it says of the
            variance; under guidance that of the conditional answer counts.
        x: The samples to start from, ``[B, ...]``: standard normal noise times
            ``table.init_noise_sigma``.
        table: The solver (``diffcore.solvers``).
        guidance_scale: w of classifier-free guidance, m_u + w (m_c - m_u): a number or ``[B]``.
        model_kwargs: More arguments for the model.
        uncond_kwargs: The same for a second, unconditional call of the model.
        noise: What the noise of the steps is: a recipe, of which row r takes the stream 1 + r after
            its own (so that the recipe itself may have drawn ``x``); a tensor ``[S, B, ...]``; or
            ``(r, x) -> noise``, called for the rows that add noise, and first with r = S where
            churn raises the start. ``None`` for a recipe seeded by torch's generator.
        dynamic_thresholding_ratio: Clip the predicted x_0 of each sample to [-s, s] and divide by
            s, the quantile at this ratio of its absolute values, at least 1 (Imagen).
        sample_max_value: The most that s may be.
        callback: Called once a step, before it, with a dict of ``x``, ``i`` (the step), ``t`` (what
            the model was told), ``sigma`` and ``denoised`` (x_0 as predicted; one more launch).
        progress: Show a bar (tqdm); ``None`` for one on terminals only.

    Returns:
        The samples, like ``x``.

    Raises:
        TypeError: An argument of the wrong type, or a model that returns something else.
        ValueError: Shapes that do not fit, or half of what guidance needs.
    """
    if not isinstance(table, SolverTable):
        raise TypeError(f"table must be a SolverTable, got {type(table).__name__}")
    check_samples(x)
    if noise is not None and not isinstance(noise, (Tensor, PhiloxNoise)) and not callable(noise):
        raise TypeError(
            "noise must be a tensor, a PhiloxNoise or a function (r, x) -> noise, "
            f"got {type(noise).__name__}"
        )
    if uncond_kwargs is not None and guidance_scale is None:
        raise ValueError("uncond_kwargs is given; wanted a guidance_scale with it")
    return walk(
        model,
        x,
        table,
        or_drawn(None, x) if noise is None else noise,
        guidance_scale=guidance_scale,
        model_kwargs=model_kwargs,
        uncond_kwargs=uncond_kwargs,
        threshold=thresholding(dynamic_thresholding_ratio, sample_max_value, guidance_scale),
        callback=callback,
        progress=progress,
        noise_name="noise",
    )
