"""The arithmetic of the noise: Philox's known answers, and how far its normals are from exact ones.

Errors are in units of the last place of the exact value, the exact value computed in float64 from
the very float32 (or word) that the function was given. The numbers asserted are those documented.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore.reference import philox
from diffcore.testing import ulp

# The largest errors over every argument there is, rounded up: as in docs/numerics.md.
LARGEST_ERROR = {
    "minus_two_log": 1.96,
    "radius": 1.52,
    "sin": 0.77,
    "cos": 1.65,
    "sin_of_bits": 2.76,
    "cos_of_bits": 2.44,
}
# The integer is rounded to 24 bits, then the half is added: of 2^24 + ..., no more than 3/2.
UNIFORM_ERROR = 1.5 * 2**-24
TURN = 2 * np.pi / 2**32
SLICE = 1 << 17  # its float64 temporaries stay in the cache


def worst(got: Tensor, exact: np.ndarray) -> float:
    """The largest error in ulp; where the exact value is 0, nothing else will do."""
    zero = exact == 0
    assert (got.numpy()[zero] == 0).all()
    # frexp of longdouble, in diffcore.testing.ulp, takes minutes over all arguments.
    spacing = np.spacing(np.abs(exact[~zero]).astype(np.float32)).astype(np.float64)
    return float(
        (np.abs(got.numpy()[~zero].astype(np.float64) - exact[~zero]) / spacing).max(initial=0)
    )


# ---- arguments -------------------------------------------------------------------------------


def pattern(x: float) -> int:
    return int(np.float32(x).view(np.int32))


def floats(low: float, high: float, every: int) -> Iterator[Tensor]:
    """Every `every`-th float32 of [low, high], and 256 next to each end, in slices."""
    first, last = pattern(low), pattern(high)
    edges = torch.cat([torch.arange(first, first + 256), torch.arange(last - 255, last + 1)])
    yield edges.to(torch.int32).view(torch.float32)
    for start in range(first, last + 1, SLICE * every):
        stop = min(start + SLICE * every, last + 1)
        yield torch.arange(start, stop, every, dtype=torch.int32).view(torch.float32)


def uniforms(every: int) -> Iterator[Tensor]:
    """2^31 u: of [1/2, 2^31], with the ends of every binade and of its reduction."""
    yield from floats(0.5, 2.0**31, every)
    near = torch.arange(-256, 257, dtype=torch.int32)
    for power in range(31):
        yield (near + pattern(2.0**power)).view(torch.float32)
        yield (near + pattern(2.0**power * np.sqrt(0.5))).view(torch.float32)


def integers_of_angles(every: int) -> Iterator[Tensor]:
    """The lower 30 bits of words, for angles of [-pi/4, 0] as integers of [-2^29, 0].

    An angle is rounded to 24 bits, so beyond 2^25 at least four integers have one float32. The
    functions are monotonic: of these integers one of the outermost has the largest error.
    """
    yield torch.arange(-(2**16), 1)
    least = -(2**29) if every > 1 else -(2**25)
    for start in range(least, 0, SLICE * every):
        yield torch.arange(start, min(start + SLICE * every, 0), every)
    if every > 1:
        return
    for power in range(25, 29):
        apart = 2 ** (power - 23)
        for first in range(2**power, 2 ** (power + 1), SLICE * apart):
            tie = torch.arange(first, first + SLICE * apart, apart) + apart // 2
            yield from (-tie - 1, -tie, -tie + 1)


def quick_or_all(stride: int) -> pytest.MarkDecorator:
    cases = [
        pytest.param(stride, id=f"every-{stride}th"),
        pytest.param(1, id="all", marks=pytest.mark.slow),
    ]
    return pytest.mark.parametrize("every", cases)


# ---- the functions ---------------------------------------------------------------------------


@pytest.mark.slow
@quick_or_all(997)
def test_log_and_radius(every: int) -> None:
    log_error, radius_error = [], []
    for s in uniforms(every):
        u = s.double().numpy() * 2.0**-31
        # Beyond 1/2 u - 1 is exact; few slices have numbers on both sides.
        exact = -2 * (
            np.log(u) if u.max() <= 0.5 else np.where(u > 0.5, np.log1p(u - 1), np.log(u))
        )
        computed = philox._minus_two_log(s)
        assert (computed >= 0).all()
        log_error.append(worst(computed, exact))
        radius_error.append(worst(philox._root(computed), np.sqrt(exact)))
    assert max(log_error) <= LARGEST_ERROR["minus_two_log"]
    assert max(radius_error) <= LARGEST_ERROR["radius"]
    if every == 1:  # nor are the documented numbers larger than what is there
        assert max(log_error) > LARGEST_ERROR["minus_two_log"] - 0.01
        assert max(radius_error) > LARGEST_ERROR["radius"] - 0.01


@pytest.mark.slow
@quick_or_all(37)
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sine_and_cosine_of_a_float(name: str, every: int) -> None:
    function, exact = getattr(philox, f"_{name}"), getattr(np, name)
    largest = float(np.float32(2**29) * np.float32(TURN))
    found = max(worst(function(x), exact(x.double().numpy())) for x in floats(1e-6, largest, every))
    assert found <= LARGEST_ERROR[name]
    assert every > 1 or found > LARGEST_ERROR[name] - 0.01


@pytest.mark.slow
@quick_or_all(499)
def test_sine_and_cosine_of_thirty_bits(every: int) -> None:
    sin_error, cos_error = [], []
    for r in integers_of_angles(every):
        x = philox._angle(r & philox.MASK)
        angle = r.double().numpy() * TURN
        sin_error.append(worst(philox._sin(x), np.sin(angle)))
        cos_error.append(worst(philox._cos(x), np.cos(angle)))
    assert max(sin_error) <= LARGEST_ERROR["sin_of_bits"]
    assert max(cos_error) <= LARGEST_ERROR["cos_of_bits"]
    if every == 1:
        assert max(sin_error) > LARGEST_ERROR["sin_of_bits"] - 0.01
        assert max(cos_error) > LARGEST_ERROR["cos_of_bits"] - 0.01


def test_angles_of_either_sign_are_alike() -> None:
    r = torch.cat([torch.arange(1, 1 << 16), torch.arange(1, 2**29, 10_007)])
    x, minus_x = philox._angle(r), philox._angle(-r & philox.MASK)
    assert torch.equal(minus_x, -x)
    assert torch.equal(philox._cos(minus_x), philox._cos(x))
    assert torch.equal(philox._sin(minus_x), -philox._sin(x))


def test_quarters_exchange_and_negate() -> None:
    v = torch.cat([torch.arange(2**16), torch.arange(0, 2**30, 1_000_003), torch.tensor([2**29])])
    w = torch.randint(2**32, v.shape)
    cos, sin = philox.box_muller(w, v)
    for quarter, expected in enumerate([(cos, sin), (sin, cos), (-cos, -sin), (-sin, -cos)]):
        for a, b in zip(philox.box_muller(w, v + (quarter << 30)), expected, strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_uniforms_are_rounded_from_31_bits() -> None:
    around = torch.tensor([2**k + d for k in range(33) for d in range(-300, 301)])
    w = around[(around >= 0) & (around <= philox.MASK)]
    w = torch.cat([w, torch.randint(2**32, (1_000_000,))])
    exact = w.numpy() // 2 + 0.5
    moved = philox._uniform(w).double().numpy() / exact - 1
    assert np.abs(moved).max() <= UNIFORM_ERROR
    assert (moved[w.numpy() < 2**24] == 0).all()
    assert float(philox._uniform(torch.tensor(philox.MASK))) == 2.0**31


def test_root_is_correctly_rounded() -> None:
    x = torch.cat([philox._minus_two_log(s) for s in uniforms(99_991)])
    np.testing.assert_array_equal(philox._root(x).numpy(), np.sqrt(x.numpy()))


def test_largest_and_smallest_normal() -> None:
    w = torch.tensor([0, 2**32 - 1])
    (largest, none), _ = philox.box_muller(w, torch.tensor([0, 0]))
    assert abs(float(largest) - np.sqrt(64 * np.log(2))) <= 2 * ulp(largest, torch.float32)
    assert none == 0


def test_errors_are_the_documented_ones() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text(encoding="utf-8")
    section = docs.split("## Normal numbers")[1].split("\n## ")[0]
    table = sorted(map(float, re.findall(r"\| (\d\.\d\d) \|", section)))
    assert table == sorted(LARGEST_ERROR.values())
    for error in LARGEST_ERROR.values():
        assert f"{error:.2f}" in str(philox.__doc__)


# ---- the generator ---------------------------------------------------------------------------

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # of the Random123 distribution: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("as_tensors", [False, True], ids=["int-key", "tensor-key"])
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...], as_tensors: bool
) -> None:
    c0, c1, c2, c3 = map(torch.tensor, counter)
    k0, k1 = map(torch.tensor, key) if as_tensors else key
    found = philox.philox4x32((c0, c1, c2, c3), (k0, k1))
    assert tuple(int(word) for word in found) == words


def numpy_words(seed: int, sample: int, stream: int, blocks: np.ndarray) -> list[np.ndarray]:
    """Philox4x32-10 once more, in uint64, which holds a product of two words."""
    word = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c = [np.broadcast_to(np.uint64(n & 0xFFFFFFFF), blocks.shape) for n in (stream, sample)]
    c = [blocks & word, c[0], c[1], np.full_like(blocks, sample >> 32 & 0xFFFFFFFF)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(q >> half) ^ c[1] ^ key[0], q & word, (p >> half) ^ c[3] ^ key[1], p & word]
        key = [k + np.uint64(s) & word for k, s in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return c


def numpy_normals(
    seed: int, sample: int, stream: int, first: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Normals in float64, and how far float32 ones may be from each.

    u is rounded to float32, which moves -2 ln u by no more than d, twice u's relative error, so the
    radius R by no more than d / R, or sqrt(d). The rest is relative: the radius, the cosine or
    sine, and half an ulp of their product, an ulp being no more than 2^-23 of a number.
    """
    blocks = np.arange(first // 4, (first + size + 3) // 4, dtype=np.uint64)
    words = numpy_words(seed, sample, stream, blocks)
    relative = 2**-23 * (0.5 + LARGEST_ERROR["radius"] + LARGEST_ERROR["sin_of_bits"])
    relative += relative**2
    d = 2 * UNIFORM_ERROR / (1 - UNIFORM_ERROR)
    z, bound = [], []
    for w, v in (words[:2], words[2:]):
        u = ((w >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-31
        radius = np.sqrt(-2 * np.where(u > 0.5, np.log1p(u - 1), np.log(u)))
        bits = (v % np.uint64(2**30)).astype(np.float64)
        x = np.where(bits < 2**29, bits, bits - 2**30) * TURN
        exchanged = (v >> np.uint64(30)) % np.uint64(2) == 1
        sign = np.where(v >> np.uint64(31) == 1, -1, 1)
        for circle in np.where(exchanged, (np.sin(x), np.cos(x)), (np.cos(x), np.sin(x))):
            moved = np.minimum(d / radius, np.sqrt(d)) * np.abs(circle)
            z.append(sign * radius * circle)
            bound.append(moved + relative * (np.abs(z[-1]) + moved))
    return np.stack(z, -1).reshape(-1)[:size], np.stack(bound, -1).reshape(-1)[:size]


@pytest.mark.parametrize(
    ("seed", "sample", "stream", "first"),
    [
        (0, 0, 0, 0),
        (2**63 - 1, 2**40 + 3, 2**32 - 1, 4),
        (-5, -1, 77, 2**34 - 4000),
        (2**64 - 3, 1, 2, 12),
    ],
)
def test_normals_are_those_of_numpy(seed: int, sample: int, stream: int, first: int) -> None:
    size = 100_003
    noise = (seed, sample, stream, first)
    drawn = philox.normals(noise, (2, size), torch.float32, "cpu").double().numpy()
    for row in range(2):
        exact, bound = numpy_normals(seed, sample + row, stream, first, size)
        assert (np.abs(drawn[row] - exact) <= bound).all()
        assert np.median(bound) < 1e-6


def test_a_seed_tensor_s_offset_counts_streams() -> None:
    seed, stream = torch.tensor([9, 2**32 - 2]), torch.tensor([5])
    a = philox.normals((seed, 0, stream, 0), (2, 9), torch.float32, "cpu")
    b = philox.normals((9, 0, 3, 0), (2, 9), torch.float32, "cpu")
    assert torch.equal(a, b)


@pytest.mark.parametrize("batched", ["seed", "sample_ids", "stream"])
def test_normals_under_vmap(batched: str) -> None:
    values = torch.tensor([3, 2**32 - 1, -7])

    def drawn(value: Tensor) -> Tensor:
        noise = {"seed": 1, "sample_ids": 2, "stream": 3} | {batched: value}
        return philox.normals((*noise.values(), 4), (2, 5), torch.float32, "cpu")

    assert torch.equal(torch.func.vmap(drawn)(values), torch.stack([drawn(v) for v in values]))
