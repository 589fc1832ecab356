"""The specification: every op of diffcore in plain PyTorch, under the same name.

Tests run these in float64 as the truth; devices without kernels and installs without the compiled
module run on them. Inputs keep their dtype at the boundary and 16-bit inputs are computed in
float32, rounded once at the end. Coefficients are numbers or tensors that broadcast against the
inputs (see :func:`per_sample`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Coef = float | Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which values are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_sample(coef: Coef, like: Tensor) -> Coef:
    """A `[B]` coefficient as `[B, 1, ...]`, rounded once to the compute type of `like`."""
    if not isinstance(coef, Tensor):
        return coef
    coef = coef.to(compute_dtype(like.dtype))
    return coef if coef.ndim == 0 else coef.reshape([-1, *[1] * (like.ndim - 1)][: like.ndim])


def _elementwise(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], coefs: Sequence[Coef] = ()
) -> Tensor:
    like = inputs[0]
    compute = compute_dtype(like.dtype)
    y = formula(*(x.to(compute) for x in inputs), *(per_sample(c, like) for c in coefs))
    return y.to(like.dtype)


def _row_sum(terms: Tensor, scale: Coef, whole: bool) -> Tensor:
    """`scale` times the sum over one sample (`[B]`), or over everything when `whole`."""
    if whole or terms.ndim == 0:
        return terms.sum() * scale
    return terms.flatten(1).sum(1) * scale if terms.ndim > 1 else terms * scale


# ---- linear maps -------------------------------------------------------------------------------


def scale(x: Tensor, a: Coef) -> Tensor:
    """``a x``."""
    return _elementwise(lambda x, a: a * x, (x,), (a,))


def scale_twice(x: Tensor, a: Coef, b: Coef) -> tuple[Tensor, Tensor]:
    """``(a x, b x)``."""
    return scale(x, a), scale(x, b)


def linear_combination(x: Tensor, y: Tensor, a: Coef, b: Coef) -> Tensor:
    """``a x + b y``."""
    return _elementwise(lambda x, y, a, b: a * x + b * y, (x, y), (a, b))


def linear_pair(x: Tensor, y: Tensor, a: Coef, b: Coef, c: Coef, d: Coef) -> tuple[Tensor, Tensor]:
    """``(a x + b y, c x + d y)``; where c is 0, x has no part in the second."""

    def second(x: Tensor, y: Tensor, c: Coef, d: Coef) -> Tensor:
        absent = torch.as_tensor(c, device=x.device) == 0
        return torch.where(absent, torch.zeros_like(x), c * x) + d * y

    return linear_combination(x, y, a, b), _elementwise(second, (x, y), (c, d))


def add_noise(x0: Tensor, noise: Tensor, alpha: Coef, sigma: Coef) -> Tensor:
    """``x_t = alpha x_0 + sigma noise``."""
    return linear_combination(x0, noise, alpha, sigma)


def velocity(x0: Tensor, noise: Tensor, alpha: Coef, sigma: Coef) -> Tensor:
    """``v = alpha noise - sigma x_0``."""
    return _elementwise(lambda x, e, a, s: a * e - s * x, (x0, noise), (alpha, sigma))


_X0: dict[str, Callable[..., Tensor]] = {
    "epsilon": lambda m, x, a, s: (x - s * m) / a,
    "sample": lambda m, x, a, s: m * 1.0,
    "v_prediction": lambda m, x, a, s: a * x - s * m,
    "flow_prediction": lambda m, x, a, s: x - s * m,
}

_EPSILON: dict[str, Callable[..., Tensor]] = {
    "epsilon": lambda m, x, a, s: m * 1.0,
    "sample": lambda m, x, a, s: (x - a * m) / s,
    "v_prediction": lambda m, x, a, s: s * x + a * m,
    "flow_prediction": lambda m, x, a, s: x + (1 - s) * m,
}


def predict_x0(
    model_output: Tensor, x_t: Tensor, alpha: Coef, sigma: Coef, *, prediction_type: str = "epsilon"
) -> Tensor:
    """The clean sample that a prediction implies."""
    return _elementwise(_X0[prediction_type], (model_output, x_t), (alpha, sigma))


def predict_epsilon(
    model_output: Tensor, x_t: Tensor, alpha: Coef, sigma: Coef, *, prediction_type: str = "epsilon"
) -> Tensor:
    """The noise that a prediction implies."""
    return _elementwise(_EPSILON[prediction_type], (model_output, x_t), (alpha, sigma))


# ---- reverse steps -----------------------------------------------------------------------------


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefs: Sequence[Coef],
    *,
    guidance_scale: Coef = 1.0,
    threshold: Coef = 0.0,
    model_output_uncond: Tensor | None = None,
    history: Sequence[Tensor] = (),
    keeps: bool = False,
    noise: Tensor | None = None,
    variance_output: Tensor | None = None,
    variance_coefs: Sequence[Coef] = (),
) -> Tensor | tuple[Tensor, Tensor]:
    """``x' = c_x x + c_m m + c_0 x0 + Σ c_k h_k + c_z z`` with ``x0 = clip(a_x x + a_m m)``.

    ``m = m_u + w (m_c - m_u)`` under guidance. The coefs are c_x, c_m, c_0, c_z, a_x, a_m,
    clip_min, clip_max, and then e_x, e_m, e_0, c_1, c_2, c_3 as far as they are needed. A threshold
    s other than 0 clips to [-s, s] instead and divides by s. A learned variance multiplies c_z by
    ``exp(s_0 + s_v v)``. If it `keeps`, the second result is ``h' = e_x x + e_m m + e_0 x0``.
    """
    compute = compute_dtype(x.dtype)
    k = [per_sample(c, x) for c in coefs]
    s, m, x0 = _prediction(x, model_output, model_output_uncond, k, guidance_scale, threshold)
    y = _mix(k[0], k[1], k[2], s, m, x0)
    for c, h in zip(k[11:], history, strict=True):
        # Where c is 0, h is not read, whatever it holds.
        unread = torch.as_tensor(c, device=x.device) == 0
        y = y + c * torch.where(unread, torch.zeros_like(s), h.to(compute))
    if noise is not None:
        deviation = k[3]
        if variance_output is not None:
            s_0, s_v = (per_sample(c, x) for c in variance_coefs)
            deviation = deviation * torch.exp(s_0 + s_v * variance_output.to(compute))
        y = y + deviation * noise.to(compute)
    y = y.to(x.dtype)
    return (y, _mix(k[8], k[9], k[10], s, m, x0).to(x.dtype)) if keeps else y


def step_log_prob(
    x: Tensor,
    model_output: Tensor,
    x_next: Tensor,
    coefs: Sequence[Coef],
    *,
    guidance_scale: Coef = 1.0,
    threshold: Coef = 0.0,
    model_output_uncond: Tensor | None = None,
) -> Tensor:
    """``log N(x'; mean, c_z² I)`` of each sample, nats; 0 where c_z is 0."""
    k = [per_sample(c, x) for c in coefs]
    s, m, x0 = _prediction(x, model_output, model_output_uncond, k, guidance_scale, threshold)
    # Before its shape is that of the samples: one number each.
    c_z = torch.as_tensor(coefs[3], dtype=s.dtype, device=s.device)
    none = c_z == 0
    safe = torch.where(none, torch.ones_like(c_z), c_z)
    z = (x_next.to(s.dtype) - _mix(k[0], k[1], k[2], s, m, x0)) / per_sample(safe, x)
    n = x[0].numel() if x.ndim else 1
    log_prob = _row_sum(z * z, -0.5, whole=False) - n * (safe.log() + 0.5 * math.log(2 * math.pi))
    return torch.where(none, torch.zeros_like(log_prob), log_prob)


def _prediction(
    x: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    k: Sequence[Coef],
    guidance_scale: Coef,
    threshold: Coef,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, m, x0) in the compute type; k as in `reverse_step`, beside the samples."""
    s, m, x0 = _said(x, model_output, model_output_uncond, k, guidance_scale)
    bound = torch.as_tensor(per_sample(threshold, x), dtype=s.dtype, device=x.device)
    low, high = (torch.where(bound == 0, b, sign * bound) for b, sign in ((k[6], -1), (k[7], 1)))
    # where, not clamp: clamp's gradient at a bound and its handling of two tensor bounds differ
    # between versions
    x0 = torch.where(x0 < low, torch.zeros_like(x0) + low, x0)
    x0 = torch.where(x0 > high, torch.zeros_like(x0) + high, x0)
    return s, m, x0 / torch.where(bound == 0, 1.0, bound)


def _said(
    x: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    k: Sequence[Coef],
    guidance_scale: Coef,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, x0 not clipped."""
    compute = compute_dtype(x.dtype)
    s, m = x.to(compute), model_output.to(compute)
    if model_output_uncond is not None:
        u = model_output_uncond.to(compute)
        m = u + per_sample(guidance_scale, x) * (m - u)
    return s, m, k[4] * s + k[5] * m


def _mix(b_x: Coef, b_m: Coef, b_0: Coef, x: Tensor, m: Tensor, x0: Tensor) -> Tensor:
    # Where m has no part of its own, an infinite one is met by the clip, not by 0 · inf.
    absent = torch.as_tensor(b_m, device=m.device) == 0
    return b_x * x + b_m * torch.where(absent, torch.zeros_like(m), m) + b_0 * x0


def x0_quantile(
    x: Tensor,
    model_output: Tensor,
    coefs: Sequence[Coef],
    ratio: Coef,
    sample_max_value: Coef,
    *,
    guidance_scale: Coef = 1.0,
    model_output_uncond: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """``min(max(quantile(|a_x x + a_m m|, ratio), 1), sample_max_value)`` of each sample.

    ``m = m_u + w (m_c - m_u)``, coefs as in `reverse_step`. The quantile lies ``ratio (n - 1)``
    from the first of n in order, as numpy's; only that an infinite neighbour does not make it nan.
    """
    k = [per_sample(c, x) for c in coefs]
    _, _, x0 = _said(x, model_output, model_output_uncond, k, guidance_scale)
    rows = x0.reshape(-1) if whole or x0.ndim == 0 else x0.unsqueeze(-1).flatten(1)
    ordered, n = rows.abs().sort(-1).values.double(), rows.shape[-1]

    def as_double(c: Coef) -> Tensor:
        return torch.as_tensor(c, dtype=torch.float64, device=x.device)

    at = (as_double(ratio) * (n - 1)).clamp(0, n - 1).expand(rows.shape[:-1])
    rank = at.floor().long()
    a, b = (
        ordered.gather(-1, i.clamp(max=n - 1).unsqueeze(-1)).squeeze(-1) for i in (rank, rank + 1)
    )
    quantile = torch.where((at == rank) | (a == b), a, a + (at - rank) * (b - a))
    last = ordered[..., -1]
    quantile = torch.where(last.isnan(), last, quantile)
    threshold = torch.where(quantile < 1, torch.ones_like(quantile), quantile)
    most = as_double(sample_max_value).expand(rows.shape[:-1])
    return torch.where(threshold > most, most, threshold).to(x0.dtype)


# ---- Gaussians ---------------------------------------------------------------------------------


def expm1_minus(d: Tensor) -> Tensor:
    """``expm1(d) - d`` without cancellation: its Taylor series where ``|d| < 1``."""
    terms = 17 if d.dtype == torch.float64 else 9
    near = torch.where(d.abs() < 1, d, torch.zeros_like(d))
    series = torch.full_like(d, 1 / math.factorial(terms + 2))
    for k in range(terms - 1, -1, -1):
        series = series * near + 1 / math.factorial(k + 2)
    far = torch.where(d == math.inf, d, torch.expm1(d) - d)  # not inf - inf
    return torch.where(d.abs() < 1, near * near * series, far)


def _normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    return 0.5 * (expm1_minus(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def _standard_normal_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean**2 + expm1_minus(logvar))


def _gaussian_nll(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (math.log(2 * math.pi) + logvar + (x - mean) ** 2 * torch.exp(-logvar))


def _reduce(formula: Callable[..., Tensor], inputs: Sequence[Tensor], reduction: str) -> Tensor:
    if reduction == "none":
        return _elementwise(formula, inputs)
    compute = compute_dtype(inputs[0].dtype)
    terms = formula(*(x.to(compute) for x in inputs))
    batch = terms.shape[0] if terms.ndim else 1
    scales = {"sample": 1.0, "sum": 1.0}
    if terms.numel():
        scales |= {"batchmean": 1.0 / batch, "mean": 1.0 / terms.numel()}
    return _row_sum(terms, scales.get(reduction, math.nan), whole=reduction != "sample")


def normal_kl(
    mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor, *, reduction: str = "none"
) -> Tensor:
    """KL of two diagonal Gaussians, nats."""
    return _reduce(_normal_kl, (mean1, logvar1, mean2, logvar2), reduction)


def standard_normal_kl(mean: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """KL to the standard normal, nats."""
    return _reduce(_standard_normal_kl, (mean, logvar), reduction)


def gaussian_nll(x: Tensor, mean: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """Negative log-density of a diagonal Gaussian, nats."""
    return _reduce(_gaussian_nll, (x, mean, logvar), reduction)


def reparameterize(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """``z = mean + exp(logvar / 2) noise``."""
    return _elementwise(lambda m, lv, e: m + torch.exp(0.5 * lv) * e, (mean, logvar, noise))


def reparameterize_kl(mean: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``z`` and the KL of each sample to the standard normal, `[B]`, nats."""
    z = reparameterize(mean, logvar, noise)
    return z, standard_normal_kl(mean, logvar, reduction="sample")


# ---- losses ------------------------------------------------------------------------------------


def _target_loss(
    model_output: Tensor,
    target: Tensor,
    weight: Coef,
    inverse_n: Coef,
    slope: Coef = 0.0,
) -> tuple[Tensor, Tensor]:
    """``weight inverse_n Σ (m - target)²``, after ``2 weight slope (m - target)``.

    The first is the gradient, slope being inverse_n times the upstream one; where slope is 0 it is
    the error alone.
    """
    compute = compute_dtype(model_output.dtype)
    return _loss(
        model_output, model_output.to(compute) - target.to(compute), weight, inverse_n, slope
    )


def _mixed_target_loss(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    weight: Coef,
    inverse_n: Coef,
    a: Coef,
    b: Coef,
    slope: Coef = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same for the target ``a x_0 + b noise``."""
    compute = compute_dtype(model_output.dtype)
    a, b = per_sample(a, model_output), per_sample(b, model_output)
    error = model_output.to(compute) - (a * x0.to(compute) + b * noise.to(compute))
    return _loss(model_output, error, weight, inverse_n, slope)


def _loss(
    like: Tensor, error: Tensor, weight: Coef, inverse_n: Coef, slope: Coef
) -> tuple[Tensor, Tensor]:
    slope = per_sample(slope, like)
    unit = torch.as_tensor(slope, device=error.device) == 0
    gradient = torch.where(unit, 1.0, 2 * slope * per_sample(weight, like)) * error.detach()
    if isinstance(weight, Tensor):
        weight = weight.to(compute_dtype(like.dtype))
    return gradient.to(like.dtype), _row_sum(error**2, weight * inverse_n, whole=False)
