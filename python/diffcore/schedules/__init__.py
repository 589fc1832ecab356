"""Noise schedules in float64: betas, (alpha, sigma) tables, timesteps, sigmas and their shifts."""

from diffcore.schedules.betas import (
    BETA_SCHEDULES,
    betas_for_alpha_bar,
    betas_from_alphas_cumprod,
    check_betas,
    make_betas,
    rescale_zero_terminal_snr,
)
from diffcore.schedules.logsnr import (
    LOGSNR_SCHEDULES,
    beta_linear_logsnr,
    cosine_logsnr,
    linear_logsnr,
)
from diffcore.schedules.schedule import NoiseSchedule
from diffcore.schedules.shift import (
    TIME_SHIFT_TYPES,
    dynamic_shift_mu,
    shift_sigmas,
    stretch_to_terminal,
    time_shift,
)
from diffcore.schedules.sigmas import (
    AYS_SIGMAS,
    get_sigmas_ays,
    get_sigmas_beta,
    get_sigmas_exponential,
    get_sigmas_flow,
    get_sigmas_karras,
    get_sigmas_kl_optimal,
    get_sigmas_laplace,
    get_sigmas_linear_quadratic,
    get_sigmas_lu,
    get_sigmas_polyexponential,
    get_sigmas_vp,
)
from diffcore.schedules.timesteps import (
    TIMESTEP_SPACINGS,
    clipped_length,
    lcm_timesteps,
    respaced_timesteps,
    sigmas_to_timesteps,
    spaced_timesteps,
    timesteps_to_sigmas,
)
from diffcore.schedules.training_sigmas import (
    get_sigmas_ddim_uniform,
    get_sigmas_sgm_uniform,
    get_sigmas_simple,
)

__all__ = [
    "AYS_SIGMAS",
    "BETA_SCHEDULES",
    "LOGSNR_SCHEDULES",
    "TIMESTEP_SPACINGS",
    "TIME_SHIFT_TYPES",
    "NoiseSchedule",
    "beta_linear_logsnr",
    "betas_for_alpha_bar",
    "betas_from_alphas_cumprod",
    "check_betas",
    "clipped_length",
    "cosine_logsnr",
    "dynamic_shift_mu",
    "get_sigmas_ays",
    "get_sigmas_beta",
    "get_sigmas_ddim_uniform",
    "get_sigmas_exponential",
    "get_sigmas_flow",
    "get_sigmas_karras",
    "get_sigmas_kl_optimal",
    "get_sigmas_laplace",
    "get_sigmas_linear_quadratic",
    "get_sigmas_lu",
    "get_sigmas_polyexponential",
    "get_sigmas_sgm_uniform",
    "get_sigmas_simple",
    "get_sigmas_vp",
    "lcm_timesteps",
    "linear_logsnr",
    "make_betas",
    "rescale_zero_terminal_snr",
    "respaced_timesteps",
    "shift_sigmas",
    "sigmas_to_timesteps",
    "spaced_timesteps",
    "stretch_to_terminal",
    "time_shift",
    "timesteps_to_sigmas",
]
