"""Uniform numbers and timesteps of a key: their bits, and that they are uniform and independent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from diffcore import PhiloxNoise, ops
from diffcore._engine import native
from diffcore.reference import philox
from support.bounds import assert_same_bits
from support.op_case import without_kernels
from support.refusals import refused

stats = pytest.importorskip("scipy.stats")

FIVE_SIGMA = math.erfc(5 / math.sqrt(2))
MASK = 2**32 - 1


def block_of(seed: int, sample: int, stream: int, block: int) -> list[int]:
    """Philox4x32-10 of one counter, in Python's ints."""
    c = [block & MASK, stream, sample & MASK, sample >> 32 & MASK]
    k = [seed & MASK, seed >> 32 & MASK]
    for _ in range(10):
        x, y = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [y >> 32 ^ c[1] ^ k[0], y & MASK, x >> 32 ^ c[3] ^ k[1], x & MASK]
        k = [k[0] + 0x9E3779B9 & MASK, k[1] + 0xBB67AE85 & MASK]
    return c


def bits_of(salt: int, seed: int, sample: int, stream: int, element: int) -> int:
    """The 64 bits of one element."""
    words = block_of((seed ^ salt) % 2**64, sample, stream, element // 2)
    high, low = words[element % 2 * 2 :][:2]
    return high << 32 | low


SEED, IDS, STREAM = -(2**62) - 5, [0, -1, 2**40 + 3], 2**32 - 2
KEY = PhiloxNoise(SEED, IDS, STREAM)


def root_fraction(n: int) -> int:
    """64 bits of the fraction of a square root."""
    return math.isqrt(n << 128) % 2**64


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float64, 53), (torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)],
)
def test_uniform_numbers_are_the_upper_bits(dtype: torch.dtype, precision: int) -> None:
    salt = root_fraction(2)
    for first in (0, 4, 2**33 - 8):
        key = PhiloxNoise(SEED, IDS, STREAM, first)
        wanted = [
            [(bits_of(salt, SEED, i, STREAM, first + e) >> 64 - precision) * 2.0**-precision
             for e in range(5)]
            for i in IDS
        ]  # fmt: skip
        found = key.uniform((3, 5), dtype=dtype)
        assert found.dtype == dtype
        assert found.double().tolist() == wanted
        assert_same_bits(key.uniform((3, 1, 5), dtype=dtype), found.reshape(3, 1, 5))


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 2**31 - 1, 2**31])
def test_timesteps_are_the_upper_part_of_64_bits_times_t(count: int) -> None:
    wanted = [bits_of(root_fraction(7), SEED, i, STREAM, 0) * count >> 64 for i in IDS]
    found = KEY.timesteps(count, 3)
    assert found.dtype == torch.int64
    assert found.tolist() == wanted
    shard = KEY.for_shard((3, 4, 6), (3, 4, 3), (0, 0, 1))
    for other in (shard, PhiloxNoise(SEED, IDS, STREAM, 8)):
        assert other.timesteps(count, 3).tolist() == wanted  # of the sample, not of the shard


def test_integers_have_bounds_of_their_own() -> None:
    bounds = torch.tensor([1, 7, 2**31, 5])
    words = philox.pairs(KEY._parts, torch.arange(4), 3, philox.INTEGER_SALT)
    found = philox.integers(words, bounds)
    salt = root_fraction(7)
    assert found.tolist() == [
        [bits_of(salt, SEED, i, STREAM, e) * b >> 64 for e, b in enumerate(bounds.tolist())]
        for i in IDS
    ]


KEYS = {
    "numbers": PhiloxNoise(2**63 + 5, 2**63 - 2, 2**32 - 1),
    "ids": PhiloxNoise(-1, torch.tensor([5, -1, 0, 7, 2**40, 3])[::2]),
    "first id": PhiloxNoise(-1, torch.tensor(-2)),
    "seed": PhiloxNoise(torch.tensor([-(2**62)]), stream=torch.tensor([2**33 + 1])),
    "seed and offset": PhiloxNoise(torch.tensor([3, 2**32 - 1]), stream=7, first_element=400),
}


@pytest.mark.skipif(native._C is None, reason="the formulas are what there is")
@pytest.mark.parametrize("name", KEYS)
def test_a_cpu_takes_its_words_from_the_compiled_module(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = KEYS[name]
    with without_kernels():
        steps, u = key.timesteps(10**9, 3), key.uniform((3, 7), dtype=torch.float64)
        few = key.uniform((3, 0))
    monkeypatch.setattr(philox, "philox4x32", None)  # which nothing calls from here on
    for device in (None, "cpu"):
        assert torch.equal(key.timesteps(10**9, 3, device=device), steps)
        found = key.uniform((3, 7), dtype=torch.float64, device=device)
        assert torch.equal(found, u)
    assert found.is_contiguous()
    assert key.uniform((3, 0)).shape == few.shape


def test_words_are_refused_by_reason() -> None:
    fill, parts = native._C.fill_words, (1, 0, 0, 0)
    for out in (torch.zeros(2, 3), torch.zeros(2, 6).long(), torch.zeros(8).long(),
                torch.zeros(4, 2).long().T, torch.zeros(2, 4).long().to("meta"), None):  # fmt: skip
        assert fill(out, parts, 0) is not None
    out = torch.zeros(2, 4).long()
    freed = torch.zeros(2).long()
    freed.untyped_storage().resize_(0)
    for wrong in ((freed, 0, 0, 0), (1, torch.zeros(3).long(), 0, 0), (1, 0, torch.zeros(1), 0),
                  (1, 0, 0, 2), (1, 0, 0, 2**34 + 4), (1, out[:, 0], 0, 0), (1, 2, 3)):  # fmt: skip
        assert fill(out, wrong, 0) is not None
    assert not out.any()


def test_a_range() -> None:
    u = KEY.uniform((3, 50), dtype=torch.float64)
    assert torch.equal(KEY.uniform((3, 50), -2.0, 3.0, dtype=torch.float64), -2.0 + 5.0 * u)
    single = KEY.uniform((3, 50), -2.0, 3.0)
    assert torch.equal(single, (-2.0 + 5.0 * KEY.uniform((3, 50)).double()).float())
    assert torch.equal(KEY.uniform((3, 50), high=0.5), 0.5 * KEY.uniform((3, 50)))


@pytest.mark.parametrize("made", ["uniform", "timesteps"])
def test_neither_batch_nor_kind_of_key_matters(made: str) -> None:
    def of(key: PhiloxNoise, batch: int) -> Tensor:
        return key.uniform((batch, 3)) if made == "uniform" else key.timesteps(10**6, batch)

    key = PhiloxNoise(9, 5, 3)
    full = of(key, 6)
    ids = torch.arange(5, 11)
    for same in (
        torch.cat([of(key.for_samples(5 + i), 1) for i in range(6)]),
        of(key.for_samples(ids.flip(0)), 6).flip(0),
        of(PhiloxNoise(torch.tensor([9, 1]), torch.tensor(5), torch.tensor(2)), 6),
        torch.func.vmap(lambda i: of(key.for_samples(i.reshape(1)), 1))(ids).flatten(0, 1),
        torch.compile(
            lambda i: of(key.for_samples(i), i.shape[0]), backend="eager", fullgraph=True
        )(ids),
    ):
        assert torch.equal(same, full)
    for other in (key.at(4), key.for_samples(6), PhiloxNoise(8, 5, 3)):
        assert not torch.equal(of(other, 6), full)
    assert of(key, 0).shape[0] == 0


def test_one_compilation_for_every_batch_size_and_stream() -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(x: Tensor, stream: int) -> tuple[Tensor, ...]:
        key = PhiloxNoise(torch.tensor(9)).at(stream).for_samples(x.shape[0])
        return key.timesteps(1000, x.shape[0]), key.uniform((x.shape[0],)), key.tensor(x.shape)

    for batch, stream in ((3, 5), (4, 6), (7, 9)):
        key = PhiloxNoise(9, sample_ids=batch, stream=stream)
        wanted = key.timesteps(1000, batch), key.uniform((batch,)), key.tensor((batch, 4))
        assert_same_bits(step(torch.zeros(batch, 4), stream), wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict: bool) -> None:
    class Draws(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            key = PhiloxNoise(9).for_samples(x.shape[0])
            noised = ops.add_noise(x, key.at(x.shape[0]), 0.8, 0.6)
            return key.timesteps(1000, x.shape[0]), key.uniform((x.shape[0],)), noised

    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        Draws(), (torch.zeros(5, 3),), dynamic_shapes=({0: batch},), strict=strict
    )
    x = torch.randn(7, 3)
    assert_same_bits(exported.module()(x), Draws()(x))


def test_where_they_are() -> None:
    nowhere = torch.zeros(3, dtype=torch.int64, device="meta")
    assert PhiloxNoise(0, nowhere).timesteps(5, 3).device.type == "meta"
    assert PhiloxNoise(0, nowhere).uniform((3, 2)).device.type == "meta"
    assert PhiloxNoise(0).timesteps(5, 3, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert PhiloxNoise(0).uniform((3, 2)).device.type == "meta"
        found = PhiloxNoise(0).timesteps(5, 3, device="cpu")
    assert torch.equal(found, PhiloxNoise(0).timesteps(5, 3))


# ---- statistics ----------------------------------------------------------------------------------

N = 100_000


@pytest.mark.parametrize("count", [2, 3, 10, 1000])
def test_timesteps_are_uniform(count: int) -> None:
    t = PhiloxNoise(1).timesteps(count, N)
    assert stats.chisquare(torch.bincount(t, minlength=count).numpy()).pvalue > FIVE_SIGMA
    assert t.max() == count - 1


def test_uniform_numbers_are_uniform() -> None:
    u = PhiloxNoise(1).uniform((N // 50, 50), dtype=torch.float64)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > FIVE_SIGMA
    assert (u >= 0).all()
    assert (u < 1).all()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert (PhiloxNoise(1).uniform((N // 50, 50), dtype=dtype) < 1).all()


def test_noise_uniform_numbers_and_timesteps_of_a_key_are_independent() -> None:
    """Also of neighboring samples, streams and seeds: by the counts of 8 by 8 cells."""
    key, count = PhiloxNoise(1), N // 4
    u, t = key.uniform((count,), dtype=torch.float64), key.timesteps(2**20, count) / 2**20
    normals = torch.special.ndtr(key.tensor((count, 4)).double()).unbind(1)
    others = [
        u.roll(1), t.roll(1), key.at(1).timesteps(2**20, count) / 2**20,
        key.at(1).uniform((count,)), PhiloxNoise(2).uniform((count,)),
        PhiloxNoise(0).timesteps(2**20, count) / 2**20,
    ]  # fmt: skip
    pairs: list[Any] = [(u, t), *((u, x) for x in others), *((t, x) for x in others)]
    pairs += [(x, z) for x in (u, t) for z in normals]
    assert len(pairs) == 21
    for a, b in pairs:
        cells = (a * 8).long().clamp(max=7) * 8 + (b * 8).long().clamp(max=7)
        counts = torch.bincount(cells, minlength=64)
        assert stats.chisquare(counts.numpy()).pvalue > FIVE_SIGMA


# ---- mistakes ------------------------------------------------------------------------------------


def test_mistakes() -> None:
    key = PhiloxNoise(0)
    refused(ValueError, "^num_timesteps must be at least 1, got 0", key.timesteps, 0, 3)
    refused(ValueError, r"^num_timesteps must be at most 2\^31, got", key.timesteps, 2**31 + 1, 3)
    refused(TypeError, "^num_timesteps must be an int, got float", key.timesteps, 10.0, 3)
    refused(ValueError, "^batch must be ", key.timesteps, 10, -1)
    refused(TypeError, "^batch must be ", key.timesteps, 10, (3,))
    refused(TypeError, "^shape must be ", key.uniform, 3)
    refused(TypeError, "^dtype must be ", key.uniform, (3,), dtype=torch.int64)
    refused(ValueError, "^sample_ids must have 4 entries", KEY.timesteps, 10, 4)
    refused(ValueError, "^sample_ids must have 4 entries", KEY.uniform, (4, 2))
    far = PhiloxNoise(0, first_element=2**33)
    refused(ValueError, "^shape must end before element", far.uniform, (3, 4))
