"""The VAE of the lecture: posterior, decoders, losses, regularizers, and bounds."""

from diffcore.vae.annealing import cyclical_annealing, linear_annealing
from diffcore.vae.bounds import (
    elbo,
    elbo_terms,
    importance_weighted_bound,
    latent_bound,
    vae_loss,
)
from diffcore.vae.decoders import reconstruction_loss
from diffcore.vae.distribution import DiagonalGaussianDistribution
from diffcore.vae.full_covariance import full_covariance_kl
from diffcore.vae.regularizers import balanced_kl, capacity_loss, free_bits
from diffcore.vae.report import LatentReport, latent_report

__all__ = [
    "DiagonalGaussianDistribution",
    "LatentReport",
    "balanced_kl",
    "capacity_loss",
    "cyclical_annealing",
    "elbo",
    "elbo_terms",
    "free_bits",
    "full_covariance_kl",
    "importance_weighted_bound",
    "latent_bound",
    "latent_report",
    "linear_annealing",
    "reconstruction_loss",
    "vae_loss",
]
