"""All checks of DTensors, for ``support.ranks``."""

from __future__ import annotations

from support import dtensor_methods, dtensor_ops
from support.ranks import Cells


def cells(world: int) -> Cells:
    """The checks for this many ranks, by name."""
    found = dtensor_ops.cells(world) | dtensor_methods.cells(world)
    if world > 2:
        return found
    from support import dtensor_training  # loads the compiler

    return found | dtensor_training.cells(world)
