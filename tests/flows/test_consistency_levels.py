"""Consistency training: the ladder of levels, and the pairs that a key draws from it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from diffcore import PhiloxNoise, consistency

KEY = PhiloxNoise(7, stream=3)


def test_the_ladder_doubles_at_equal_intervals() -> None:
    found = [consistency.num_levels(k, 800_000) for k in range(0, 800_000, 50_000)]
    doubled = [11, 21, 41, 81, 161, 321, 641, 1281]
    assert found == [n for n in doubled for _ in (0, 1)]
    assert consistency.num_levels(99_999, 800_000) == 11
    assert consistency.num_levels(100_000, 800_000) == 21
    assert consistency.num_levels(10**9, 800_000) == 1281  # beyond the end
    assert [consistency.num_levels(k, 6, first=2, last=10) for k in range(6)] == [
        3,
        5,
        9,
        11,
        11,
        11,
    ]
    assert consistency.num_levels(3, 100, first=5, last=5) == 6


def test_levels_are_those_of_the_paper() -> None:
    sigmas = consistency.ladder(18, sigma_min=0.01, sigma_max=50.0, rho=5.0)
    low, high = 0.01 ** (1 / 5), 50.0 ** (1 / 5)
    exact = [(low + i / 17 * (high - low)) ** 5 for i in range(18)]
    assert sigmas.tolist() == pytest.approx(exact, rel=1e-13)
    assert (sigmas[0], sigmas[-1]) == (0.01, 50.0)
    assert torch.equal(consistency.ladder(2), torch.tensor([0.002, 80.0], dtype=torch.float64))


def test_weights_are_parts_of_a_normal_distribution() -> None:
    mpmath = pytest.importorskip("mpmath")
    sigmas = consistency.ladder(40)
    for mean, std in ((-1.1, 2.0), (0.0, 0.3), (-5.0, 1.0)):
        found = consistency.level_weights(sigmas, mean=mean, std=std)
        with mpmath.workdps(250):
            edges = [
                mpmath.erfc(-(mpmath.log(s) - mean) / (std * mpmath.sqrt(2)))
                for s in sigmas.tolist()
            ]
            parts = [b - a for a, b in pairwise(edges)]
            exact = [float(part / sum(parts)) for part in parts]
        assert found.tolist() == pytest.approx(exact, rel=1e-11, abs=1e-300)


@pytest.mark.parametrize("weighted", [False, True])
def test_pairs_are_adjacent_and_have_their_probabilities(weighted: bool) -> None:
    sigmas, batch = consistency.ladder(9, sigma_min=0.1), 40_000
    weights = consistency.level_weights(sigmas) if weighted else None
    low, high = consistency.draw_pair(sigmas, batch, KEY, weights=weights, dtype=torch.float64)
    i = torch.searchsorted(sigmas, low)
    assert torch.equal(sigmas[i], low)
    assert torch.equal(sigmas[i + 1], high)
    counts = torch.bincount(i, minlength=8).double()
    expected = batch * (weights if weighted else torch.full((8,), 1 / 8).double())
    # Chi-square of 7 degrees of freedom: above 29.9 with probability 1e-4; the key is fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 29.9


def test_all_shards_of_a_sample_have_one_pair() -> None:
    sigmas = consistency.ladder(20)
    shard = PhiloxNoise(7, stream=3, first_element=8)
    pairs = (consistency.draw_pair(sigmas, 6, key) for key in (KEY, shard))
    for one, other in zip(*pairs, strict=True):
        assert torch.equal(one, other)


def test_a_replayed_step_has_the_same_levels_and_noise() -> None:
    sigmas = consistency.ladder(20)
    whole = consistency.draw_pair(sigmas, 8, KEY)
    again = consistency.draw_pair(sigmas, 8, PhiloxNoise(7, stream=3))
    part = consistency.draw_pair(sigmas, 3, PhiloxNoise(7, sample_ids=5, stream=3))
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[1], again[1])
    assert torch.equal(whole[0][5:], part[0])
    assert whole[0].dtype == torch.float32
    torch.manual_seed(3)
    first = consistency.draw_pair(sigmas, 50)
    torch.manual_seed(3)
    assert torch.equal(first[0], consistency.draw_pair(sigmas, 50)[0])
    assert not torch.equal(first[0], consistency.draw_pair(sigmas, 50)[0])
    assert consistency.draw_pair(sigmas, 0, KEY)[0].shape == (0,)
