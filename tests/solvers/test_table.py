"""A solver table is data: it can be pickled, copied and compared by identity."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from support.solver_list import ALL

SIGMAS = [10.0, 4.0, 1.0, 0.3, 0.0]


@pytest.mark.parametrize("name", ["heun", "dpmpp-3m", "ddpm"])
def test_tables_can_be_pickled_and_copied(name: str) -> None:
    table = ALL[name](SIGMAS)
    table.to("meta")
    x, m = torch.randn(2, 3, 5)
    history = (m,) * table.history
    expected, _ = table.step(1, x, m, history, noise=m)
    state = pickle.dumps(table)
    assert b"Plan" not in state  # kernels are planned again, not stored
    for again in (pickle.loads(state), copy.deepcopy(table), copy.copy(table)):
        assert again.rows == table.rows
        assert again != table
        assert torch.equal(again.step(1, x, m, history, noise=m)[0], expected)
