"""The training losses of GaussianDiffusion."""

from __future__ import annotations

import math
from typing import TypeAlias

from torch import Tensor

from diffcore import ops
from diffcore._devices import wide_dtype
from diffcore._kernels.linear import LINEAR_COMBINATION
from diffcore._types import Coef
from diffcore.diffusion.tables import DiffusionTables
from diffcore.noise import Noise
from diffcore.ops._noise import run_noisy

LOSS_TYPES = ("mse", "rescaled_mse", "kl", "rescaled_kl")

Counted: TypeAlias = tuple[Tensor | None, str]
"""A mask and its reduction."""
ErrorLoss: TypeAlias = tuple[str, Coef | None]
"""``loss`` and ``delta`` of ``ops.denoising_loss``."""


# The kernel of ops.q_sample, with the names of GaussianDiffusion.
_NOISED = LINEAR_COMBINATION.renamed(("x_start", "noise"), ("alpha", "sigma"), table="table")


def noised(tables: DiffusionTables, x_start: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """x_t from x_0, checked timesteps and noise: ``GaussianDiffusion.q_sample``."""
    x_t: Tensor = run_noisy(_NOISED, (x_start,), noise, (tables.noise[x_start.device],), t)
    return x_t


def perturbed(
    tables: DiffusionTables, x_t: Tensor, t: Tensor, noise: Noise, strength: float
) -> Tensor:
    """``x_t + strength sigma_t noise``, at checked timesteps."""
    sigma = tables.column("sqrt_one_minus_alphas_cumprod")[x_t.device]
    coefs = (1.0, (strength * sigma).unsqueeze(1))
    found: Tensor = run_noisy(LINEAR_COMBINATION, (x_t,), noise, coefs, t)
    return found


def losses(
    tables: DiffusionTables,
    loss_type: str,
    x_start: Tensor,
    output: Tensor,
    variance_output: Tensor | None,
    noise: Noise,
    t: Tensor,
    *,
    weights: Tensor | None,
    decoder: str,
    counted: Counted,
    error: ErrorLoss = ("mse", None),
) -> dict[str, Tensor]:
    """The losses of a model's output: see ``GaussianDiffusion.training_losses``.

    Args:
        tables: The diffusion.
        loss_type: One of ``LOSS_TYPES``.
        x_start: x_0, ``[B, ...]``.
        output: The prediction at x_t, like ``x_start``.
        variance_output: The variance output, where the variance is learned.
        noise: The noise in x_t.
        t: Timesteps, integer ``[B]``.
        weights: ``[T]``, or ``None`` for 1.
        decoder: "discretized" or "gaussian".
        counted: The mask, or ``None``, and its reduction.
        error: The loss of an error and its delta.

    Returns:
        ``loss`` and its parts, each ``[B]``.
    """
    if loss_type in ("kl", "rescaled_kl"):
        factor = len(tables) if loss_type == "rescaled_kl" else 1.0
        vb = _bound_term(
            tables, x_start, output, variance_output, noise, t, decoder, factor, counted
        )
        return {"loss": vb, "vb": vb}
    mse = _error(tables, x_start, output, noise, t, weights, counted, error)
    if variance_output is None:
        return {"loss": mse, "mse": mse}
    factor = len(tables) / 1000 if loss_type == "rescaled_mse" else 1.0
    mean = output.detach()  # the bound trains the variance only
    vb = _bound_term(tables, x_start, mean, variance_output, noise, t, decoder, factor, counted)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def _error(
    tables: DiffusionTables,
    x_start: Tensor,
    output: Tensor,
    noise: Noise,
    t: Tensor,
    weights: Tensor | None,
    counted: Counted,
    error: ErrorLoss,
) -> Tensor:
    """w_t mean (output - target)^2 of each sample, or the mean of another loss."""
    device = x_start.device
    alpha = sigma = None
    if tables.prediction_type == "v_prediction":
        alpha = tables.column("sqrt_alphas_cumprod")[device]
        sigma = tables.column("sqrt_one_minus_alphas_cumprod")[device]
    if weights is not None:
        weights = weights.to(device=device, dtype=wide_dtype(device))
    return ops.denoising_loss(
        output,
        x_start,
        noise,
        prediction_type=tables.prediction_type,
        alpha=alpha,
        sigma=sigma,
        weight=weights,
        t=t,
        mask=counted[0],
        mask_reduction=counted[1],
        loss=error[0],
        delta=error[1],
    )


def _bound_term(
    tables: DiffusionTables,
    x_start: Tensor,
    output: Tensor,
    variance_output: Tensor | None,
    noise: Noise,
    t: Tensor,
    decoder: str,
    factor: float,
    counted: Counted,
) -> Tensor:
    """``factor`` times the term of the bound, in bits per dimension."""
    n = max(x_start.shape[1:].numel(), 1)
    return ops.vlb_term(
        x_start,
        output,
        tables.vlb(None, decoder, "noise")[x_start.device],
        t=t,
        noise=noise,
        variance_output=variance_output,
        scale=factor / (n * math.log(2)),
        mask=counted[0],
        mask_reduction=counted[1],
    )
