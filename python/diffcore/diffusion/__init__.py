"""Variance preserving diffusions: in T steps, as in the lecture, and in continuous time."""

from diffcore.diffusion.continuous import ContinuousTimeGaussianDiffusion
from diffcore.diffusion.gaussian import GaussianDiffusion

__all__ = ["ContinuousTimeGaussianDiffusion", "GaussianDiffusion"]
