"""The two numbers of a sample for guidance that depends on both predictions of it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore._devices import in_float64
from diffcore._types import Coef
from diffcore.reference.common import compute_dtype, row_sum

__all__ = ["guidance_weights"]


def guidance_weights(
    model_output: Tensor,
    model_output_uncond: Tensor,
    kind: str,
    scale: Coef,
    parameter: Coef,
    limit: Coef,
) -> tuple[Tensor, Tensor]:
    """(w, g) of each sample, for ``m = m_u + g m_u + w (m_c - m_u)``; see csrc/ops/guidance.h.

    With d = m_c - m_u, the sums are those over m_c and d: where both predictions are close, sums
    over m_u would cancel.
    """
    compute = compute_dtype(model_output.dtype)
    c = model_output.to(compute)
    d = c - model_output_uncond.to(compute)
    n = c[0].numel() if c.ndim and c.shape[0] else 1
    cc, cd, dd, sum_c, sum_d = (
        in_float64(row_sum(y, 1.0, reduce_all=False)) for y in (c * c, c * d, d * d, c, d)
    )
    scale, parameter, limit = (_beside(x, cc) for x in (scale, parameter, limit))
    beyond = scale - 1

    def square(s: Tensor) -> Tensor:
        return cc + 2 * s * cd + s * s * dd

    def variance(s: Tensor) -> Tensor:
        total = sum_c + s * sum_d
        return square(s) - total * total / n if n > 1 else 0 * total

    if kind == "rescaled":
        gain = parameter * (_ratio(variance(0 * beyond), variance(beyond)) - 1)
        w = scale + gain * scale
    elif kind == "norm_preserving":
        gain = _ratio(square(0 * beyond), square(beyond)) - 1
        w = scale + gain * scale
    elif kind == "zero_star":
        uu = cc - 2 * cd + dd
        there = ~(uu <= 0)
        gain = torch.where(there, beyond * (dd - cd) / torch.where(there, uu, 1.0), beyond)
        w = scale.expand_as(gain)
    elif kind == "projected":
        over = dd > limit * limit
        kept = torch.where(over, limit / torch.where(over, dd, 1.0).sqrt(), 1.0)
        there = ~(cc <= 0)
        along = torch.where(there, kept * cd / torch.where(there, cc, 1.0), 0.0)
        gain = -beyond * (1 - parameter) * along
        w = 1 + gain + beyond * kept
    else:
        assert kind == "tangential", kind
        angle = 0.5 * torch.atan2(2 * (cc - cd), 2 * cd - dd)
        u, v = angle.cos(), angle.sin()
        w = scale - beyond * u * v
        gain = beyond * u * (u - v)
    return w.to(compute).to(c.device), gain.to(compute).to(c.device)


def _beside(coef: Coef, like: Tensor) -> Tensor:
    """A coefficient as float64, one number or one for each sample."""
    if isinstance(coef, Tensor):
        coef = in_float64(coef)
    found = torch.as_tensor(coef, dtype=torch.float64, device=like.device)
    return found.reshape(like.shape) if found.numel() == like.numel() else found.reshape(())


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``sqrt(a / b)`` of numbers that rounding may have made negative; 1 where b is 0."""
    there, none = ~(b <= 0), a <= 0
    found = torch.where(none, 1.0, a) / torch.where(there, b, 1.0)
    # The root is taken where it has a slope, so that no gradient is 0 times infinity.
    root = torch.where(there & ~none, found, 1.0).sqrt()
    return torch.where(there, torch.where(none, 0.0, root), 1.0)
