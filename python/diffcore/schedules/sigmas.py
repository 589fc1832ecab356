"""Noise levels for samplers, under k-diffusion's names."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore._checks import as_int, as_positive, as_real
from diffcore.schedules.shift import shift_sigmas

Device = torch.device | str


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Device = "cpu"
) -> Tensor:
    """sigma_i^(1 / rho) linear from sigma_max to sigma_min, and a 0.

    Args:
        n: Number of levels, without the appended 0.
        sigma_min: Last level before the 0, above 0.
        sigma_max: First level.
        rho: How strongly levels crowd at the low end; 1 is linear, infinity geometric.
        device: Device of the result.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, not 0 < sigma_min <= sigma_max, or rho = 0.

    Source:
        Karras et al. 2022 (arXiv 2206.00364) eq. 5.
    """
    n, sigma_min, sigma_max = _range(n, sigma_min, sigma_max)
    rho = as_positive("rho", rho)
    if math.isinf(rho):
        return get_sigmas_exponential(n, sigma_min, sigma_max, device)
    # Over sigma_max, so that no power leaves the range: 1 + u ((sigma_min / sigma_max)^(1/rho) - 1)
    fall = math.expm1(math.log(sigma_min / sigma_max) / rho)
    sigmas = sigma_max * torch.exp(rho * torch.log1p(_ramp(n) * fall))
    return _with_ends(sigmas, sigma_min, sigma_max).to(device)


def get_sigmas_exponential(
    n: int, sigma_min: float, sigma_max: float, device: Device = "cpu"
) -> Tensor:
    """log(sigma) linear from sigma_max to sigma_min, and a 0.

    Args:
        n: Number of levels, without the appended 0.
        sigma_min: Last level before the 0, above 0.
        sigma_max: First level.
        device: Device of the result.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, or not 0 < sigma_min <= sigma_max.
    """
    return get_sigmas_polyexponential(n, sigma_min, sigma_max, 1.0, device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Device = "cpu"
) -> Tensor:
    """log(sigma) = log(sigma_min) + u^rho log(sigma_max / sigma_min), u from 1 to 0; and a 0.

    Args:
        n: Number of levels, without the appended 0.
        sigma_min: Last level before the 0, above 0.
        sigma_max: First level.
        rho: Power of the ramp.
        device: Device of the result.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, not 0 < sigma_min <= sigma_max, or rho = 0.
    """
    n, sigma_min, sigma_max = _range(n, sigma_min, sigma_max)
    rho = as_positive("rho", rho)
    height = math.log(sigma_max) - math.log(sigma_min)
    sigmas = torch.exp((1 - _ramp(n)) ** rho * height + math.log(sigma_min))
    return _with_ends(sigmas, sigma_min, sigma_max).to(device)


def get_sigmas_lu(n: int, sigma_min: float, sigma_max: float, device: Device = "cpu") -> Tensor:
    """Lambda = -log(sigma) uniform, the levels that DPM-Solver is analyzed for; and a 0.

    The numbers of ``get_sigmas_exponential``, under diffusers' name for them
    (``use_lu_lambdas``).

    Args:
        n: Number of levels, without the appended 0.
        sigma_min: Last level before the 0, above 0.
        sigma_max: First level.
        device: Device of the result.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, or not 0 < sigma_min <= sigma_max.

    Source:
        Lu et al. 2022 (arXiv 2206.00927) section 3.4.
    """
    return get_sigmas_exponential(n, sigma_min, sigma_max, device)


def get_sigmas_beta(
    n: int,
    sigma_min: float,
    sigma_max: float,
    alpha: float = 0.6,
    beta: float = 0.6,
    device: Device = "cpu",
) -> Tensor:
    """Quantiles of a beta distribution stretched over [sigma_min, sigma_max], and a 0.

    Args:
        n: Number of levels, without the appended 0.
        sigma_min: Last level before the 0, above 0.
        sigma_max: First level.
        alpha: First parameter of the distribution; below 1 crowds the low end.
        beta: Second parameter of the distribution; below 1 crowds the high end.
        device: Device of the result.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, not 0 < sigma_min <= sigma_max, alpha or beta not above 0.

    Source:
        Lee et al. 2024 (arXiv 2407.12173).
    """
    n, sigma_min, sigma_max = _range(n, sigma_min, sigma_max)
    alpha, beta = as_positive("alpha", alpha, finite=True), as_positive("beta", beta, finite=True)
    quantiles = [_beta_quantile(p, alpha, beta) for p in (1 - _ramp(n)).tolist()]
    sigmas = sigma_min + torch.tensor(quantiles, dtype=torch.float64, device="cpu") * (
        sigma_max - sigma_min
    )
    return _with_ends(sigmas, sigma_min, sigma_max).to(device)


def get_sigmas_vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    device: Device = "cpu",
) -> Tensor:
    """The continuous variance preserving process at n times from 1 to eps_s, and a 0.

    sigma = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1).

    Args:
        n: Number of levels, without the appended 0.
        beta_d: Slope of beta(t).
        beta_min: beta(0).
        eps_s: The last time.
        device: Device of the result.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, or eps_s outside (0, 1].

    Source:
        Song et al. 2021 (arXiv 2011.13456) appendix C, in the form of Karras et al. 2022.
    """
    n = as_int("n", n, 1)
    beta_d, beta_min = as_real("beta_d", beta_d), as_real("beta_min", beta_min)
    eps_s = as_real("eps_s", eps_s)
    if not 0 < eps_s <= 1:
        raise ValueError(f"eps_s must lie in (0, 1], got {eps_s}")
    time = 1 + _ramp(n) * (eps_s - 1)
    sigmas = torch.expm1(beta_d * time**2 / 2 + beta_min * time).sqrt()
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(device)


def get_sigmas_flow(n: int, *, shift: float = 1.0, sigma_min: float | None = None) -> Tensor:
    """Noise levels of a rectified flow from 1 down, shifted once, and a 0.

    Args:
        n: Number of levels, without the appended 0.
        shift: See ``shift_sigmas``; 1 for none.
        sigma_min: The last level before the shift; by default 1 / n, so that the unshifted steps,
            the one to 0 included, are equally long (Flux; diffusers' pipelines pass these).

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, shift not above 0, or sigma_min outside (0, 1].
    """
    n = as_int("n", n, 1)
    last = 1 / n if sigma_min is None else as_real("sigma_min", sigma_min)
    if not 0 < last <= 1:
        raise ValueError(f"sigma_min must lie in (0, 1], got {last}")
    sigmas = shift_sigmas(1 + _ramp(n) * (last - 1), shift)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _ramp(n: int) -> Tensor:
    """The n numbers from 0 to 1, evenly spaced."""
    return torch.arange(n, dtype=torch.float64, device="cpu") / max(n - 1, 1)


def _with_ends(sigmas: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Set both ends to the values asked for, free of rounding, and append the 0."""
    sigmas[-1] = sigma_min
    sigmas[0] = sigma_max
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _range(n: int, sigma_min: float, sigma_max: float) -> tuple[int, float, float]:
    """The arguments as an int and floats, checked."""
    n = as_int("n", n, 1)
    sigma_min, sigma_max = as_real("sigma_min", sigma_min), as_real("sigma_max", sigma_max)
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(
            "sigma_min must be above 0 (the 0 at the end is appended) and at most sigma_max, "
            f"finite, got sigma_min={sigma_min}, sigma_max={sigma_max}"
        )
    return n, sigma_min, sigma_max


def _beta_quantile(p: float, a: float, b: float) -> float:
    """The x with I_x(a, b) = p, from the side of 1/2 where x keeps its digits."""
    if p <= 0 or p >= 1:
        return float(p >= 1)
    if p > _beta_cdf(0.5, a, b):
        return 1 - _lower_quantile(1 - p, b, a)
    return _lower_quantile(p, a, b)


def _lower_quantile(p: float, a: float, b: float) -> float:
    """The quantile by bisection in [0, 1/2]; 1/2 for a p that rounding puts above it."""
    low, high = 0.0, 0.5
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _beta_cdf(middle, a, b) < p else (low, middle)
    return high


def _beta_cdf(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b) for x <= 1/2.

    x^a (1 - x)^b / (a B(a, b)) times a series of positive terms, sum_k prod_{j < k} (a + b + j) x /
    (a + 1 + j): nothing cancels (DLMF 8.17.8).
    """
    if x == 0:
        return 0.0
    term, total, k = 1.0, 1.0, 0
    while term > 1e-17 * total:  # with x <= 1/2 the terms fall in the end
        term *= (a + b + k) * x / (a + 1 + k)
        total += term
        k += 1
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    log_factor = a * math.log(x) + b * math.log1p(-x) - log_beta - math.log(a)
    return min(1.0, math.exp(log_factor + math.log(total)))
