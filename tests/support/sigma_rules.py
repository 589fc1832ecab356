"""Samplers for alpha = 1 as their papers write them: loops over sigmas, no tables, float64.

``D`` is the denoiser D(x, sigma), ``z`` hands out standard normals, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from numpy.polynomial import Polynomial
from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
Draw = Callable[[], Tensor]


def up_and_down(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Ancestral step: how much noise to add, and how far down to go before it."""
    variance = sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2
    up = min(sigma_next, eta * math.sqrt(variance))
    return up, math.sqrt(sigma_next**2 - up**2)


def churned(
    x: Tensor, sigma: float, count: int, z: Draw, churn: tuple[float, float, float, float]
) -> tuple[Tensor, float]:
    """Karras et al., algorithm 2, lines 4 to 6."""
    s_churn, s_tmin, s_tmax, s_noise = churn
    noise = z()
    if not (s_churn > 0 and s_tmin <= sigma <= s_tmax):
        return x, sigma
    hat = sigma * (1 + min(s_churn / count, math.sqrt(2) - 1))
    return x + math.sqrt(hat**2 - sigma**2) * s_noise * noise, hat


def euler(D: Denoiser, x: Tensor, sigmas: list[float], z: Draw, churn=(0, 0, 0, 1)) -> Tensor:
    for sigma, after in pairwise(sigmas):
        x, hat = churned(x, sigma, len(sigmas) - 1, z, churn)
        slope = (x - D(x, hat)) / hat
        x = x + (after - hat) * slope
    return x


def heun(D: Denoiser, x: Tensor, sigmas: list[float], z: Draw, churn=(0, 0, 0, 1)) -> Tensor:
    for sigma, after in pairwise(sigmas):
        x, hat = churned(x, sigma, len(sigmas) - 1, z, churn)
        slope = (x - D(x, hat)) / hat
        end = x + (after - hat) * slope
        if after > 0:
            slope_end = (end - D(end, after)) / after
            end = x + (after - hat) * (slope + slope_end) / 2
        x = end
    return x


def dpm_2(D: Denoiser, x: Tensor, sigmas: list[float], z: Draw, churn=(0, 0, 0, 1)) -> Tensor:
    for sigma, after in pairwise(sigmas):
        x, hat = churned(x, sigma, len(sigmas) - 1, z, churn)
        slope = (x - D(x, hat)) / hat
        if after > 0:
            between = math.sqrt(hat * after)
            halfway = x + (between - hat) * slope
            slope = (halfway - D(halfway, between)) / between
        x = x + (after - hat) * slope
    return x


def lms(D: Denoiser, x: Tensor, sigmas: list[float], z: Draw, order: int = 4) -> Tensor:
    slopes: list[Tensor] = []
    for i, sigma in enumerate(sigmas[:-1]):
        slopes = [(x - D(x, sigma)) / sigma, *slopes][:order]
        nodes = [sigmas[i - k] for k in range(len(slopes))]
        for k, slope in enumerate(slopes):
            basis = Polynomial([1.0])
            for j, node in enumerate(nodes):
                if j != k:
                    basis = basis * Polynomial([-node, 1.0]) / (nodes[k] - node)
            area = basis.integ()
            x = x + float(area(sigmas[i + 1]) - area(sigma)) * slope
    return x


def euler_ancestral(
    D: Denoiser, x: Tensor, sigmas: list[float], z: Draw, eta: float = 1.0, s_noise: float = 1.0
) -> Tensor:
    for sigma, after in pairwise(sigmas):
        up, down = up_and_down(sigma, after, eta)
        x = x + (down - sigma) * (x - D(x, sigma)) / sigma
        if after > 0:
            x = x + up * s_noise * z()
    return x


def dpm_2_ancestral(
    D: Denoiser, x: Tensor, sigmas: list[float], z: Draw, eta: float = 1.0, s_noise: float = 1.0
) -> Tensor:
    for sigma, after in pairwise(sigmas):
        up, down = up_and_down(sigma, after, eta)
        slope = (x - D(x, sigma)) / sigma
        if down > 0:
            between = math.sqrt(sigma * down)
            halfway = x + (between - sigma) * slope
            slope = (halfway - D(halfway, between)) / between
        x = x + (down - sigma) * slope
        if after > 0:
            x = x + up * s_noise * z()
    return x


def dpmpp_2s_ancestral(
    D: Denoiser, x: Tensor, sigmas: list[float], z: Draw, eta: float = 1.0, s_noise: float = 1.0
) -> Tensor:
    for sigma, after in pairwise(sigmas):
        up, down = up_and_down(sigma, after, eta)
        clean = D(x, sigma)
        if down > 0:
            between = math.sqrt(sigma * down)
            halfway = clean + between / sigma * (x - clean)
            clean = D(halfway, between)
        x = clean + down / sigma * (x - clean)
        if after > 0:
            x = x + up * s_noise * z()
    return x


def dpmpp_sde(
    D: Denoiser,
    x: Tensor,
    sigmas: list[float],
    z: Draw,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Tensor:
    for sigma, after in pairwise(sigmas):
        clean = D(x, sigma)
        if after == 0:
            x = clean
            continue
        between = math.exp((1 - r) * math.log(sigma) + r * math.log(after))
        up, down = up_and_down(sigma, between, eta)
        halfway = clean + down / sigma * (x - clean) + up * s_noise * z()
        mixed = clean + (D(halfway, between) - clean) / (2 * r)
        up, down = up_and_down(sigma, after, eta)
        x = mixed + down / sigma * (x - mixed) + up * s_noise * z()
    return x


def dpmpp_multistep(
    D: Denoiser,
    x: Tensor,
    sigmas: list[float],
    z: Draw,
    order: int = 2,
    eta: float = 0.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
) -> Tensor:
    """2M, 2M SDE and 3M SDE: x0 expanded in lambda by differences of what is known."""
    known: list[tuple[float, Tensor]] = []  # (lambda, x0), the latest first
    for sigma, after in pairwise(sigmas):
        known = [(-math.log(sigma), D(x, sigma)), *known][:order]
        clean = known[0][1]
        if after == 0:
            x = clean
            continue
        h = -math.log(after) - known[0][0]
        big = h * (1 + eta)
        x = math.exp(-big) * x - math.expm1(-big) * clean
        if len(known) > 1:
            gap = (known[0][0] - known[1][0]) / h
            first = (clean - known[1][1]) / gap
            linear = 1 + math.expm1(-big) / big
            if len(known) > 2:
                gap_2 = (known[1][0] - known[2][0]) / h
                earlier = (known[1][1] - known[2][1]) / gap_2
                curve = (first - earlier) / (gap + gap_2)
                x = x + linear * (first + gap * curve) + (0.5 - linear / big) * curve
            elif solver_type == "heun":
                x = x + linear * first
            else:
                x = x - math.expm1(-big) / 2 * first
        if eta > 0:
            x = x + after * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise * z()
    return x
