"""Memory layouts: dense ones, others, and expanded views."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SENTINEL = 77.0

Layout = Callable[[Tensor], Tensor]


def inside(x: Tensor, offset: int, order: tuple[int, ...] | None = None) -> Tensor:
    """`x` at an offset in a larger buffer, dense, its dimensions in `order` from slow to fast."""
    order = order or tuple(range(x.ndim))
    buffer = torch.full((x.numel() + 2 * offset + 64,), SENTINEL, dtype=x.dtype, device=x.device)
    view = buffer[offset : offset + x.numel()].view([x.shape[d] for d in order])
    view = view.permute([order.index(d) for d in range(x.ndim)])
    view.copy_(x)
    return view


def gaps(x: Tensor) -> Tensor:
    """`x` in every other element of a buffer."""
    return torch.stack([x, torch.full_like(x, SENTINEL)], -1)[..., 0]


DENSE: dict[str, Layout] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "offset by 1": lambda x: inside(x, 1),
    "offset by 3": lambda x: inside(x, 3),
    "channels_last, offset by 1": lambda x: inside(x, 1, (0, 2, 3, 1)),
    "innermost dimensions swapped": lambda x: inside(x, 0, (0, 1, 3, 2)),
}
OTHER: dict[str, Layout] = {
    "batch innermost": lambda x: inside(x, 0, (1, 2, 3, 0)),
    "batch second": lambda x: inside(x, 0, (1, 0, 2, 3)),
    "gaps": gaps,
    "every other sample": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "half of the channels": lambda x: torch.cat([x, x + 1], dim=1)[:, : x.shape[1]],
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1), value=SENTINEL)[..., 2:-1, 1:-2],
}
EXPANDED: dict[str, Layout] = {
    "one sample expanded": lambda x: x[:1].expand_as(x),
    "one element expanded": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "one channel expanded": lambda x: x[:, :1].expand_as(x),
}
LAYOUTS = {**DENSE, **OTHER, **EXPANDED}
