"""Noise levels for samplers, under k-diffusion's names."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore._checks import as_int, as_positive, as_real, check_choice
from diffcore._devices import to_device
from diffcore.schedules.shift import shift_sigmas

Device = torch.device | str

AYS_SIGMAS: dict[str, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
}
"""The published noise levels of Align Your Steps for ten steps, by model."""

_LAPLACE_SHIFT = 1e-5  # keeps the logarithm finite at both ends


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Device = "cpu"
) -> Tensor:
    """sigma_i^(1 / rho) linear from sigma_max to sigma_min, and a 0.

    Args:
        n: Number of levels, without the appended 0.
        sigma_min: Last level before the 0, above 0.
        sigma_max: First level.
        rho: How strongly levels crowd at the low end; 1 is linear, infinity geometric.
        device: Device of the result, which is float32 where that has no float64.

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
    return _with_ends(sigmas, sigma_min, sigma_max, device)


def get_sigmas_exponential(
    n: int, sigma_min: float, sigma_max: float, device: Device = "cpu"
) -> Tensor:
    """log(sigma) linear from sigma_max to sigma_min, and a 0.

    Args:
        n: Number of levels, without the appended 0.
        sigma_min: Last level before the 0, above 0.
        sigma_max: First level.
        device: Device of the result, which is float32 where that has no float64.

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
        device: Device of the result, which is float32 where that has no float64.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, not 0 < sigma_min <= sigma_max, or rho = 0.
    """
    n, sigma_min, sigma_max = _range(n, sigma_min, sigma_max)
    rho = as_positive("rho", rho)
    height = math.log(sigma_max) - math.log(sigma_min)
    sigmas = torch.exp((1 - _ramp(n)) ** rho * height + math.log(sigma_min))
    return _with_ends(sigmas, sigma_min, sigma_max, device)


def get_sigmas_lu(n: int, sigma_min: float, sigma_max: float, device: Device = "cpu") -> Tensor:
    """Lambda = -log(sigma) uniform, the levels that DPM-Solver is analyzed for; and a 0.

    The numbers of ``get_sigmas_exponential``, under diffusers' name for them
    (``use_lu_lambdas``).

    Args:
        n: Number of levels, without the appended 0.
        sigma_min: Last level before the 0, above 0.
        sigma_max: First level.
        device: Device of the result, which is float32 where that has no float64.

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
        device: Device of the result, which is float32 where that has no float64.

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
    return _with_ends(sigmas, sigma_min, sigma_max, device)


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
        device: Device of the result, which is float32 where that has no float64.

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
    return to_device(torch.cat([sigmas, sigmas.new_zeros(1)]), device)


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


def get_sigmas_laplace(
    n: int,
    sigma_min: float,
    sigma_max: float,
    mu: float = 0.0,
    beta: float = 0.5,
    device: Device = "cpu",
) -> Tensor:
    """Quantiles of a Laplace distribution of log(sigma), clamped to the range, and a 0.

    ``log sigma = mu - beta sign(1/2 - u) log(1 - 2 |1/2 - u| + 1e-5)`` for u from 0 to 1. ComfyUI
    returns these levels without the 0.

    Args:
        n: Number of levels, without the appended 0.
        sigma_min: The lowest level before the 0, above 0.
        sigma_max: The highest level.
        mu: Mean of log(sigma).
        beta: Scale of the distribution. Where it leads out of the range, several levels are
            ``sigma_min`` or ``sigma_max``, which no solver takes.
        device: Device of the result, which is float32 where that has no float64.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, not 0 < sigma_min <= sigma_max, or beta not above 0.

    Source:
        Hang et al. 2024 (arXiv 2407.03297); the 1e-5 is ComfyUI's.
    """
    n, sigma_min, sigma_max = _range(n, sigma_min, sigma_max)
    mu, beta = as_real("mu", mu), as_positive("beta", beta, finite=True)
    left = 0.5 - _ramp(n)
    # 1 - 2 |1/2 - u|, without a difference of numbers near 1.
    tail = 2 * torch.minimum(_ramp(n), _ramp(n).flip(0) if n > 1 else 1 - _ramp(n))
    sigmas = torch.exp(mu - beta * left.sign() * torch.log(tail + _LAPLACE_SHIFT))
    sigmas = sigmas.clamp(sigma_min, sigma_max)
    return to_device(torch.cat([sigmas, sigmas.new_zeros(1)]), device)


def get_sigmas_kl_optimal(
    n: int, sigma_min: float, sigma_max: float, device: Device = "cpu"
) -> Tensor:
    """arctan(sigma) linear from sigma_max to sigma_min, and a 0.

    Args:
        n: Number of levels, without the appended 0.
        sigma_min: Last level before the 0, above 0.
        sigma_max: First level.
        device: Device of the result, which is float32 where that has no float64.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, or not 0 < sigma_min <= sigma_max.

    Source:
        Sabour et al. 2024 (Align Your Steps, arXiv 2404.14507), the optimum for Gaussian data.
    """
    n, sigma_min, sigma_max = _range(n, sigma_min, sigma_max)
    # Near pi / 2 a tangent loses what the arctangent of 1 / sigma keeps.
    high = math.atan(1 / sigma_max)
    fall = _ramp(n) * (math.atan(1 / sigma_min) - high)
    sigmas = 1 / torch.tan(high + fall)
    return _with_ends(sigmas, sigma_min, sigma_max, device)


def get_sigmas_linear_quadratic(
    n: int,
    *,
    sigma_max: float = 1.0,
    threshold_noise: float = 0.025,
    linear_steps: int | None = None,
) -> Tensor:
    """Equal short steps down from sigma_max, then steps that grow linearly, to 0.

    ``1 - sigma / sigma_max`` is ``threshold_noise i / linear_steps`` at first, and from i =
    ``linear_steps`` on the parabola through the same value and slope that is 1 at i = n.

    Args:
        n: Number of steps.
        sigma_max: First level; 1 for a rectified flow.
        threshold_noise: By how much the first ``linear_steps`` steps go down, as a fraction.
        linear_steps: Number of steps of the first part; n // 2 by default.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, sigma_max not above 0, threshold_noise outside (0, 1), linear_steps
            outside 1 .. n - 1, or levels that do not fall.

    Source:
        Genmo's Mochi 1 (``linear_quadratic_schedule``); ComfyUI's scheduler "linear_quadratic".
    """
    n = as_int("n", n, 1)
    sigma_max = as_positive("sigma_max", sigma_max, finite=True)
    threshold_noise = as_real("threshold_noise", threshold_noise)
    if not 0 < threshold_noise < 1:
        raise ValueError(f"threshold_noise must lie in (0, 1), got {threshold_noise}")
    if n == 1:
        return torch.tensor([sigma_max, 0.0], dtype=torch.float64, device="cpu")
    first = n // 2 if linear_steps is None else as_int("linear_steps", linear_steps)
    if not 1 <= first < n:
        raise ValueError(f"linear_steps must be in 1 .. n - 1 = {n - 1}, got {first}")
    slope, left = threshold_noise / first, n - first
    curve = (1 - threshold_noise - slope * left) / left**2
    after = torch.arange(n + 1, dtype=torch.float64, device="cpu") - first
    done = threshold_noise + slope * after + curve * after.clamp(min=0) ** 2
    sigmas = sigma_max * (1 - done)
    sigmas[0], sigmas[-1] = sigma_max, 0.0
    if bool((sigmas[1:] >= sigmas[:-1]).any()):
        raise ValueError(
            f"threshold_noise must leave levels that fall, got {threshold_noise} in {first} of {n} "
            "steps"
        )
    return sigmas


def get_sigmas_ays(n: int, model: str = "sd15", device: Device = "cpu") -> Tensor:
    """The published levels of Align Your Steps, interpolated to n steps, and a 0.

    log(sigma) is interpolated linearly at n + 1 evenly spaced places of ``AYS_SIGMAS[model]``,
    and the last of them is replaced by the 0, as in ComfyUI and diffusers. For n = 10 the others
    are the published numbers.

    Args:
        n: Number of levels, without the 0 at the end.
        model: A key of ``AYS_SIGMAS``: "sd15" (Stable Diffusion 1.5), "sdxl", "svd" (Stable Video
            Diffusion) or "deepfloyd" (stage 1).
        device: Device of the result, which is float32 where that has no float64.

    Returns:
        float64 ``[n + 1]``.

    Raises:
        ValueError: n < 1, or an unknown model.

    Source:
        Sabour et al. 2024 (Align Your Steps, arXiv 2404.14507) table 3, and the authors' how-to for
        the interpolation.
    """
    n = as_int("n", n, 1)
    check_choice("model", model, tuple(AYS_SIGMAS))
    known = AYS_SIGMAS[model]
    found = []
    for i in range(n):
        place, rest = divmod(i * (len(known) - 1), n)
        share, low = rest / n, known[place]
        found.append(low if rest == 0 else low * (known[place + 1] / low) ** share)
    return to_device(torch.tensor([*found, 0.0], dtype=torch.float64, device="cpu"), device)


def _ramp(n: int) -> Tensor:
    """The n numbers from 0 to 1, evenly spaced."""
    return torch.arange(n, dtype=torch.float64, device="cpu") / max(n - 1, 1)


def _with_ends(sigmas: Tensor, sigma_min: float, sigma_max: float, device: Device) -> Tensor:
    """Set both ends to the values asked for, free of rounding, and append the 0."""
    sigmas[-1] = sigma_min
    sigmas[0] = sigma_max
    return to_device(torch.cat([sigmas, sigmas.new_zeros(1)]), device)


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
