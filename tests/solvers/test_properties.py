"""What holds for every solver along any levels, by examples that hypothesis makes up."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffcore.sampling import sample
from support.bounds import assert_same_bits
from support.solver_list import ALL, DETERMINISTIC, PATHS, levels_on
from support.walking import walk

each_example = settings(deadline=None, derandomize=True, max_examples=10)
# The logarithm of sigma / alpha at the end, and how much it falls in each step.
ends = st.floats(-3.0, 1.0)
falls = st.lists(st.floats(0.02, 2.0), min_size=1, max_size=6)


def ratios_of(end: float, falls: list[float], to_zero: bool) -> Tensor:
    logs = end + torch.tensor([*falls, 0.0], dtype=torch.float64).flip(0).cumsum(0).flip(0)
    return torch.cat([logs.exp(), torch.zeros(int(to_zero), dtype=torch.float64)])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DETERMINISTIC)
@each_example
@given(end=ends, falls=falls, to_zero=st.booleans())
def test_a_model_that_is_certain_of_x0_is_followed_exactly(
    name: str, path: str, end: float, falls: list[float], to_zero: bool
) -> None:
    levels = levels_on(path, ratios_of(end, falls, to_zero))
    table = DETERMINISTIC[name](levels, prediction_type="sample")
    x0, noise = torch.tensor([[0.4, -1.3]]).double(), torch.tensor([[1.1, 0.2]]).double()
    # The noise of x stays what it was, at any level.
    start, wanted = (levels.alpha[i] * x0 + levels.sigma[i] * noise for i in (0, -1))
    found = walk(table, lambda x, t: x0, start)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
@each_example
@given(path=st.sampled_from(PATHS), end=ends, falls=falls, to_zero=st.booleans())
def test_a_pickled_table_steps_to_the_same_bits(
    name: str, path: str, end: float, falls: list[float], to_zero: bool
) -> None:
    table = ALL[name](levels_on(path, ratios_of(end, falls, to_zero)))
    # time_of may be a function that cannot be pickled; the table does not keep it.
    again = pickle.loads(pickle.dumps(table))
    noise = torch.randn(len(table), 1, 3, dtype=torch.float64)
    x = torch.randn(1, 3, dtype=torch.float64)
    found = [
        sample(lambda x, t: torch.tanh(x), x, one, noise=lambda row, x: noise[row])
        for one in (table, again)
    ]
    assert_same_bits(*found)
