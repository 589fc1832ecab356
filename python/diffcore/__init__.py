"""Fused diffusion and VAE mathematics for PyTorch, on CPU and CUDA.

The functional ops are in :mod:`diffcore.ops`; :class:`GaussianDiffusion` and :mod:`diffcore.vae`
are the lecture's two models on top of them. :func:`sample` walks any table of
:mod:`diffcore.solvers`; :mod:`diffcore.sampling` has k-diffusion's samplers under their own names.
:mod:`diffcore.likelihood` has the variational bound of a data set, in bits a dimension.
"""

from typing import TYPE_CHECKING

from . import likelihood as likelihood
from . import losses as losses
from . import sampling as sampling
from . import sigmas as sigmas
from . import solvers as solvers
from ._native import info as info
from ._native import warm_up as warm_up
from .bound_coefficients import VARIANCE_TYPES as VARIANCE_TYPES
from .coefficients import PREDICTION_TYPES as PREDICTION_TYPES
from .diffusion import GaussianDiffusion as GaussianDiffusion
from .likelihood import BitsPerDim as BitsPerDim
from .likelihood import bits_per_dim as bits_per_dim
from .noise import PhiloxNoise as PhiloxNoise
from .ops import add_noise as add_noise
from .ops import ddim_step as ddim_step
from .ops import ddpm_step as ddpm_step
from .ops import denoising_loss as denoising_loss
from .ops import discretized_gaussian_log_likelihood as discretized_gaussian_log_likelihood
from .ops import dynamic_threshold as dynamic_threshold
from .ops import gaussian_nll as gaussian_nll
from .ops import linear_combination as linear_combination
from .ops import normal_kl as normal_kl
from .ops import predict_epsilon as predict_epsilon
from .ops import predict_x0 as predict_x0
from .ops import prior_kl as prior_kl
from .ops import q_sample as q_sample
from .ops import randn as randn
from .ops import reparameterize as reparameterize
from .ops import reparameterize_kl as reparameterize_kl
from .ops import reverse_step as reverse_step
from .ops import standard_normal_kl as standard_normal_kl
from .ops import step_log_prob as step_log_prob
from .ops import velocity as velocity
from .ops import vlb_term as vlb_term
from .sampling import sample as sample
from .schedules import NoiseSchedule as NoiseSchedule
from .schedules import betas_for_alpha_bar as betas_for_alpha_bar
from .schedules import betas_from_alphas_cumprod as betas_from_alphas_cumprod
from .schedules import make_betas as make_betas
from .schedules import rescale_zero_terminal_snr as rescale_zero_terminal_snr
from .schedules import respaced_timesteps as respaced_timesteps
from .solvers import NoiseLevels as NoiseLevels
from .solvers import SolverTable as SolverTable
from .vae import DiagonalGaussianDistribution as DiagonalGaussianDistribution
from .vae import elbo as elbo
from .vae import elbo_terms as elbo_terms
from .vae import importance_weighted_bound as importance_weighted_bound
from .vae import vae_loss as vae_loss

__version__: str

if not TYPE_CHECKING:

    def __getattr__(name: str) -> str:
        """``__version__``, which takes a look-up that an import does not pay for."""
        if name == "__version__":
            from diffcore._info import version

            return version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
