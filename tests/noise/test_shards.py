"""Keys of shards: the noise of one box of a tensor, and what every op makes of such a key."""

from __future__ import annotations

import io
import math
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import GaussianDiffusion, PhiloxNoise, make_betas, ops, solvers
from diffcore._engine.window import Window
from diffcore.noise.key import ShardNoise
from diffcore.reference import philox
from support.bounds import assert_law, assert_same_bits, outputs_and_gradients
from support.cases import NOISED, OpCase
from support.refusals import refused

Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # shape, local shape, offset

BATCH = 3
KEYS: list[PhiloxNoise] = [
    PhiloxNoise(5),
    PhiloxNoise(-5, sample_ids=2**63 - 2, stream=7, first_element=2**33),
    PhiloxNoise(torch.tensor([5, 2]), sample_ids=[4, -1, 9], stream=torch.tensor(3)),
    PhiloxNoise(5, sample_ids=torch.tensor(2**40)),
]


def specified(key: PhiloxNoise, shape: tuple[int, ...]) -> Tensor:
    return philox.normals(key._parts, shape, torch.float32, "cpu")


def inside(shape: tuple[int, ...], offset: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def boxes(count: int) -> list[Box]:
    """Random boxes in tensors of 1 to 5 dimensions, at any offset."""
    chance = random.Random(0)
    found = []
    for _ in range(count):
        shape = (BATCH, *(chance.randint(1, 9) for _ in range(chance.randint(0, 4))))
        offset = tuple(chance.randint(0, n - 1) for n in shape)
        local = tuple(chance.randint(1, n - o) for n, o in zip(shape, offset, strict=True))
        found.append((shape, local, offset))
    return found


# ---- bits ----------------------------------------------------------------------------------------


def test_a_shard_has_the_noise_of_its_box() -> None:
    kinds = set()
    for i, (shape, local, offset) in enumerate(boxes(200)):
        key = KEYS[i % len(KEYS)]
        shard = key.for_shard(shape, local, offset)
        wanted = specified(key, shape)[inside(local, offset)]
        assert_same_bits(shard.tensor(local), wanted, f"{key} {shape} {local} {offset}")
        assert_same_bits(shard.tensor(local, dtype=torch.bfloat16), wanted.bfloat16())
        assert_same_bits(
            shard.at(11).tensor(local), specified(key.at(11), shape)[inside(local, offset)]
        )
        kinds.add(type(shard))
    assert kinds == {PhiloxNoise, ShardNoise}


def test_a_shard_of_a_shard() -> None:
    for i, (shape, local, offset) in enumerate(boxes(60)):
        key = KEYS[i % len(KEYS)]
        half = tuple((n + 1) // 2 for n in local)
        rest = tuple(n - h for n, h in zip(local, half, strict=True))
        inner = key.for_shard(shape, local, offset).for_shard(local, half, rest)
        wanted = specified(key, shape)[inside(local, offset)][inside(half, rest)]
        assert_same_bits(inner.tensor(half), wanted)


def test_strips_of_every_dimension_make_up_the_sample() -> None:
    """Frames, rows and columns of a video, cut unevenly."""
    key, shape = PhiloxNoise(3), (2, 3, 5, 6, 7)
    full = specified(key, shape)
    for d in range(5):
        parts, begin = [], 0
        for part in torch.empty(shape).tensor_split(3, dim=d):
            offset = tuple(begin if e == d else 0 for e in range(5))
            if part.numel():
                parts.append(key.for_shard(shape, part.shape, offset).tensor(part.shape))
            begin += part.shape[d]
        assert_same_bits(torch.cat(parts, d), full)


def test_other_samples_of_a_shard() -> None:
    shard = PhiloxNoise(3).for_shard((2, 3, 4, 6), (2, 3, 4, 2), (0, 0, 0, 1))
    ids = [9, 4, 7]
    wanted = specified(PhiloxNoise(3, ids), (3, 3, 4, 6))[..., 1:3]
    assert_same_bits(shard.for_samples(ids).tensor((3, 3, 4, 2)), wanted)
    assert_same_bits(ops.randn((3, 3, 4, 2), shard.for_samples(ids)), wanted)
    out = torch.empty(3, 3, 4, 2).contiguous(memory_format=torch.channels_last)
    assert ops.randn(out.shape, shard.for_samples(ids), out=out) is out
    assert_same_bits(out, wanted)


def test_runs_are_plain_keys() -> None:
    """Kernels generate them in place: whole samples, channels, and rows of one channel."""
    key = PhiloxNoise(3, first_element=8)
    for shape, local, offset, first in (
        ((4, 2, 6, 6), (2, 2, 6, 6), (1, 0, 0, 0), 8),
        ((4, 4, 6, 6), (4, 2, 6, 6), (0, 1, 0, 0), 8 + 36),
        ((4, 1, 6, 6), (4, 1, 3, 6), (0, 0, 2, 0), 8 + 12),
        ((4, 8), (4, 3), (0, 4), 8 + 4),
        ((4,), (2,), (2,), 8),
    ):
        shard = key.for_shard(shape, local, offset)
        assert type(shard) is PhiloxNoise
        assert shard.first_element == first
        assert shard.sample_ids == offset[0]
    assert type(key.for_shard((4, 1, 6, 6), (4, 1, 3, 6), (0, 0, 1, 0))) is ShardNoise
    for local in ((4, 3, 0, 6), (0, 3, 2, 3), (4, 0, 2, 3)):
        nothing = key.for_shard((4, 3, 6, 6), local, (0, 0, 4, 0))
        assert nothing.tensor(local).shape == nothing.uniform(local).shape == local


def test_little_is_generated_for_a_small_shard() -> None:
    """At most the size of the shard (or 2^14 elements) at a time, in few launches."""
    sample = (16, 16, 60, 104)
    for sizes, offset, launches in (
        ((16, 16, 60, 13), (0, 0, 0, 13), 16),
        ((16, 16, 15, 104), (0, 0, 30, 0), 256),
        ((16, 4, 60, 104), (0, 8, 0, 0), 16),
        ((16, 16, 1, 1), (0, 0, 7, 9), 256),
    ):
        starts, piece = Window(sample, offset, sizes).pieces()
        assert math.prod(piece) <= max(math.prod(sizes), 2**14)
        assert len(list(starts)) == launches
    starts, piece = Window((3, 28, 28), (0, 0, 7), (3, 28, 7)).pieces()
    assert (len(list(starts)), piece) == (1, (3, 28, 28))


# ---- every op and route --------------------------------------------------------------------------

SHAPE, LOCAL, OFFSET = (4, 2, 5, 6), (4, 2, 3, 5), (0, 0, 1, 1)


@pytest.mark.parametrize("case", NOISED, ids=lambda case: case.name)
def test_every_op_takes_the_key_of_a_shard(case: OpCase) -> None:
    shard = PhiloxNoise(8, 3, 1).for_shard(SHAPE, LOCAL, OFFSET)
    z = specified(PhiloxNoise(8, 3, 1), SHAPE)[inside(LOCAL, OFFSET)]
    for dtype in (torch.float32, torch.bfloat16):
        args = case.make(LOCAL, dtype)
        assert_law(case, args, shard)
        assert_same_bits(shard.tensor(LOCAL, dtype=dtype), z.to(dtype))
        assert_law(case, args.map(lambda x: x.to(memory_format=torch.channels_last)), shard)
    args = case.make(LOCAL, torch.float32)
    if case.differentiable:
        found, wanted = (outputs_and_gradients(case, case.native, args, n) for n in (shard, z))
        assert_same_bits(found, wanted, case.name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transforms_and_compilers() -> None:
    shard = PhiloxNoise(torch.tensor(8)).for_shard(SHAPE, LOCAL, OFFSET)
    z = specified(PhiloxNoise(8), SHAPE)[inside(LOCAL, OFFSET)]
    x = torch.randn(LOCAL)

    def noised(x: Tensor, noise: Any = shard) -> Tensor:
        return ops.add_noise(x, noise, 0.8, 0.6)

    wanted = noised(x, z)
    assert_same_bits(torch.compile(noised, backend="aot_eager", fullgraph=True)(x), wanted)
    twice = x.expand(2, *LOCAL)
    by_tensor = torch.func.vmap(lambda x: noised(x, z))(twice)
    assert_same_bits(torch.func.vmap(noised)(twice), by_tensor)
    torch.testing.assert_close(by_tensor, wanted.expand(2, *LOCAL))
    y, tangent = torch.func.jvp(noised, (x,), (torch.ones_like(x),))
    assert_same_bits(tangent, torch.full_like(x, 0.8))
    assert_same_bits(torch.func.grad(lambda x: noised(x).sum())(x), torch.full_like(x, 0.8))
    torch.testing.assert_close(y, wanted)

    def made_inside(x: Tensor, seed: Tensor) -> Tensor:
        key = PhiloxNoise(seed).for_shard((len(x), *SHAPE[1:]), x.shape, OFFSET)
        return ops.add_noise(x, key, 0.8, 0.6)

    compiled = torch.compile(made_inside, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(x, torch.tensor(8)), wanted)


@pytest.mark.parametrize("dim", [2, 3])
def test_sampling_loops_of_strips(dim: int) -> None:
    """Each rank samples its rows or columns, with a model that works on single pixels."""
    diffusion = GaussianDiffusion(make_betas("linear", 50, scale_to_1000=True))
    table = solvers.euler_ancestral_table([3.0, 2.0, 1.0, 0.0], prediction_type="sample")
    key, shape = PhiloxNoise(4), (2, 3, 6, 6)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.9 * x

    def images(key: PhiloxNoise, shape: tuple[int, ...]) -> Tensor:
        x = diffusion.p_sample_loop(model, shape, noise=key)
        x += diffusion.ddim_sample_loop(model, shape, num_steps=5, eta=1.0, noise=key)
        return x + diffcore.sample(model, key.tensor(shape) * 3, table, noise=key)

    strips = []
    for begin, size in ((0, 1), (1, 5)):
        local = tuple(size if d == dim else n for d, n in enumerate(shape))
        offset = tuple(begin if d == dim else 0 for d in range(4))
        strips.append(images(key.for_shard(shape, local, offset), local))
    assert_same_bits(torch.cat(strips, dim), images(key, shape))


# ---- a value -------------------------------------------------------------------------------------


def test_shards_as_values() -> None:
    key = PhiloxNoise(8, 3, 1)
    shard = key.for_shard(SHAPE, LOCAL, OFFSET)
    assert isinstance(shard, PhiloxNoise)
    assert shard == key.for_shard(SHAPE, LOCAL, OFFSET) == eval(repr(shard))
    assert hash(shard) == hash(key.for_shard(SHAPE, LOCAL, OFFSET))
    for other in (
        key,
        key.for_shard(SHAPE, LOCAL, (0, 0, 1, 0)),
        shard.at(2),
        shard.for_samples(4),
    ):
        assert shard != other
        assert other != shard
    assert pickle.loads(pickle.dumps(shard)) == shard
    file = io.BytesIO()
    torch.save(shard, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == shard
    assert shard.to("cpu") == shard
    with pytest.raises(AttributeError):
        shard._box = None  # type: ignore[misc, assignment]


def test_wrong_shards() -> None:
    key = PhiloxNoise(0)
    for error, match, args in (
        (ValueError, r"^shape must be \[B, \.\.\.\], got \(\)", ((), (), ())),
        (ValueError, "^local_shape must have the 2 dimensions of shape", ((2, 3), (2,), (0, 0))),
        (ValueError, "^offset must have the 2 dimensions of shape", ((2, 3), (2, 3), (0,))),
        (ValueError, "^offset plus local_shape must be at most", ((2, 3), (2, 3), (0, 1))),
        (ValueError, "^offset must be ", ((2, 3), (2, 3), (0, -1))),
        (TypeError, "^local_shape must be ", ((2, 3), 3, (0, 0))),
        (TypeError, "^shape must be ", ((2, 3.0), (2, 3), (0, 0))),
    ):
        refused(error, match, key.for_shard, *args)
    ids = key.for_samples([0, 1, 2])
    refused(ValueError, "^shape must have 3 samples", ids.for_shard, (2, 4), (2, 4), (0, 0))
    shard = key.for_shard(SHAPE, LOCAL, OFFSET)
    wrong = r"^shape must be that of the noise key's shard, \(B, 2, 3, 5\), got \(B, 2, 5, 6\)"
    refused(ValueError, wrong, shard.tensor, SHAPE)
    refused(ValueError, wrong, shard.for_shard, SHAPE, LOCAL, OFFSET)
    refused(ValueError, wrong, ops.add_noise, torch.zeros(SHAPE), shard, 0.8, 0.6)
    refused(TypeError, "^x0 must ", ops.add_noise, torch.zeros(LOCAL).int(), shard, 0.8, 0.6)
