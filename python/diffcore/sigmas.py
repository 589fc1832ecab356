"""Noise levels: the ``get_sigmas_*`` functions of :mod:`diffcore.schedules`."""

from diffcore.schedules import (
    AYS_SIGMAS,
    get_sigmas_ays,
    get_sigmas_beta,
    get_sigmas_ddim_uniform,
    get_sigmas_exponential,
    get_sigmas_flow,
    get_sigmas_karras,
    get_sigmas_kl_optimal,
    get_sigmas_laplace,
    get_sigmas_linear_quadratic,
    get_sigmas_lu,
    get_sigmas_polyexponential,
    get_sigmas_sgm_uniform,
    get_sigmas_simple,
    get_sigmas_vp,
)

__all__ = [
    "AYS_SIGMAS",
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
]
