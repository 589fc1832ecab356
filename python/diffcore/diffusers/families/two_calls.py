"""What the schedulers share that call the model twice a step: Heun and DPM-Solver-2."""

from __future__ import annotations

from typing import Any

import torch

from diffcore.diffusers.families.sigmas import ScaledInput, levels_at
from diffcore.diffusers.rows import float64
from diffcore.diffusers.scheduler import Call
from diffcore.diffusers.walk import Unsupported, Walk
from diffcore.solvers import NoiseLevels

_BEGUN = "the second of two steps, of which the stock scheduler took one"


class TwoCalls(ScaledInput):
    """A scheduler whose even steps go to a point on the way, and odd ones to the next sigma.

    The odd one reads what the even one left. Stock and fused keep it in places of their own, so a
    step that one has begun is not the other's to end.
    """

    returns_x0 = True
    casts_to_model = False
    has_history = True

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is the first of two."""
        if self._stock_began():
            return False
        walk, row = self._fusion.walk, self._step_index
        if walk is None or walk.start is None or row is None:
            return True
        return (row - walk.start) % 2 == 0

    def _stock_began(self) -> bool:
        """Whether the stock scheduler has taken the first of two steps."""
        return not super().state_in_first_order  # type: ignore[misc]

    def _input_scale(self, walk: Walk, row: int) -> float:
        """As the table has it, which knows the sigma on the way."""
        if self._stock_began():
            raise Unsupported(_BEGUN)
        start = row if walk.start is None else walk.start
        table = self._table(walk, start, {})
        if not 0 <= row - start < len(table):
            raise Unsupported(f"step {row} of a walk that starts at {start}")
        return table.rows[row - start].input_scale

    def _refuse(self, call: Call) -> None:
        if self._stock_began():
            raise Unsupported(_BEGUN)


def doubled_levels(scheduler: Any, start: int) -> NoiseLevels:
    """The levels of the even steps, from sigmas and timesteps of which most are there twice.

    Args:
        scheduler: With ``sigmas`` and ``timesteps`` set.
        start: The first step of the walk.

    Returns:
        The levels from there on.

    Raises:
        Unsupported: A walk that starts at the second of two steps.
    """
    if start % 2:
        raise Unsupported(f"a walk from step {start}, the second of two")
    first = start // 2
    sigma, times = float64(scheduler.sigmas), float64(scheduler.timesteps)
    steps = (len(times) + 1) // 2
    sigma = torch.cat([sigma[:1], sigma[1::2]])[first : steps + 1]
    return levels_at(scheduler, sigma, times[::2][first:])
