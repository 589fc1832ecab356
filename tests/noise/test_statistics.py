"""The noise is normal and independent, and the tests that say so would notice if it were not.

A check draws n numbers and returns, for each of its statistics, the probability of one at least as
far from what is expected as the one found. None may be less likely than five sigma of a normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise
from diffcore.reference import philox

stats = pytest.importorskip("scipy.stats")

Draw = Callable[..., Tensor]
Check = Callable[[Draw, int], dict[str, float]]

FIVE_SIGMA = math.erfc(5 / math.sqrt(2))
SLICE = 1 << 22
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 2**32 + 1, 0x9E3779B97F4A7C15]


def draw(shape: tuple[int, ...], seed: int = 2026, **where: Any) -> Tensor:
    return PhiloxNoise(seed, **where).tensor(shape)


def draw_by_specification(shape: tuple[int, ...], seed: int = 2026, **where: Any) -> Tensor:
    names = ("sample_ids", "stream", "first_element")
    sample_ids, stream, first_element = (where.get(name, 0) for name in names)
    noise = (seed, sample_ids, stream, first_element)
    return philox.normals(noise, shape, torch.float32, "cpu")


def slices(draw: Draw, n: int) -> Iterator[Tensor]:
    """n numbers in float64: the beginnings of successive samples of one seed."""
    for sample in range(math.ceil(n / SLICE)):
        size = min(SLICE, n - sample * SLICE)
        yield draw((1, size), sample_ids=sample)[0].double()


# ---- probabilities -----------------------------------------------------------------------------


def of_sigmas(sigmas: float) -> float:
    return math.erfc(abs(sigmas) / math.sqrt(2))


def of_counts(counts: Tensor) -> float:
    """Of how unequal the counts of equally likely events are: Pearson's chi^2, from either side."""
    expected = float(counts.sum()) / counts.numel()
    chi2 = float(((counts - expected) ** 2).sum()) / expected
    law = stats.chi2(counts.numel() - 1)
    return float(2 * min(law.sf(chi2), law.cdf(chi2)))


def bins(z: Tensor, count: int) -> Tensor:
    """Which of `count` equally likely intervals each number is in."""
    return (torch.special.ndtr(z) * count).long().clamp(max=count - 1)


# ---- checks ------------------------------------------------------------------------------------


def moments(draw: Draw, n: int) -> dict[str, float]:
    """E z^k = (k - 1)!! for even k, 0 for odd; z^k has variance E z^2k - (E z^k)^2."""

    def expected(k: int) -> int:
        return 0 if k % 2 else math.prod(range(1, k, 2))

    totals = sum(torch.stack([(z**k).sum() for k in range(1, 7)]) for z in slices(draw, n))
    assert isinstance(totals, Tensor)
    return {
        f"moment {k}": of_sigmas(
            (float(total) / n - expected(k)) / math.sqrt((expected(2 * k) - expected(k) ** 2) / n)
        )
        for k, total in enumerate(totals, 1)
    }


def distribution(draw: Draw, n: int) -> dict[str, float]:
    """Kolmogorov-Smirnov's distance over 2^14 quantiles, and the counts between them."""
    cells = 1 << 14
    counts = sum(torch.bincount(bins(z, cells), minlength=cells) for z in slices(draw, n))
    assert isinstance(counts, Tensor)
    quantiles = torch.arange(1, cells + 1) / cells
    distance = float((counts.cumsum(0).double() / n - quantiles).abs().max())
    return {
        "Kolmogorov-Smirnov": float(stats.kstwobign.sf(distance * math.sqrt(n))),
        "chi squared": of_counts(counts.double()),
    }


def tails(draw: Draw, n: int) -> dict[str, float]:
    """How many numbers are beyond 3, 4, 5 and 6, on each side: a binomial law."""
    ends = torch.tensor([-6.0, -5, -4, -3, 3, 4, 5, 6])
    beyond = torch.zeros(len(ends), dtype=torch.long)
    for z in slices(draw, n):
        beyond += torch.stack([(z * end.sign() > end.abs()).sum() for end in ends])
    found = {}
    for end, count in zip(ends.tolist(), beyond.tolist(), strict=True):
        law = stats.binom(n, math.erfc(abs(end) / math.sqrt(2)) / 2)
        # the law is discrete: the count found belongs to both of its sides
        found[f"beyond {end:g}"] = float(min(1, 2 * min(law.cdf(count), law.sf(count - 1))))
    return found


def features(z: Tensor) -> Tensor:
    """[..., n] to [..., 2, n]: the numbers, and their squares at mean 0 and variance 1."""
    return torch.stack([z, (z * z - 1) / math.sqrt(2)], -2)


def uncorrelated(which: str, products: Tensor, count: int) -> dict[str, float]:
    """Of sums [2, 2] of `count` products of features: independent ones have variance 1."""
    names = ("values", "value and square", "square and value", "squares")
    sigmas = (products.flatten() / math.sqrt(count)).tolist()
    return {f"{which}: {name}": of_sigmas(s) for name, s in zip(names, sigmas, strict=True)}


def neighbours(draw: Draw, n: int) -> dict[str, float]:
    """Numbers 1 to 8 apart are uncorrelated, and so are their squares."""
    lags = range(1, 9)
    totals, count = torch.zeros(len(lags), 2, 2, dtype=torch.float64), 0
    for z in slices(draw, n):
        f = features(z)
        totals += torch.stack([f[:, :-lag] @ f[:, lag:].T for lag in lags])
        count += len(z)
    parts = math.ceil(n / SLICE)
    found = {}
    for lag, total in zip(lags, totals, strict=True):
        found |= uncorrelated(f"lag {lag}", total, count - lag * parts)
    return found


def blocks(draw: Draw, n: int) -> dict[str, float]:
    """Each two of the four numbers of a block: uncorrelated, and even on a 64 x 64 grid."""
    pairs = list(combinations(range(4), 2))
    total = torch.zeros(8, 8, dtype=torch.float64)
    counts = torch.zeros(len(pairs), 64 * 64, dtype=torch.long)
    for z in slices(draw, n):
        columns = z.reshape(-1, 4).T.contiguous()
        f = features(columns).flatten(0, 1)
        total += f @ f.T
        cells = bins(columns, 64)
        for pair, (i, j) in enumerate(pairs):
            counts[pair] += torch.bincount(cells[i] * 64 + cells[j], minlength=64 * 64)
    found = {}
    for pair, (i, j) in enumerate(pairs):
        products = total[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        found |= uncorrelated(f"{i} and {j}", products, n // 4)
        found[f"{i} and {j}: grid"] = of_counts(counts[pair].double())
    return found


def rows(draw: Draw, n: int, sources: list[dict[str, Any]]) -> dict[str, float]:
    """Each two of several draws of n numbers are uncorrelated, number by number."""
    total = torch.zeros(2 * len(sources), 2 * len(sources), dtype=torch.float64)
    size = min(n, SLICE // len(sources))
    for first in range(0, n, size):
        z = [draw((1, size), first_element=first, **source)[0].double() for source in sources]
        f = features(torch.stack(z)).flatten(0, 1)
        total += f @ f.T
    found = {}
    for i, j in combinations(range(len(sources)), 2):
        products = total[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        found |= uncorrelated(f"{sources[i]} and {sources[j]}", products, n)
    return found


def streams(draw: Draw, n: int) -> dict[str, float]:
    return rows(draw, n // 8, [{"stream": s} for s in (0, 1, 2, 3, 1000, 2**16, 2**31, 2**32 - 1)])


def samples(draw: Draw, n: int) -> dict[str, float]:
    ids = [0, 1, 2, 3, 2**31, 2**32, 2**32 + 1, -1]
    return rows(draw, n // 8, [{"sample_ids": i} for i in ids])


def seeds(draw: Draw, n: int) -> dict[str, float]:
    return rows(draw, n // 8, [{"seed": seed} for seed in SEEDS])


CHECKS: list[Check] = [moments, distribution, tails, neighbours, blocks, streams, samples, seeds]


def unlikely(found: dict[str, float]) -> dict[str, float]:
    return {name: p for name, p in found.items() if not p >= FIVE_SIGMA}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "n",
    [
        pytest.param(1 << 22, id="2^22"),
        pytest.param(1 << 25, id="2^25", marks=pytest.mark.slow),
    ],
)
def test_noise_is_normal_and_independent(check: Check, n: int) -> None:
    assert unlikely(check(draw, n)) == {}


@pytest.mark.parametrize("seed", SEEDS)
def test_each_seed_s_noise_is_normal(seed: int) -> None:
    for check in (moments, distribution):
        assert unlikely(check(partial(draw, seed=seed), 1 << 20)) == {}


# ---- what the checks catch ---------------------------------------------------------------------

WORDS = philox.philox4x32
Words = philox.Words
Key = tuple[int, int]


def two_rounds(c: Words, key: Key) -> Words:
    return WORDS(c, key, rounds=2)


def five_rounds(c: Words, key: Key) -> Words:
    return WORDS(c, key, rounds=5)


def one_word_for_two_outputs(c: Words, key: Key) -> Words:
    w0, w1, _, w3 = WORDS(c, key)
    return w0, w1, w0, w3


def one_word_for_radius_and_angle(c: Words, key: Key) -> Words:
    w0, _, w2, w3 = WORDS(c, key)
    return w0, w0, w2, w3


def no_sample(c: Words, key: Key) -> Words:
    nothing = torch.zeros_like(c[2])
    return WORDS((c[0], c[1], nothing, nothing), key)


def no_high_word_of_the_sample(c: Words, key: Key) -> Words:
    return WORDS((c[0], c[1], c[2], torch.zeros_like(c[3])), key)


def no_stream(c: Words, key: Key) -> Words:
    return WORDS((c[0], torch.zeros_like(c[1]), c[2], c[3]), key)


def no_high_word_of_the_seed(c: Words, key: Key) -> Words:
    return WORDS(c, (key[0], 0))


def every_block_twice(c: Words, key: Key) -> Words:
    return WORDS((c[0] >> 1, c[1], c[2], c[3]), key)


def no_root(x: Tensor) -> Tensor:
    return x


def eight_bits(w: Tensor) -> Tensor:
    # no number is larger than sqrt(18 ln 2), 3.5
    return ((w >> 24).float() + 0.5) * 2.0**23


FAULTS: list[tuple[str, Callable[..., Any], Check]] = [
    ("philox4x32", two_rounds, distribution),
    ("philox4x32", five_rounds, samples),
    ("philox4x32", one_word_for_two_outputs, blocks),
    ("philox4x32", one_word_for_radius_and_angle, blocks),
    ("philox4x32", every_block_twice, neighbours),
    ("philox4x32", no_sample, samples),
    ("philox4x32", no_high_word_of_the_sample, samples),
    ("philox4x32", no_stream, streams),
    ("philox4x32", no_high_word_of_the_seed, seeds),
    ("_root", no_root, moments),
    ("_uniform", eight_bits, tails),
]


@pytest.mark.parametrize(
    ("where", "fault", "check"), FAULTS, ids=[f"{f.__name__}-{c.__name__}" for _, f, c in FAULTS]
)
def test_a_broken_generator_is_caught(
    where: str, fault: Callable[..., Any], check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 1 << 19
    assert unlikely(check(draw_by_specification, n)) == {}
    monkeypatch.setattr(philox, where, fault)
    assert unlikely(check(draw_by_specification, n)) != {}
