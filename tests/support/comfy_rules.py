"""Samplers under ComfyUI's names as loops over noise levels, in float64: no tables.

``D(x, r)`` is the denoiser at sigma / alpha = r, ``z`` hands out standard normals one after
another, and a level is (alpha, sigma).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
Draw = Callable[[], Tensor]
Levels = Sequence[tuple[float, float]]


def ratio(level: tuple[float, float]) -> float:
    alpha, sigma = level
    return sigma / alpha if alpha else math.inf


def gradient_estimation(
    D: Denoiser, x: Tensor, levels: Levels, z: Draw, gamma: float = 2.0
) -> Tensor:
    """In sigma where alpha = 1 or alpha + sigma = 1: dx / dsigma is (x - x0) / sigma in both."""
    last = None
    for (alpha, sigma), (_, after) in pairwise(levels):
        clean = D(x, ratio((alpha, sigma)))
        slope = (x - clean) / sigma
        if after == 0:
            return clean
        mixed = slope if last is None else gamma * slope + (1 - gamma) * last
        x, last = x + (after - sigma) * mixed, slope
    return x


def up_and_down(level: tuple[float, float], after: tuple[float, float], eta: float):
    """What an ancestral step adds and keeps of sigma', by the posterior of the forward process."""
    beta_tilde = after[1] ** 2 * (1 - (ratio(after) / ratio(level)) ** 2)
    up = min(eta * math.sqrt(beta_tilde), after[1])
    return up, math.sqrt(max(after[1] ** 2 - up**2, 0))


def res_multistep(
    D: Denoiser, x: Tensor, levels: Levels, z: Draw, eta: float = 0.0, s_noise: float = 1.0
) -> Tensor:
    """In time -log(sigma / alpha) of x / alpha."""
    last = None  # x0, its time, and the time that its step went down to
    for level, after in pairwise(levels):
        clean = D(x, ratio(level))
        up, down = up_and_down(level, after, eta)
        if down == 0 or last is None:
            x = after[0] * clean + down / level[1] * (x - level[0] * clean)
        else:
            time, end = -math.log(ratio(level)), -math.log(down / after[0])
            h = end - time
            node = (last[1] - last[2]) / h
            phi_1 = -math.expm1(-h) / h
            phi_2 = (phi_1 - 1) / -h
            mixed = (phi_1 - phi_2 / node) * clean + phi_2 / node * last[0]
            x = after[0] * (math.exp(-h) * x / level[0] + h * mixed)
        last = clean, -math.log(ratio(level)), -math.log(down / after[0]) if down else math.inf
        if after[1] > 0 and up > 0:
            x = x + s_noise * up * z()
    return x


def er_sde(
    D: Denoiser,
    x: Tensor,
    levels: Levels,
    z: Draw,
    order: int = 3,
    s_noise: float = 1.0,
    noise_scaler: Callable[[float], float] | None = None,
    num_integration_points: int = 200,
) -> Tensor:
    scale = noise_scaler or (lambda u: u * (math.exp(u**0.3) + 10))
    known: list[tuple[float, Tensor]] = []
    last_difference = None
    for level, after in pairwise(levels):
        here, end = ratio(level), ratio(after)
        known = [(here, D(x, here)), *known][:3]
        clean = known[0][1]
        if end == 0:
            return clean
        decay = scale(end) / scale(here)
        y = decay * x / level[0] + (1 - decay) * clean
        stage = min(order, len(known), 3)
        if stage > 1:
            width = (here - end) / num_integration_points
            places = end + width * torch.arange(num_integration_points, dtype=torch.float64)
            values = torch.tensor([scale(float(u)) for u in places], dtype=torch.float64)
            area = float((1 / values).sum()) * width
            difference = (clean - known[1][1]) / (here - known[1][0])
            y = y + (end - here + area * scale(end)) * difference
            if stage > 2:
                second = 2 * (difference - last_difference) / (here - known[2][0])
                moment = float(((places - here) / values).sum()) * width
                y = y + ((end - here) ** 2 / 2 + moment * scale(end)) * second
            last_difference = difference
        left = end**2 - (here * decay) ** 2
        if left > 1e-12 * end**2:
            y = y + s_noise * math.sqrt(left) * z()
        x = after[0] * y
    return x


def _phi_2(h: float) -> float:
    """-h phi_2(-h) with a sign: (exp(-h) - 1 + h) / h, as a weight of x0."""
    return (math.expm1(-h) + h) / h


def seeds_2(
    D: Denoiser,
    x: Tensor,
    levels: Levels,
    z: Draw,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    solver_type: str = "phi_1",
) -> Tensor:
    """From x of the step's begin in both stages, with the noise of the first one decayed."""
    for level, after in pairwise(levels):
        here, end = ratio(level), ratio(after)
        clean = D(x, here)
        if end == 0:
            return clean
        h = math.log(here / end)
        middle = here * math.exp(-r * h)
        y = x / level[0]
        noise = math.sqrt(-math.expm1(-2 * r * h * eta)) * z() if eta else torch.zeros_like(x)
        inner = math.exp(-r * h * (1 + eta)) * y - math.expm1(-r * h * (1 + eta)) * clean
        inner = inner + middle * s_noise * noise
        size = middle_alpha(level, middle)
        late = D(size * inner, middle)
        big = h * (1 + eta)
        if solver_type == "phi_1":
            mixed = -math.expm1(-big) * ((1 - 0.5 / r) * clean + 0.5 / r * late)
        else:
            mixed = (-math.expm1(-big) - _phi_2(big) / r) * clean + _phi_2(big) / r * late
        if eta:
            noise = math.exp(-(1 - r) * h * eta) * noise
            if r < 1:
                noise = noise + math.sqrt(-math.expm1(-2 * (1 - r) * h * eta)) * z()
        x = after[0] * (math.exp(-big) * y + mixed + end * s_noise * noise)
    return x


def seeds_3(
    D: Denoiser,
    x: Tensor,
    levels: Levels,
    z: Draw,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> Tensor:
    for level, after in pairwise(levels):
        here, end = ratio(level), ratio(after)
        clean = D(x, here)
        if end == 0:
            return clean
        h = math.log(here / end)
        big = h * (1 + eta)
        one, two = here * math.exp(-r_1 * h), here * math.exp(-r_2 * h)
        y = x / level[0]
        noise = torch.zeros_like(x)
        if eta:
            noise = math.sqrt(-math.expm1(-2 * r_1 * h * eta)) * z()
        inner = math.exp(-r_1 * big) * y - math.expm1(-r_1 * big) * clean + one * s_noise * noise
        second = D(middle_alpha(level, one) * inner, one)
        weight = r_2 / r_1 * _phi_2(r_2 * big)
        if eta:
            noise = math.exp(-(r_2 - r_1) * h * eta) * noise
            noise = noise + math.sqrt(-math.expm1(-2 * (r_2 - r_1) * h * eta)) * z()
        inner = math.exp(-r_2 * big) * y + (-math.expm1(-r_2 * big) - weight) * clean
        inner = inner + weight * second + two * s_noise * noise
        third = D(middle_alpha(level, two) * inner, two)
        weight = _phi_2(big) / r_2
        if eta:
            noise = math.exp(-(1 - r_2) * h * eta) * noise
            noise = noise + math.sqrt(-math.expm1(-2 * (1 - r_2) * h * eta)) * z()
        y = math.exp(-big) * y + (-math.expm1(-big) - weight) * clean + weight * third
        x = after[0] * (y + end * s_noise * noise)
    return x


def middle_alpha(level: tuple[float, float], r: float) -> float:
    """Alpha at sigma / alpha = r on the path that a level lies on."""
    if level[0] == 1:
        return 1.0
    return 1 / (1 + r) if abs(sum(level) - 1) < 1e-12 else 1 / math.hypot(1, r)


# ---- rectified flows: levels are sigmas ----------------------------------------------------------


def _down(sigma: float, after: float, eta: float) -> tuple[float, float, float]:
    """sigma_down, the scale after it, and the noise that leads from there to sigma'."""
    down = after * (1 + (after / sigma - 1) * eta)
    scale = (1 - after) / (1 - down)
    return down, scale, math.sqrt(after**2 - (down * scale) ** 2)


def euler_ancestral_rf(
    D: Denoiser, x: Tensor, levels: Levels, z: Draw, eta: float = 1.0, s_noise: float = 1.0
) -> Tensor:
    for (alpha, sigma), (_, after) in pairwise(levels):
        clean = D(x, ratio((alpha, sigma)))
        if after == 0:
            return clean
        down, scale, renoise = _down(sigma, after, eta)
        x = clean + down / sigma * (x - clean)
        if eta > 0:
            x = scale * x + s_noise * renoise * z()
    return x


def dpmpp_2s_ancestral_rf(
    D: Denoiser, x: Tensor, levels: Levels, z: Draw, eta: float = 1.0, s_noise: float = 1.0
) -> Tensor:
    for (alpha, sigma), (_, after) in pairwise(levels):
        clean = D(x, ratio((alpha, sigma)))
        if after == 0:
            return clean
        down, scale, renoise = _down(sigma, after, eta)
        middle = 0.9999
        if sigma < 1:
            odds = math.sqrt(sigma / (1 - sigma) * down / (1 - down))
            middle = odds / (1 + odds)
        inner = clean + middle / sigma * (x - clean)
        late = D(inner, middle / (1 - middle))
        x = late + down / sigma * (x - late)
        if eta > 0:
            x = scale * x + s_noise * renoise * z()
    return x
