"""Exact sums against Python's fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from diffcore.likelihood.exact import ExactSums, Moments


def numbers(rows: int) -> Tensor:
    """Of all magnitudes and both signs, subnormal ones too, float64 ``[rows, 3]``."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    x *= torch.exp2(torch.empty_like(x).uniform_(-1074, 1020, generator=generator))
    x[:4, 0] = torch.tensor([5e-324, -2.5e-310, 0.0, -0.0], dtype=torch.float64)
    x[:2, 1] = torch.tensor([1.7976931348623157e308, -1.7976931348623157e308], dtype=torch.float64)
    return x


def columns_of(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1]).expand_as(x)


def summed(*parts: Tensor) -> ExactSums:
    sums = ExactSums.zero(3)
    for part in parts:
        sums.add(part, columns_of(part))
    return sums


def test_sums_are_exact_in_any_order_and_parts() -> None:
    x = numbers(300)
    exact = [sum(map(Fraction, column.tolist())) for column in x.unbind(1)]
    scale = 2**1152
    sums = summed(x)
    assert sums.integers() == [e * scale for e in exact]
    assert sums.means([7] * 3).tolist() == [float(e / 7) for e in exact]
    shuffled = x[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    merged = summed(*shuffled[:100].split(1))
    merged.merge(summed(*shuffled[100:].split(31)))
    assert merged.integers() == sums.integers()


def test_sums_of_both_signs_carry() -> None:
    """A sum of 0, one just below it, and many numbers that fill a digit."""
    tiny = torch.tensor([[1.0, -1.0, 2.0**-60]] * 5000, dtype=torch.float64)
    sums = summed(*tiny.split(7))
    sums.merge(summed(-tiny))
    assert sums.integers() == [0, 0, 0]
    sums.add(torch.tensor([-5e-324], dtype=torch.float64), torch.tensor([1]))
    assert sums.means([1] * 3).tolist() == [0.0, -5e-324, 0.0]
    assert summed(tiny, tiny[:, [2, 1, 0]]).means([1] * 3)[0] == 5000 * (1 + 2.0**-60)


def test_numbers_that_are_not_finite() -> None:
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[inf, inf, 1.0], [1.0, -inf, 1.0]], dtype=torch.float64)
    found = summed(rows).means([2] * 3).tolist()
    assert found[0] == inf
    assert math.isnan(found[1])
    assert found[2] == 1.0
    nans = summed(rows, torch.tensor([[1.0, 1.0, nan]], dtype=torch.float64)).means([1] * 3)
    assert nans[2].isnan()
    assert summed().means([0, 0, 0]).isnan().all()
    moments = Moments.zero(3)
    moments.add(rows)
    assert moments.variance_of_mean().isnan().tolist() == [True, True, False]


def test_moments_are_rounded_once() -> None:
    rows = 1e6 + torch.randn(23, 3, generator=torch.Generator().manual_seed(1)).double() / 1e3
    moments, first, rest = (Moments.zero(3) for _ in range(3))
    moments.add(rows)
    first.add(rows[20:])
    for part in rows[:20].split(6):
        rest.add(part)
    rest.merge(first)
    for found in (moments, rest):
        assert found.count == 23
        for c, column in enumerate(rows.unbind(1)):
            exact = list(map(Fraction, column.tolist()))
            mean = sum(exact) / 23
            assert found.mean[c] == float(mean)
            variance = sum((x - mean) ** 2 for x in exact) / 22 / 23
            assert found.variance_of_mean()[c] == float(variance)
    one = Moments.zero(1)
    one.add(rows[:1, :1])
    assert one.variance_of_mean().isnan().all()
