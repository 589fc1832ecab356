"""Fused diffusion and VAE mathematics for PyTorch, on CPU and CUDA.

The functional ops are in :mod:`diffcore.ops`; :class:`GaussianDiffusion` and :mod:`diffcore.vae`
are the lecture's two models on top of them. :func:`sample` walks any table of
:mod:`diffcore.solvers`; :mod:`diffcore.sampling` has k-diffusion's samplers under their own names.
:mod:`diffcore.likelihood` has the variational bound of a data set, in bits a dimension.
"""

from typing import TYPE_CHECKING

from diffcore import likelihood as likelihood
from diffcore import losses as losses
from diffcore import sampling as sampling
from diffcore import sigmas as sigmas
from diffcore import solvers as solvers
from diffcore._engine.native import info as info
from diffcore._engine.native import warm_up as warm_up
from diffcore.coefficients.bound import VARIANCE_TYPES as VARIANCE_TYPES
from diffcore.coefficients.step import PREDICTION_TYPES as PREDICTION_TYPES
from diffcore.diffusion import GaussianDiffusion as GaussianDiffusion
from diffcore.likelihood import BitsPerDim as BitsPerDim
from diffcore.likelihood import bits_per_dim as bits_per_dim
from diffcore.noise import PhiloxNoise as PhiloxNoise
from diffcore.ops import add_noise as add_noise
from diffcore.ops import ddim_step as ddim_step
from diffcore.ops import ddpm_step as ddpm_step
from diffcore.ops import denoising_loss as denoising_loss
from diffcore.ops import discretized_gaussian_log_likelihood as discretized_gaussian_log_likelihood
from diffcore.ops import dynamic_threshold as dynamic_threshold
from diffcore.ops import gaussian_nll as gaussian_nll
from diffcore.ops import linear_combination as linear_combination
from diffcore.ops import normal_kl as normal_kl
from diffcore.ops import predict_epsilon as predict_epsilon
from diffcore.ops import predict_x0 as predict_x0
from diffcore.ops import prior_kl as prior_kl
from diffcore.ops import q_sample as q_sample
from diffcore.ops import randn as randn
from diffcore.ops import reparameterize as reparameterize
from diffcore.ops import reparameterize_kl as reparameterize_kl
from diffcore.ops import reverse_step as reverse_step
from diffcore.ops import standard_normal_kl as standard_normal_kl
from diffcore.ops import step_log_prob as step_log_prob
from diffcore.ops import velocity as velocity
from diffcore.ops import vlb_term as vlb_term
from diffcore.sampling import sample as sample
from diffcore.schedules import NoiseSchedule as NoiseSchedule
from diffcore.schedules import betas_for_alpha_bar as betas_for_alpha_bar
from diffcore.schedules import betas_from_alphas_cumprod as betas_from_alphas_cumprod
from diffcore.schedules import make_betas as make_betas
from diffcore.schedules import rescale_zero_terminal_snr as rescale_zero_terminal_snr
from diffcore.schedules import respaced_timesteps as respaced_timesteps
from diffcore.solvers import NoiseLevels as NoiseLevels
from diffcore.solvers import SolverTable as SolverTable
from diffcore.vae import DiagonalGaussianDistribution as DiagonalGaussianDistribution
from diffcore.vae import elbo as elbo
from diffcore.vae import elbo_terms as elbo_terms
from diffcore.vae import importance_weighted_bound as importance_weighted_bound
from diffcore.vae import vae_loss as vae_loss

__version__: str

if not TYPE_CHECKING:

    def __getattr__(name: str) -> str:
        """``__version__``, which takes a look-up that an import does not pay for."""
        if name == "__version__":
            from diffcore._engine.info import version

            return version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
