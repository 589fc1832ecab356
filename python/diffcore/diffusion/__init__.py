"""The diffusion model of the lecture: forward process, posterior, training, sampling, bound."""

from diffcore.diffusion.gaussian import GaussianDiffusion

__all__ = ["GaussianDiffusion"]
