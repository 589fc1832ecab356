"""The quantile of dynamic thresholding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore._devices import in_float64
from diffcore._types import Coef, StepColumns
from diffcore.reference.common import per_sample
from diffcore.reference.step import UNGUIDED, predicted_x0

__all__ = ["x0_quantile"]


def x0_quantile(
    x: Tensor,
    model_output: Tensor,
    coefs: Sequence[Coef],
    ratio: Coef,
    sample_max_value: Coef,
    *,
    leading: Sequence[Coef] = UNGUIDED,
    model_output_uncond: Tensor | None = None,
    reduce_all: bool = False,
) -> Tensor:
    """``min(max(quantile(|a_x x + a_m m|, ratio), 1), sample_max_value)`` of each sample.

    m, coefs and ``leading`` as in ``reverse_step``. The quantile lies ``ratio (n - 1)``
    from the first of n in order, as numpy's; only that an infinite neighbour does not make it nan.
    """
    k = StepColumns(*(per_sample(c, x) for c in coefs))
    _, _, x0 = predicted_x0(x, model_output, model_output_uncond, k, leading)
    rows = x0.reshape(-1) if reduce_all or x0.ndim == 0 else x0.unsqueeze(-1).flatten(1)
    ordered, n = in_float64(rows.abs().sort(-1).values), rows.shape[-1]

    def as_double(c: Coef) -> Tensor:
        c = in_float64(c) if isinstance(c, Tensor) else c
        return torch.as_tensor(c, dtype=torch.float64, device=ordered.device)

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
    return torch.where(threshold > most, most, threshold).to(x0.dtype).to(x0.device)
