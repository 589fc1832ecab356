"""The functions of VAEs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffcore import (
    DiagonalGaussianDistribution,
    NoiseSchedule,
    elbo,
    elbo_terms,
    importance_weighted_bound,
    losses,
    make_betas,
    vae,
    vae_loss,
)
from support.routes.case import Case
from support.routes.op_cases import KEY

Given = dict[str, Tensor]
SNR = NoiseSchedule.from_betas(make_betas("linear", 25, scale_to_1000=True)).snr
TABLE_OF_SNR: Callable[[int], Given] = lambda batch: {"snr": SNR}  # noqa: E731


def _vae(
    name: str,
    call: Callable[[Given], Any],
    tensors: str,
    differentiable: str = "",
    suffix: str = "",
) -> Case:
    return Case(
        f"{name}{suffix}",
        name,
        "vae",
        lambda _, given: call(given),
        tuple(tensors.split()),
        tuple((differentiable or tensors).split()),
    )


def posterior(given: Given) -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(torch.cat([given["mean"], given["logvar"]], 1))


def prior(given: Given) -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(torch.cat([given["z"], given["logvar"] + 0.3], 1))


def _wide(x: Tensor) -> Tensor:
    """In float32 at least, so that what a case computes is not rounded."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _positive(x: Tensor) -> Tensor:
    """A number for each sample."""
    return _wide(x).square().flatten(1).sum(1)


DISTRIBUTION = "vae.DiagonalGaussianDistribution"
VAE_CASES: list[Case] = [
    _vae(
        f"{DISTRIBUTION}.sample",
        lambda g: posterior(g).sample(noise=g["noise"]),
        "mean logvar noise",
        "mean logvar",
    ),
    _vae(
        f"{DISTRIBUTION}.sample",
        lambda g: posterior(g).sample(noise=KEY),
        "mean logvar",
        suffix=", key",
    ),
    _vae(
        f"{DISTRIBUTION}.sample_kl",
        lambda g: posterior(g).sample_kl(),
        "mean logvar",
        suffix=", default noise",
    ),
    _vae(f"{DISTRIBUTION}.mode", lambda g: posterior(g).mode(), "mean logvar"),
    _vae(f"{DISTRIBUTION}.kl", lambda g: posterior(g).kl(), "mean logvar"),
    _vae(f"{DISTRIBUTION}.kl", lambda g: posterior(g).kl(prior(g)), "mean logvar z",
         suffix=", of two"),
    _vae(f"{DISTRIBUTION}.nll", lambda g: posterior(g).nll(g["z"]), "mean logvar z"),
    _vae(
        "vae.reconstruction_loss",
        lambda g: vae.reconstruction_loss(g["x"], g["x_recon"], decoder_std=0.7),
        "x x_recon",
    ),
    _vae(
        "vae.vae_loss",
        lambda g: vae_loss(g["x"], g["x_recon"], _positive(g["kl"])),
        "x x_recon kl",
    ),
    _vae(
        "vae.elbo",
        lambda g: elbo(g["x"], g["x_recon"], g["mean"], g["logvar"]),
        "x x_recon mean logvar",
    ),
    _vae(
        "vae.elbo_terms",
        lambda g: elbo_terms(g["x"], g["x_recon"], _positive(g["kl"])),
        "x x_recon kl",
    ),
    _vae(
        "vae.importance_weighted_bound",
        lambda g: importance_weighted_bound(
            g["x"], g["x_recon"][None].repeat(2, *[1] * g["x"].ndim),
            torch.stack([g["z"], -g["z"]]), g["mean"], g["logvar"],
        ),
        "x x_recon z mean logvar",
    ),
    _vae(
        "vae.elbo_terms",
        lambda g: elbo_terms(g["x"], g["x_recon"], _positive(g["kl"]), decoder="laplace"),
        "x x_recon kl",
        suffix=", laplace",
    ),
    _vae(
        "vae.elbo_terms",
        lambda g: elbo_terms(_wide(g["x"]).sigmoid(), g["x_recon"], _positive(g["kl"]),
                             decoder="bernoulli"),
        "x x_recon kl",
        suffix=", bernoulli",
    ),
    _vae(
        "vae.latent_bound",
        lambda g: vae.latent_bound(g["x"], g["x_recon"], posterior(g), -_positive(g["kl"])),
        "x x_recon mean logvar kl",
    ),
    _vae("vae.free_bits", lambda g: vae.free_bits(g["kl"].abs(), 0.3), "kl"),
    _vae("vae.capacity_loss", lambda g: vae.capacity_loss(_positive(g["kl"]), 2.5, beta=3.0), "kl"),
    _vae(
        "vae.balanced_kl",
        lambda g: vae.balanced_kl(g["mean"], g["logvar"], g["z"], g["logvar"], free_nats=0.5),
        "mean logvar z",
    ),
    Case(
        "min_snr_weights",
        "losses.min_snr_weights",
        "vae",
        lambda _, g: losses.min_snr_weights(g["snr"]),
        (),
        others=TABLE_OF_SNR,
    ),
    Case(
        "edm_weights",
        "losses.edm_weights",
        "vae",
        lambda _, g: losses.edm_weights(g["snr"], prediction_type="v_prediction"),
        (),
        others=TABLE_OF_SNR,
    ),
]  # fmt: skip
