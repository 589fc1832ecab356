"""Fused diffusion and VAE mathematics for PyTorch, on CPU and CUDA.

The functional ops are in :mod:`diffcore.ops`; :class:`GaussianDiffusion` and :mod:`diffcore.vae`
are the lecture's two models on top of them. :func:`sample` runs any table of
:mod:`diffcore.solvers`; :mod:`diffcore.sampling` has k-diffusion's samplers under their own names.
:mod:`diffcore.likelihood` has the variational bound of a data set, in bits per dimension.
"""

import typing as _typing

from diffcore import guidance as guidance
from diffcore import likelihood as likelihood
from diffcore import losses as losses
from diffcore import ops as ops
from diffcore import sampling as sampling
from diffcore import sigmas as sigmas
from diffcore import solvers as solvers
from diffcore._engine.compiled_ops import set_compiled_ops as set_compiled_ops
from diffcore._engine.native import info as info
from diffcore._engine.native import warm_up as warm_up
from diffcore.coefficients.bound import VARIANCE_TYPES as VARIANCE_TYPES
from diffcore.coefficients.step import PREDICTION_TYPES as PREDICTION_TYPES
from diffcore.diffusion import (
    ContinuousTimeGaussianDiffusion as ContinuousTimeGaussianDiffusion,
)
from diffcore.diffusion import GaussianDiffusion as GaussianDiffusion
from diffcore.edm import EDM as EDM
from diffcore.flows import FlowMatching as FlowMatching
from diffcore.likelihood import BitsPerDim as BitsPerDim
from diffcore.likelihood import bits_per_dim as bits_per_dim
from diffcore.noise import PhiloxNoise as PhiloxNoise

# Family by family: type checkers do not follow an __all__ that is put together.
from diffcore.ops._noise import *
from diffcore.ops.bound import *
from diffcore.ops.gaussian import *
from diffcore.ops.likelihood import *
from diffcore.ops.linear import *
from diffcore.ops.loss import *
from diffcore.ops.mask import *
from diffcore.ops.named_steps import *
from diffcore.ops.step import *
from diffcore.ops.threshold import *
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

__all__ = [
    "EDM",
    "VARIANCE_TYPES",
    "BitsPerDim",
    "ContinuousTimeGaussianDiffusion",
    "DiagonalGaussianDistribution",
    "FlowMatching",
    "GaussianDiffusion",
    "NoiseLevels",
    "NoiseSchedule",
    "SolverTable",
    "betas_for_alpha_bar",
    "betas_from_alphas_cumprod",
    "bits_per_dim",
    "elbo",
    "elbo_terms",
    "guidance",
    "importance_weighted_bound",
    "info",
    "likelihood",
    "losses",
    "make_betas",
    "ops",
    "rescale_zero_terminal_snr",
    "respaced_timesteps",
    "sample",
    "sampling",
    "set_compiled_ops",
    "sigmas",
    "solvers",
    "vae_loss",
    "warm_up",
]
__all__ += ops.__all__

__version__: str

if not _typing.TYPE_CHECKING:

    def __getattr__(name: str) -> str:
        """``__version__``, read when used, so that an import stays fast."""
        if name == "__version__":
            from diffcore._engine.info import version

            return version()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
