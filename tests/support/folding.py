"""Samples with groups, folded by hand: what ``group_dim`` must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Samples ``[B, ...]`` with groups in dimension ``dim``."""

    shape: tuple[int, ...]
    dim: int
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def levels(self) -> tuple[int, int]:
        """[B, G]."""
        return self.shape[0], self.shape[self.dim]

    def samples(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal samples in this layout."""
        return torch.randn(self.shape, dtype=dtype).to(memory_format=self.memory_format)

    def folded(self, x: Tensor) -> Tensor:
        """``[B G, ...]``, contiguous."""
        return x.movedim(self.dim, 1).flatten(0, 1).contiguous()

    def unfolded(self, x: Tensor) -> Tensor:
        """Back to ``[B, ..., G, ...]``."""
        return x.unflatten(0, self.levels).movedim(1, self.dim)


LAYOUTS = {
    "video": Layout((2, 3, 5, 4, 6), 2),
    "video, channels last": Layout((2, 3, 5, 4, 6), 2, torch.channels_last_3d),
    "video, odd": Layout((2, 3, 5, 3, 5), 2),
    "frames first": Layout((2, 5, 3, 4, 6), 1),
    "tokens": Layout((3, 7, 8), 1),
    "actions": Layout((3, 4, 7), 1),
    "channels": Layout((2, 6, 5), 2),
}
