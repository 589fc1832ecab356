"""Shared by all formulas: the compute dtype, coefficients per sample, sums per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffcore._types import Coef

__all__ = ["compute_dtype", "per_sample"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which values are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_sample(coef: Coef, like: Tensor) -> Coef:
    """A ``[B]`` coefficient as ``[B, 1, ...]``, rounded once to the compute type of ``like``."""
    if not isinstance(coef, Tensor):
        return coef
    coef = coef.to(compute_dtype(like.dtype))
    return coef if coef.ndim == 0 else coef.reshape([-1, *[1] * (like.ndim - 1)][: like.ndim])


def elementwise(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], coefs: Sequence[Coef] = ()
) -> Tensor:
    """A formula of each element, computed in the compute dtype and rounded once."""
    like = inputs[0]
    compute = compute_dtype(like.dtype)
    y = formula(*(x.to(compute) for x in inputs), *(per_sample(c, like) for c in coefs))
    return y.to(like.dtype)


def sample_size(x: Tensor) -> int:
    """The elements of one sample, also of an empty batch."""
    return x.shape[1:].numel()


def row_sum(terms: Tensor, scale: Coef, reduce_all: bool) -> Tensor:
    """``scale`` times the sum over one sample (``[B]``), or over everything when ``reduce_all``."""
    if isinstance(scale, Tensor):
        scale = scale.to(terms.dtype)  # beside a 0-dim sum its own dtype would count
        scale = scale.reshape(()) if terms.ndim == 0 else scale
    if reduce_all or terms.ndim == 0:
        return terms.sum() * scale
    # By dimensions: a DTensor with uneven shards cannot be flattened.
    return terms.sum(tuple(range(1, terms.ndim))) * scale if terms.ndim > 1 else terms * scale
