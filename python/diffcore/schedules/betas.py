"""Beta schedules: the variances of the Markov steps, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffcore._checks import as_int, as_real, check_choice
from diffcore.schedules.tensors import float64_vector

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")

# The schedules are functions of t / T up to this factor: linear betas are quoted for 1000 steps.
_REFERENCE_STEPS = 1000
_COSINE_OFFSET = 0.008
_MAX_BETA = 0.999
_SHORT = 10
_COSINE_FIX = "OpenAI's 'cosine' is 'squaredcos_cap_v2'"


def make_betas(
    name: str,
    num_timesteps: int,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    scale_to_1000: bool = False,
) -> Tensor:
    """The variances beta_t of the T Markov steps, by name.

    linear: from beta_start to beta_end. scaled_linear: the square root is linear. sigmoid: along
    the logistic function from -6 to 6. squaredcos_cap_v2: from alpha_bar(t) = cos^2((t / T + 0.008)
    / 1.008 * pi / 2), capped at 0.999; it reads neither beta_start nor beta_end.

    Args:
        name: One of ``BETA_SCHEDULES`` (the strings of diffusers).
        num_timesteps: T.
        beta_start: First beta, quoted for 1000 steps if ``scale_to_1000``.
        beta_end: Last beta, quoted for 1000 steps if ``scale_to_1000``.
        scale_to_1000: Multiply the betas by 1000 / T, so that a shorter schedule removes as much
            signal as 1000 steps do (OpenAI's "linear"; diffusers never scales).

    Returns:
        float64 ``[T]``.

    Raises:
        TypeError: ``num_timesteps`` is not an int.
        ValueError: Unknown name, T < 1, betas outside (0, 1], or ``scale_to_1000`` with
            "squaredcos_cap_v2", which is a function of t / T already.

    Source:
        Ho et al. 2020 (arXiv 2006.11239) linear; Nichol and Dhariwal 2021 (arXiv 2102.09672) cosine
        and scaling; Rombach et al. 2022 (arXiv 2112.10752) scaled_linear; GeoDiff (arXiv
        2203.02923) sigmoid.
    """
    check_choice(
        "name",
        name,
        BETA_SCHEDULES,
        _COSINE_FIX if isinstance(name, str) and name == "cosine" else "",
    )
    num_timesteps = as_int("num_timesteps", num_timesteps, 1)
    beta_start, beta_end = as_real("beta_start", beta_start), as_real("beta_end", beta_end)
    if name == "squaredcos_cap_v2":
        if scale_to_1000:
            raise ValueError(
                "scale_to_1000 must be False with 'squaredcos_cap_v2', already a function of t / T,"
                " got True"
            )
        return _squared_cosine(num_timesteps)
    if not 0 < beta_start <= beta_end:
        raise ValueError(
            f"beta_start must be above 0 and at most beta_end, got {beta_start} and {beta_end}"
        )
    if name == "linear":
        betas = _linspace(beta_start, beta_end, num_timesteps)
    elif name == "scaled_linear":
        betas = _linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps) ** 2
    else:
        rise = torch.sigmoid(_linspace(-6.0, 6.0, num_timesteps))
        betas = beta_start + (beta_end - beta_start) * rise
    if scale_to_1000:
        betas = betas * (_REFERENCE_STEPS / num_timesteps)
    if betas.max() > 1:
        raise ValueError(
            f"betas must be at most 1, got {betas.max():.4g} with beta_end={beta_end}, "
            f"scale_to_1000={scale_to_1000}; use more than {num_timesteps} timesteps or a smaller "
            "beta_end"
        )
    return betas


def betas_for_alpha_bar(
    alpha_bar: Callable[[float], float], num_timesteps: int, *, max_beta: float = _MAX_BETA
) -> Tensor:
    """Betas of a schedule given as a function: beta_i = min(1 - f((i+1) / T) / f(i / T), max_beta).

    Args:
        alpha_bar: f, the share of the signal variance that remains at t / T in [0, 1].
        num_timesteps: T.
        max_beta: Cap, below 1 so that the last step keeps some signal.

    Returns:
        float64 ``[T]``.

    Source:
        Nichol and Dhariwal 2021 (arXiv 2102.09672) section 3.2.
    """
    num_timesteps = as_int("num_timesteps", num_timesteps, 1)
    max_beta = as_real("max_beta", max_beta)
    values = [float(alpha_bar(i / num_timesteps)) for i in range(num_timesteps + 1)]
    betas = [min(1 - b / a, max_beta) for a, b in pairwise(values)]
    return torch.tensor(betas, dtype=torch.float64, device="cpu")


def betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """The betas with the given product: beta_t = 1 - alphas_cumprod_t / alphas_cumprod_{t-1}.

    Args:
        alphas_cumprod: ``[T]``, decreasing, in [0, 1].

    Returns:
        float64 ``[T]``.

    Raises:
        ValueError: Not one-dimensional, not decreasing, or outside [0, 1].
    """
    bar = float64_vector("alphas_cumprod", alphas_cumprod)
    previous = torch.cat([torch.ones_like(bar[:1]), bar[:-1]])
    wrong = (bar < 0) | (bar >= previous)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(
            "alphas_cumprod must fall strictly, from below 1 to 0 or above, got "
            f"{bar[first]:.6g} after {previous[first]:.6g}"
        )
    return (previous - bar) / previous


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that it ends at 0 and keeps its first value.

    Args:
        betas: ``[T]``, T >= 2.

    Returns:
        float64 ``[T]``, the last one exactly 1. Epsilon prediction is undefined with it.

    Raises:
        ValueError: Fewer than two betas, or a beta outside (0, 1].

    Source:
        Lin et al. 2023 (arXiv 2305.08891) algorithm 1.
    """
    betas = check_betas(betas)
    if len(betas) < 2:
        raise ValueError("betas must hold at least two steps, got 1")
    root = torch.exp(0.5 * torch.log1p(-betas).cumsum(0))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return betas_from_alphas_cumprod(root**2)


def check_betas(betas: Tensor) -> Tensor:
    """Betas as float64 on the CPU, checked.

    Args:
        betas: ``[T]``, T >= 1.

    Returns:
        float64 ``[T]``.

    Raises:
        TypeError: Not a tensor, list, tuple or array of real numbers.
        ValueError: Not one-dimensional, empty, outside (0, 1], or 1 before the last step.
    """
    betas = float64_vector("betas", betas, fix=_made_of(betas))
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(
            f"betas must lie in (0, 1], got values from {betas.min():.4g} to {betas.max():.4g}"
        )
    if bool((betas[:-1] == 1).any()):
        raise ValueError(
            "betas must be below 1 before the last, because a beta of 1 leaves no signal, got 1 at "
            f"index {int((betas == 1).long().argmax())} of {len(betas)}"
        )
    return betas


def _made_of(betas: object) -> str:
    """How to make betas of what somebody passed instead."""
    if isinstance(betas, str):
        return f"make_betas({betas!r}, 1000)"
    if isinstance(getattr(betas, "alpha", None), Tensor):  # a NoiseSchedule
        return (
            "of a variance preserving schedule pass betas_from_alphas_cumprod(schedule.alpha**2); "
            "for others use ops.q_sample(x0, t, noise, schedule.table) and ops.denoising_loss"
        )
    return ""


def check_direction(betas: Tensor) -> None:
    """Refuse betas that fall at every step: alphas_cumprod, or a schedule in reverse.

    Args:
        betas: Checked betas ``[T]``.

    Raises:
        ValueError: They do, and are too many to be a short schedule of the user's own.
    """
    if len(betas) < _SHORT or not bool((betas[1:] < betas[:-1]).all()):
        return
    fix = (
        "these look like alphas_cumprod: pass betas_from_alphas_cumprod(alphas_cumprod)"
        if betas[0] > 0.5
        else "index 0 is the first step away from the data: pass betas.flip(0)"
    )
    raise ValueError(
        f"betas must not fall at every step, got values from {betas[0]:.4g} down to "
        f"{betas[-1]:.4g}; {fix}"
    )


def _linspace(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")


def _squared_cosine(count: int) -> Tensor:
    # 1 - cos^2(b) / cos^2(a) = sin(b - a) sin(b + a) / cos^2(a): unlike 1 minus a quotient, this
    # keeps all digits of the small betas at the start.
    quarter = math.pi / 2 / (1 + _COSINE_OFFSET)
    time = torch.arange(count + 1, dtype=torch.float64, device="cpu") / count + _COSINE_OFFSET
    angle = time * quarter
    first, second = angle[:-1], angle[1:]
    betas = math.sin(quarter / count) * torch.sin(first + second) / torch.cos(first) ** 2
    return betas.clamp(max=_MAX_BETA)
