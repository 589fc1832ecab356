"""Noise keys, sampling and likelihoods over several processes: the results of one process."""

from __future__ import annotations

import functools

import pytest

from support.rank_cells import cells
from support.ranks import run_cells

pytestmark = pytest.mark.skipif(
    not pytest.importorskip("torch.distributed").is_available(), reason="no torch.distributed"
)

results = functools.cache(functools.partial(run_cells, "support.rank_cells"))


@pytest.mark.parametrize(("world", "cell"), [(w, name) for w in (2, 3, 4) for name in cells(w)])
def test_ranks_are_one_process(world: int, cell: str) -> None:
    error = results(world)[cell]
    assert not error, error
