"""The variational bound of a data set in bits per dimension, in discrete and continuous time."""

from diffcore.likelihood.bits_per_dim import bits_per_dim
from diffcore.likelihood.results import BitsPerDim
from diffcore.likelihood.vdm import VDMBound, vdm_bound

__all__ = ["BitsPerDim", "VDMBound", "bits_per_dim", "vdm_bound"]
