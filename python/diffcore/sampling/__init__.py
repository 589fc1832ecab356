"""Sampling: one loop for every solver, and the samplers of k-diffusion under their own names."""

from diffcore.sampling.adaptive import sample_dpm_adaptive
from diffcore.sampling.brownian import BrownianNoise
from diffcore.sampling.capture import CapturedSampler, capture
from diffcore.sampling.comfy import (
    sample_er_sde,
    sample_gradient_estimation,
    sample_res_multistep,
    sample_res_multistep_ancestral,
    sample_seeds_2,
    sample_seeds_3,
)
from diffcore.sampling.k_diffusion import (
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_lms,
)
from diffcore.sampling.langevin import LangevinCorrector
from diffcore.sampling.sample import sample
from diffcore.sampling.scheduled import pyramid_schedule
from diffcore.sampling.trajectory import Trajectory

__all__ = [
    "BrownianNoise",
    "CapturedSampler",
    "LangevinCorrector",
    "Trajectory",
    "capture",
    "pyramid_schedule",
    "sample",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_er_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_gradient_estimation",
    "sample_heun",
    "sample_lms",
    "sample_res_multistep",
    "sample_res_multistep_ancestral",
    "sample_seeds_2",
    "sample_seeds_3",
]
