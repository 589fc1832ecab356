"""Where the elements of a shard lie in their sample: runs of the noise that make up a box."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# What a launch costs, in elements of noise that are generated in the same time.
_LAUNCH = 4096
# Elements of a sample next to the box that may be generated and dropped, to save launches.
_SPARE = 2**14


class Window(NamedTuple):
    """A box of a sample.

    Attributes:
        sample: Shape of the sample.
        offset: Index of the first entry of the box.
        sizes: Shape of the box.
    """

    sample: tuple[int, ...]
    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def start(self) -> int:
        """The element of the sample at which the box begins, in row-major order."""
        start = 0
        for size, offset in zip(self.sample, self.offset, strict=True):
            start = start * size + offset
        return start

    @property
    def end(self) -> int:
        """The element after the last one of the box."""
        last = tuple(o + n - 1 for o, n in zip(self.offset, self.sizes, strict=True))
        return self._replace(offset=last).start + 1

    def elements(self, device: torch.device | str | None) -> Tensor:
        """The elements of the box in row-major order, int64 ``[n]``."""
        found = torch.zeros(1, dtype=torch.int64, device=device)
        for size, offset, count in zip(self.sample, self.offset, self.sizes, strict=True):
            index = torch.arange(count, device=found.device) + offset
            found = (found.unsqueeze(-1) * size + index).flatten()
        return found

    @property
    def is_run(self) -> bool:
        """Whether the elements of the box follow each other in the sample."""
        return math.prod(self.sizes[: self._run_dim]) <= 1

    @property
    def _run_dim(self) -> int:
        """The dimension from which on the box is one run for each index of the dimensions before.

        That is the last one in which the box is smaller than the sample.
        """
        d = len(self.sizes) - 1
        while d > 0 and self.sizes[d] == self.sample[d]:
            d -= 1
        return max(d, 0)

    @property
    def _piece_dim(self) -> int:
        """The dimension from which on one launch generates all entries of the dimensions after it.

        Fewer launches generate more noise that is dropped. The memory for that stays below that of
        the box, but for small samples.
        """
        most = max(math.prod(self.sizes), _SPARE)
        best, lowest = self._run_dim, math.inf
        for d in range(self._run_dim, -1, -1):
            elements = self.sizes[d] * math.prod(self.sample[d + 1 :])
            if d < self._run_dim and elements > most:
                break
            cost = math.prod(self.sizes[:d]) * (_LAUNCH + elements)
            if cost < lowest:
                best, lowest = d, cost
        return best

    def pieces(self) -> tuple[Iterator[int], tuple[int, ...]]:
        """The pieces of noise to generate.

        Returns:
            The first element of each piece, and the shape of a piece. Its first dimension is one of
            the box; in the others it spans the sample.
        """
        d = self._piece_dim
        indices = itertools.product(
            *(range(o, o + n) for o, n in zip(self.offset[:d], self.sizes[:d], strict=True))
        )
        rest = (0,) * (len(self.sample) - d - 1)
        starts = (self._replace(offset=(*index, self.offset[d], *rest)).start for index in indices)
        return starts, (self.sizes[d], *self.sample[d + 1 :])

    def generate(self, first: int, run: Callable[[int, int], Tensor]) -> Tensor:
        """The noise of the box, in float32 or what ``run`` returns.

        Args:
            first: The element at which the sample begins, a multiple of 4.
            run: ``(first element, count) -> [B, count]``; the first element is a multiple of 4.

        Returns:
            ``[B, *sizes]``.
        """
        starts, shape = self.pieces()
        count, trailing = math.prod(shape), len(shape) - 1
        found = []
        for start in starts:
            aligned = (first + start) // 4 * 4
            z = run(aligned, first + start - aligned + count)[:, first + start - aligned :]
            z = z.reshape(z.shape[0], *shape)
            for d in range(-trailing, 0):
                z = z.narrow(d, self.offset[d], self.sizes[d])
            found.append(z)
        return torch.stack(found, dim=1).reshape(found[0].shape[0], *self.sizes)
