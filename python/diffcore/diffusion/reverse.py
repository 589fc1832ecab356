"""The reverse process p(x_{t-1} | x_t) from a model's output: its moments, and single steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._engine.dispatch import run
from diffcore._kernels.linear import LINEAR_COMBINATION
from diffcore._types import Model
from diffcore.coefficients.bound import LEARNED
from diffcore.diffusion.tables import DeviceCopies, DiffusionTables
from diffcore.noise import Noise
from diffcore.sampling.model import call_model, check_model_kwargs

# The kernel of ops.linear_combination, with the names of GaussianDiffusion.
_POSTERIOR = LINEAR_COMBINATION.reading.renamed(("x_start", "x_t"))


def predict(
    tables: DiffusionTables,
    model: Model,
    x: Tensor,
    t: Tensor,
    model_kwargs: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor | None]:
    """The model's prediction at t and, where the variance is learned, its variance output."""
    check_model_kwargs(model_kwargs)
    learned = tables.variance_type in LEARNED
    output = call_model(model, x, tables.model_timesteps(t), model_kwargs, learned=learned)
    prediction, variance_output = output.chunk(2, dim=1) if learned else (output, None)
    return prediction, variance_output


def posterior_mean(tables: DiffusionTables, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x_0): see ``GaussianDiffusion.q_posterior_mean_variance``."""
    return run(_POSTERIOR, (x_start, x_t), (tables.posterior[x_start.device],), t)


def moments(
    tables: DiffusionTables,
    x: Tensor,
    output: Tensor,
    variance_output: Tensor | None,
    t: Tensor,
    clip: float | None,
) -> dict[str, Tensor]:
    """Mean, variance, log-variance and predicted x_0: ``GaussianDiffusion.p_mean_variance``."""
    variance, log_variance = _variances(tables, variance_output, t, x)
    return {
        "mean": ops.reverse_step(x, output, tables.ddpm(clip)[x.device], t=t),
        "variance": variance,
        "log_variance": log_variance,
        "pred_xstart": predicted_x0(tables, x, output, t, clip),
    }


def step(
    x: Tensor,
    output: Tensor,
    t: Tensor,
    coefficients: DeviceCopies,
    noise: Noise | None,
    variance_output: Tensor | None = None,
    variance_coefficients: DeviceCopies | None = None,
) -> Tensor:
    """One step by a table of ``ops.reverse_step``.

    Args:
        x: x_t, ``[B, ...]``.
        output: The model's prediction, like ``x``.
        t: Timesteps, integer ``[B]``: rows of the tables.
        coefficients: The step.
        noise: Standard normal, like ``x``, or a noise key; ``None`` for no noise.
        variance_output: The model's variance output, like ``x``.
        variance_coefficients: Its coefficients; ``None`` for a step that does not read it.

    Returns:
        x_{t-1}, like ``x``.
    """
    if variance_coefficients is None:
        variance_output, variance_table = None, None
    else:
        variance_table = variance_coefficients[x.device]
    sample: Tensor = ops.reverse_step(
        x,
        output,
        coefficients[x.device],
        t=t,
        noise=noise,
        variance_output=variance_output,
        variance_coefficients=variance_table,
    )
    return sample


def predicted_x0(
    tables: DiffusionTables, x: Tensor, output: Tensor, t: Tensor, clip: float | None
) -> Tensor:
    """The predicted x_0, clipped to plus or minus ``clip``."""
    x0: Tensor = ops.reverse_step(x, output, tables.clipped_x0(clip)[x.device], t=t)
    return x0


def _variances(
    tables: DiffusionTables, variance_output: Tensor | None, t: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Variance and log-variance in the shape of ``x``: float64 beside float64, else float32."""
    if variance_output is None:
        variance = tables.extract("fixed_variance", t, x)
        return variance, tables.extract("fixed_log_variance", t, x)
    log_variance = variance_output
    if log_variance.dtype != torch.float64:
        log_variance = log_variance.float()
    if tables.variance_type == "learned_range":
        small = tables.extract("posterior_log_variance_clipped", t, x)
        large = tables.extract("log_betas", t, x)
        log_variance = small + 0.5 * (log_variance + 1) * (large - small)
    return log_variance.exp(), log_variance
