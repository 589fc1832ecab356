"""The variational bound of GaussianDiffusion, term by term, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._devices import in_float64
from diffcore._engine.dtensor import replicated
from diffcore._types import Model
from diffcore.diffusion import reverse, training
from diffcore.diffusion.checks import exact_pixels
from diffcore.diffusion.tables import DiffusionTables
from diffcore.noise import Noise
from diffcore.ops._arguments import as_dof


def prior(tables: DiffusionTables, x_start: Tensor, dof: float | Tensor | None = None) -> Tensor:
    """L_T of each sample, ``[B]``: ``GaussianDiffusion.prior_bpd``."""
    if dof is None:
        return ops.prior_kl(x_start, *tables.last_level) * bits_per_nat(x_start)
    number = as_dof(dof, x_start)
    kl = ops.prior_kl(x_start, *tables.last_level, dof=number)
    return (kl / (number * math.log(2))).to(kl.dtype)


def noised_term(
    tables: DiffusionTables,
    model: Model,
    x_start: Tensor,
    t: Tensor,
    noise: Noise,
    clip: float | None,
    decoder: str,
    model_kwargs: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """The term t of the bound and the mean squared error of x_0, each ``[B]``."""
    x_t = training.noised(tables, x_start, t, noise)
    output, variance_output = reverse.predict(tables, model, x_t, t, model_kwargs)
    return term_of_noise(tables, x_start, noise, output, variance_output, t, clip, decoder)


def decoder_term(
    tables: DiffusionTables,
    model: Model,
    x_start: Tensor,
    noise: Noise,
    clip: float | None,
    bits: int,
    model_kwargs: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """``noised_term`` at t = 0 for pixels of any depth, in float64."""
    t = torch.zeros(len(x_start), dtype=torch.int64, device=x_start.device)
    x_t = training.noised(tables, x_start, t, noise)
    output, variance_output = reverse.predict(tables, model, x_t, t, model_kwargs)
    _, mse = term_of_noise(tables, x_start, noise, output, variance_output, t, clip, "gaussian")
    wide = exact_pixels(x_start, bits)
    noise = in_float64(noise) if isinstance(noise, Tensor) else noise.to(wide.device)
    t = t.to(wide.device)
    x_t = training.noised(tables, wide, t, noise)  # not rounded to the dtype of the data
    variance_output = None if variance_output is None else in_float64(variance_output)
    moments = reverse.moments(tables, x_t, in_float64(output), variance_output, t, clip)
    mass = ops.discretized_gaussian_log_likelihood(
        wide,
        means=moments["pred_xstart"],
        log_scales=(0.5 * in_float64(moments["log_variance"])).expand_as(wide),
        reduction="sample",
        bits=bits,
    )
    return (-mass * bits_per_nat(x_start)).to(mse.dtype).to(mse.device), mse


def of_terms(
    tables: DiffusionTables, prior: Tensor, found: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The bound, from the term and the error of x_0 at every timestep: ``calc_bpd_loop``."""
    vb, xstart_mse = (torch.stack(values, dim=1) for values in zip(*found, strict=True))
    snr = replicated(tables.snr[prior.device], xstart_mse)
    return {
        "total_bpd": vb.sum(dim=1) + prior,
        "prior_bpd": prior,
        "vb": vb,
        "xstart_mse": xstart_mse,
        "mse": (xstart_mse * snr).to(vb.dtype),
    }


def term_of_x_t(
    tables: DiffusionTables,
    x_start: Tensor,
    x_t: Tensor,
    output: Tensor,
    variance_output: Tensor | None,
    t: Tensor,
    clip: float | None,
    decoder: str,
) -> dict[str, Tensor]:
    """The term t from x_t, and the predicted x_0: ``GaussianDiffusion.vb_terms_bpd``."""
    term = ops.vlb_term(
        x_start,
        output,
        tables.vlb(clip, decoder, "x_t")[x_start.device],
        t=t,
        x_t=x_t,
        variance_output=variance_output,
        scale=bits_per_nat(x_start),
    )
    pred_xstart = ops.linear_combination(x_t, output, tables.x0[x_t.device], t=t)
    if clip is not None:
        pred_xstart = pred_xstart.clamp(-clip, clip)
    return {"output": term, "pred_xstart": pred_xstart}


def term_of_noise(
    tables: DiffusionTables,
    x_start: Tensor,
    noise: Noise,
    output: Tensor,
    variance_output: Tensor | None,
    t: Tensor,
    clip: float | None,
    decoder: str,
) -> tuple[Tensor, Tensor]:
    """The term t and the mean squared error of the predicted x_0, each ``[B]``.

    Both are computed from x_0 and the noise in x_t. Computed from x_t instead, the error of the
    predicted x_0 would be a difference of large numbers.

    Args:
        tables: The diffusion.
        x_start: x_0, ``[B, ...]``.
        noise: The noise in x_t: like ``x_start``, or a noise key.
        output: The prediction at x_t, like ``x_start``.
        variance_output: The variance output, where the variance is learned.
        t: Timesteps, integer ``[B]``.
        clip: Largest magnitude of the predicted x_0; ``None`` for no clip.
        decoder: "discretized" or "gaussian".

    Returns:
        The term in bits per dimension, and the error.
    """
    term = ops.vlb_term(
        x_start,
        output,
        tables.vlb(clip, decoder, "noise")[x_start.device],
        t=t,
        noise=noise,
        variance_output=variance_output,
        scale=bits_per_nat(x_start),
    )
    errors = tables.x0_error(clip)[x_start.device]
    scale = 1 / max(1, x_start.shape[1:].numel())
    return term, ops.vlb_term(x_start, output, errors, t=t, noise=noise, scale=scale)


def bits_per_nat(x: Tensor) -> float:
    """The factor from nats per sample to bits per dimension."""
    return 1 / (max(1, x.shape[1:].numel()) * math.log(2))
