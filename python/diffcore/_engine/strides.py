"""Where the elements of a tensor lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def shares_elements(x: Tensor) -> bool:
    """Whether two elements of a tensor are the same memory."""
    order = sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1)
    if x.numel() == 0 or type(x) is not Tensor:
        return False
    reach = 0  # of the dimensions so far
    for stride, size in order:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    if order[0][0] == 0:
        return True
    at = torch.zeros((), dtype=torch.int64, device="cpu")  # interleaved dimensions: rare, so count
    for stride, size in order:
        at = at.unsqueeze(-1) + stride * torch.arange(size, device="cpu")
    apart: int = at.unique().numel()
    return apart < x.numel()
