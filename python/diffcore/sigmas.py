"""Noise levels: the ``get_sigmas_*`` functions of :mod:`diffcore.schedules`."""

from diffcore.schedules import (
    get_sigmas_beta,
    get_sigmas_exponential,
    get_sigmas_flow,
    get_sigmas_karras,
    get_sigmas_lu,
    get_sigmas_polyexponential,
    get_sigmas_vp,
)

__all__ = [
    "get_sigmas_beta",
    "get_sigmas_exponential",
    "get_sigmas_flow",
    "get_sigmas_karras",
    "get_sigmas_lu",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
]
