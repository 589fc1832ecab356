"""KL divergences and likelihoods of diagonal Gaussians, and reparameterization. Nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffcore.reference.common import compute_dtype, elementwise, row_sum

__all__ = [
    "expm1_minus",
    "gaussian_nll",
    "normal_kl",
    "reparameterize",
    "reparameterize_kl",
    "standard_normal_kl",
]


def expm1_minus(d: Tensor) -> Tensor:
    """``expm1(d) - d`` without cancellation: its Taylor series where ``|d| < 1``."""
    terms = 17 if d.dtype == torch.float64 else 9
    near = torch.where(d.abs() < 1, d, torch.zeros_like(d))
    series = torch.full_like(d, 1 / math.factorial(terms + 2))
    for k in range(terms - 1, -1, -1):
        series = series * near + 1 / math.factorial(k + 2)
    far = torch.expm1(d) - torch.where(d == math.inf, torch.zeros_like(d), d)  # not inf - inf
    return torch.where(d.abs() < 1, near * near * series, far)


def square_times_exp(square: Tensor, x: Tensor) -> Tensor:
    """``square exp(x)``; 0 where ``square`` is 0 and ``exp(x)`` overflows."""
    nothing = (square == 0) & torch.isinf(torch.exp(x))
    return square * torch.exp(torch.where(nothing, torch.zeros_like(x), x))


def normal_kl_term(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL of two Gaussians, each element's."""
    square = (mean1 - mean2) ** 2
    return 0.5 * (expm1_minus(logvar1 - logvar2) + square_times_exp(square, -logvar2))


def standard_normal_kl_term(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL to the standard normal, each element's."""
    return 0.5 * (mean**2 + expm1_minus(logvar))


def gaussian_nll_term(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Negative log-density, each element's."""
    return 0.5 * (math.log(2 * math.pi) + logvar + square_times_exp((x - mean) ** 2, -logvar))


def reduced(formula: Callable[..., Tensor], inputs: Sequence[Tensor], reduction: str) -> Tensor:
    """The terms of a formula, reduced as an op reduces them."""
    if reduction == "none":
        return elementwise(formula, inputs)
    compute = compute_dtype(inputs[0].dtype)
    terms = formula(*(x.to(compute) for x in inputs))
    batch = terms.shape[0] if terms.ndim else 1
    scales = {"sample": 1.0, "sum": 1.0}
    if terms.numel():
        scales |= {"batchmean": 1.0 / batch, "mean": 1.0 / terms.numel()}
    return row_sum(terms, scales.get(reduction, math.nan), reduce_all=reduction != "sample")


def normal_kl(
    mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor, *, reduction: str = "none"
) -> Tensor:
    """KL of two diagonal Gaussians, nats."""
    return reduced(normal_kl_term, (mean1, logvar1, mean2, logvar2), reduction)


def standard_normal_kl(mean: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """KL to the standard normal, nats."""
    return reduced(standard_normal_kl_term, (mean, logvar), reduction)


def gaussian_nll(x: Tensor, mean: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """Negative log-density of a diagonal Gaussian, nats."""
    return reduced(gaussian_nll_term, (x, mean, logvar), reduction)


def reparameterize(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """``z = mean + exp(logvar / 2) noise``."""
    return elementwise(lambda m, lv, e: m + torch.exp(0.5 * lv) * e, (mean, logvar, noise))


def reparameterize_kl(mean: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``z`` and the KL of each sample to the standard normal, ``[B]``, nats."""
    z = reparameterize(mean, logvar, noise)
    return z, standard_normal_kl(mean, logvar, reduction="sample")
