"""Ops, losses and loops on DTensors: the values of one rank, by every placement."""

from __future__ import annotations

import functools

import pytest

from support.dtensor_cells import cells
from support.dtensors import PLACEMENTS
from support.ranks import run_cells

pytestmark = pytest.mark.skipif(
    not pytest.importorskip("torch.distributed").is_available(), reason="no torch.distributed"
)

results = functools.cache(functools.partial(run_cells, "support.dtensor_cells"))


@pytest.mark.parametrize(
    ("world", "cell"), [(world, name) for world in PLACEMENTS for name in cells(world)]
)
def test_sharded_is_unsharded(world: int, cell: str) -> None:
    error = results(world)[cell]
    assert not error, error
