"""Log-likelihoods: the variational bound of a data set, and the probability flow."""

from diffcore.likelihood.bits_per_dim import bits_per_dim
from diffcore.likelihood.ode import ODELogLikelihood, ode_log_likelihood
from diffcore.likelihood.results import BitsPerDim
from diffcore.likelihood.vdm import VDMBound, vdm_bound

__all__ = [
    "BitsPerDim",
    "ODELogLikelihood",
    "VDMBound",
    "bits_per_dim",
    "ode_log_likelihood",
    "vdm_bound",
]
