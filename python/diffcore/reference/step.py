"""One reverse step of any solver, its log-probability, and the KL between two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore._types import Coef, StepColumns
from diffcore.reference.common import compute_dtype, per_sample, row_sum, sample_size

__all__ = ["reverse_step", "step_kl", "step_log_prob"]

# w, g, c_u, e_u and the threshold of a step without guidance and threshold.
UNGUIDED = (1.0, 0.0, 0.0, 0.0, 0.0)


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefs: Sequence[Coef],
    *,
    leading: Sequence[Coef] = UNGUIDED,
    model_output_uncond: Tensor | None = None,
    history: Sequence[Tensor] = (),
    keeps: bool = False,
    noise: Tensor | None = None,
    variance_output: Tensor | None = None,
    variance_coefs: Sequence[Coef] = (),
) -> Tensor | tuple[Tensor, Tensor]:
    """``x' = c_x x + c_m m + c_0 x0 + Σ c_k h_k + c_z z`` with ``x0 = clip(a_x x + a_m m)``.

    Under guidance ``m = m_u + g m_u + w (m_c - m_u)``, and x' gets the term c_u m_u. ``leading`` is
    (w, g, c_u, e_u, threshold); a threshold s other than 0 clips to [-s, s] instead and divides by
    s. The coefs are c_x, c_m, c_0, c_z, a_x, a_m, clip_min, clip_max, and then e_x, e_m, e_0, c_1,
    c_2, c_3 as far as they are needed. A learned variance multiplies c_z by ``exp(s_0 + s_v v)``.
    If it ``keeps``, the second result is ``h' = e_x x + e_m m + e_0 x0 + e_u m_u``.
    """
    compute = compute_dtype(x.dtype)
    k = StepColumns(*(per_sample(c, x) for c in coefs))
    s, m, x0 = _prediction(x, model_output, model_output_uncond, k, leading)
    u = None if model_output_uncond is None else model_output_uncond.to(compute)
    y = _with_uncond(leading[2], u, _mix(k.c_x, k.c_m, k.c_0, s, m, x0))
    for c, h in zip((k.c_1, k.c_2, k.c_3), history, strict=False):
        # Where c is 0, h is not read, whatever it holds.
        unread = torch.as_tensor(c, device=x.device) == 0
        y = y + c * torch.where(unread, torch.zeros_like(s), h.to(compute))
    if noise is not None:
        deviation = k.c_z
        if variance_output is not None:
            s_0, s_v = (per_sample(c, x) for c in variance_coefs)
            deviation = deviation * torch.exp(s_0 + s_v * variance_output.to(compute))
        y = y + deviation * noise.to(compute)
    y = y.to(x.dtype)
    if not keeps:
        return y
    kept = _with_uncond(leading[3], u, _mix(k.e_x, k.e_m, k.e_0, s, m, x0))
    return y, kept.to(x.dtype)


def step_log_prob(
    x: Tensor,
    model_output: Tensor,
    x_next: Tensor,
    coefs: Sequence[Coef],
    *,
    leading: Sequence[Coef] = UNGUIDED,
    model_output_uncond: Tensor | None = None,
) -> Tensor:
    """``log N(x'; mean, c_z² I)`` of each sample, nats; 0 where c_z is 0."""
    row = StepColumns(*coefs)
    k = StepColumns(*(per_sample(c, x) for c in coefs))
    s, m, x0 = _prediction(x, model_output, model_output_uncond, k, leading)
    u = None if model_output_uncond is None else model_output_uncond.to(s.dtype)
    mean = _with_uncond(leading[2], u, _mix(k.c_x, k.c_m, k.c_0, s, m, x0))
    # Before its shape is that of the samples: one number each.
    c_z = torch.as_tensor(row.c_z, dtype=s.dtype, device=s.device)
    none = c_z == 0
    safe = torch.where(none, torch.ones_like(c_z), c_z)
    z = (x_next.to(s.dtype) - mean) / per_sample(safe, x)
    n = sample_size(x)
    log_prob = row_sum(z * z, -0.5, reduce_all=False) - n * (
        safe.log() + 0.5 * math.log(2 * math.pi)
    )
    return torch.where(none, torch.zeros_like(log_prob), log_prob)


def step_kl(
    x: Tensor,
    model_output: Tensor,
    reference_output: Tensor,
    coefs: Sequence[Coef],
    *,
    leading: Sequence[Coef] = UNGUIDED,
) -> Tensor:
    """``‖mean_1 - mean_2‖² / (2 c_z²)`` of each sample, nats; 0 where c_z is 0."""
    row = StepColumns(*coefs)
    k = StepColumns(*(per_sample(c, x) for c in coefs))
    (s, m, first), (_, other, second) = (
        predicted_x0(x, y, None, k, leading) for y in (model_output, reference_output)
    )
    low, high, bound = _bounds(k, leading, s)
    # An infinite or NaN x0 is not inside, so that it is not hidden.
    inside = (first > low) & (first < high) & (second > low) & (second < high)
    apart = m - other
    x0 = torch.where(inside, k.a_m * apart, _clip(first, low, high) - _clip(second, low, high))
    distance = _mix(0.0, k.c_m, k.c_0, torch.zeros_like(s), apart, x0 / bound)
    c_z = torch.as_tensor(row.c_z, dtype=s.dtype, device=s.device)
    none = c_z == 0
    z = distance / per_sample(torch.where(none, torch.ones_like(c_z), c_z), x)
    kl = row_sum(z * z, 0.5, reduce_all=False)
    return torch.where(none, torch.zeros_like(kl), kl)


def _prediction(
    x: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    k: StepColumns,
    leading: Sequence[Coef],
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, m, x0) in the compute type; k as in ``reverse_step``, beside the samples."""
    s, m, x0 = predicted_x0(x, model_output, model_output_uncond, k, leading)
    low, high, bound = _bounds(k, leading, s)
    return s, m, _clip(x0, low, high) / bound


def _bounds(k: StepColumns, leading: Sequence[Coef], s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where x0 is clipped, and what divides it then; s are the samples in the compute type."""
    bound = torch.as_tensor(per_sample(leading[4], s), dtype=s.dtype, device=s.device)
    low, high = (
        torch.where(bound == 0, b, sign * bound) for b, sign in ((k.clip_min, -1), (k.clip_max, 1))
    )
    return low, high, torch.where(bound == 0, 1.0, bound)


def _clip(x0: Tensor, low: Tensor, high: Tensor) -> Tensor:
    # where, not clamp: clamp's gradient at a bound and its handling of two tensor bounds differ
    # between versions
    x0 = torch.where(x0 < low, torch.zeros_like(x0) + low, x0)
    return torch.where(x0 > high, torch.zeros_like(x0) + high, x0)


def predicted_x0(
    x: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    k: StepColumns,
    leading: Sequence[Coef],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, x0 not clipped."""
    compute = compute_dtype(x.dtype)
    s, m = x.to(compute), model_output.to(compute)
    if model_output_uncond is not None:
        u = model_output_uncond.to(compute)
        m = u + per_sample(leading[1], x) * u + per_sample(leading[0], x) * (m - u)
    return s, m, k.a_x * s + k.a_m * m


def _mix(b_x: Coef, b_m: Coef, b_0: Coef, x: Tensor, m: Tensor, x0: Tensor) -> Tensor:
    # Where m has no part of its own, an infinite one is met by the clip, not by 0 · inf.
    absent = torch.as_tensor(b_m, device=m.device) == 0
    return b_x * x + b_m * torch.where(absent, torch.zeros_like(m), m) + b_0 * x0


def _with_uncond(b_u: Coef, u: Tensor | None, rest: Tensor) -> Tensor:
    """+ b_u m_u; where b_u is 0, m_u is not read."""
    if u is None or (not isinstance(b_u, Tensor) and b_u == 0):
        return rest
    b = per_sample(b_u, u)
    absent = torch.as_tensor(b, device=u.device) == 0
    return rest + b * torch.where(absent, torch.zeros_like(u), u)
