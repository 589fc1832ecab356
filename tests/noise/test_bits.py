"""The bits of the noise: the kernels give those of the specification, `diffcore.reference.philox`.

On every device, in every dtype, layout, batch, shard and number of threads; `test_isa_threads` has
the instruction sets.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from diffcore.reference import philox
from support.bounds import DTYPES, assert_same_bits, each_dtype
from support.layouts import DENSE, OTHER, Layout, inside
from support.refusals import refused

SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, 2**32 - 1, 2**32, -(2**32), 0x9E3779B97F4A7C15)
IDS = (0, 1, -1, 2**32 - 1, 2**32, -(2**32), 2**63 - 1, -(2**63), 5)

# No dimension, no elements, one; around blocks (4), draws (16 ... 64), tiles (512), what is drawn
# at once (2048) and chunks (8192), with few rows or more than are drawn at once.
SHAPES = (
    *((), (0,), (1,), (5,), (130,), (0, 7), (5, 0), (2, 0, 3), (1, 1), (2, 3, 1, 4)),
    *((rows, n) for n in (1, 2, 3, 4, 5, 7, 8, 9) for rows in (1, 37)),
    *((5, n) for n in (15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 511, 513)),
    *((2, n) for n in (2047, 2048, 2049, 8191, 8193, 16387)),
)


def specified(key: PhiloxNoise, shape: tuple[int, ...]) -> Tensor:
    """The noise in float32, in plain torch on the CPU."""
    parts = tuple(p.cpu() if isinstance(p, Tensor) else p for p in key._parts)
    return philox.normals(parts, shape, torch.float32, "cpu")


def check(key: PhiloxNoise, shape: tuple[int, ...], device: str) -> None:
    assert_same_bits(key.tensor(shape, device=device), specified(key, shape), f"{key}")


# ---- shapes and dtypes --------------------------------------------------------------------------


@each_dtype
def test_every_shape(dtype: torch.dtype, device: str) -> None:
    key = PhiloxNoise(-7, sample_ids=2**32 - 3, stream=5)
    for shape in SHAPES:
        z = key.tensor(shape, dtype=dtype, device=device)
        assert (z.shape, z.dtype, z.device.type) == (shape, dtype, device)
        assert_same_bits(z, specified(key, shape).to(dtype), f"{shape}")


def test_defaults_of_the_dtype_and_the_device(device: str) -> None:
    assert PhiloxNoise(0).tensor((2, 3)).dtype == torch.float32
    assert PhiloxNoise(torch.tensor(0, device=device)).tensor((2, 3)).device.type == device
    ids = torch.arange(2, device=device)
    assert PhiloxNoise(0, sample_ids=ids).tensor((2, 3)).device.type == device
    torch.set_default_dtype(torch.float64)
    try:
        assert_same_bits(PhiloxNoise(0).tensor((2, 3)), specified(PhiloxNoise(0), (2, 3)).double())
    finally:
        torch.set_default_dtype(torch.float32)


def test_randn_is_the_keys_tensor(device: str) -> None:
    key = PhiloxNoise(3, stream=4)
    for dtype in DTYPES:
        wanted = key.tensor((3, 5), dtype=dtype, device=device)
        assert_same_bits(ops.randn((3, 5), key, dtype=dtype, device=device), wanted)
        out = torch.empty(3, 5, dtype=dtype, device=device)
        assert ops.randn([3, 5], key, out=out) is out
        assert_same_bits(out, wanted)


# ---- seeds, samples, streams, shards ------------------------------------------------------------


def test_every_form_of_seed(device: str) -> None:
    found = {}
    for seed in SEEDS:
        value = seed - 2**64 if seed >= 2**63 else seed
        wanted = specified(PhiloxNoise(seed), (3, 9))
        for form in (
            seed,
            value,
            torch.tensor(value, device=device),
            torch.tensor([value], device=device),
            torch.tensor([value, 0], device=device),
            torch.tensor([0, value, 0, 7], device=device)[1::2][:1],
            torch.tensor([seed % 2**64, 0], dtype=torch.uint64).to(device),
        ):
            assert_same_bits(PhiloxNoise(form).tensor((3, 9), device=device), wanted, f"{form}")
        found[value] = wanted
    for a, b in itertools.combinations(found.values(), 2):
        assert not torch.isclose(a, b, rtol=0, atol=1e-6).any()


def test_a_key_has_an_offset_that_is_added_to_the_stream(device: str) -> None:
    for offset, stream, at in ((6, 0, 6), (6, 3, 9), (2**32 - 1, 3, 2), (-1, 0, 2**32 - 1)):
        wanted = specified(PhiloxNoise(9, stream=at), (3, 9))
        key = torch.tensor([9, offset], device=device)
        streams = (stream, torch.tensor(stream, device=device), torch.tensor([stream]).to(device))
        for form in streams:
            assert_same_bits(PhiloxNoise(key, stream=form).tensor((3, 9)), wanted)
        apart = torch.tensor([9, 0, offset], device=device)[::2]
        assert_same_bits(PhiloxNoise(apart, stream=stream).tensor((3, 9)), wanted)
    twice = torch.tensor([9], device=device).expand(2)
    assert_same_bits(PhiloxNoise(twice).tensor((3, 9)), specified(PhiloxNoise(9, stream=9), (3, 9)))


def test_keys_of_torch(device: str) -> None:
    keys = pytest.importorskip("torch.func._random", reason="this torch has no keys")
    key = keys.key(2**63 + 11, device=device)
    assert_same_bits(PhiloxNoise(key).tensor((3, 9)), specified(PhiloxNoise(2**63 + 11), (3, 9)))


@pytest.mark.parametrize("columns", [1, 9, 700])
def test_every_form_of_sample_ids(columns: int, device: str) -> None:
    key, ids = PhiloxNoise(3), torch.tensor(IDS)
    each = [specified(key.for_samples(i), (1, columns))[0] for i in IDS]
    on_device = ids.to(device)
    n = len(IDS)
    forms = {
        "contiguous": on_device,
        "strided": torch.stack([on_device, on_device + 1], 1)[:, 0],
        "reversed": on_device.flip(0),
        "offset": torch.cat([on_device[:1], on_device])[1:],
    }
    for name, form in forms.items():
        wanted = torch.stack(each if name != "reversed" else each[::-1])
        z = key.for_samples(form).tensor((n, columns), device=device)
        assert_same_bits(z, wanted, name)
    one = key.for_samples(on_device[2].expand(n)).tensor((n, columns))
    assert_same_bits(one, each[2].expand(n, columns))


@pytest.mark.parametrize("first", [0, 5, 2**32 - 2, -2, -(2**63), 2**63 - 2])
def test_sample_ids_that_count(first: int, device: str) -> None:
    key = PhiloxNoise(3).for_samples(first)
    rows = [(first + i + 2**63) % 2**64 - 2**63 for i in range(40)]
    wanted = specified(key.for_samples(torch.tensor(rows)), (40, 6))
    for form in (key, key.for_samples(torch.tensor(first, device=device))):
        assert_same_bits(form.tensor((40, 6), device=device), wanted)
        assert_same_bits(form.tensor((40,), device=device), wanted[:, 0])
    if first == 0:
        assert_same_bits(key.for_samples(None).tensor((40, 6), device=device), wanted)
        assert_same_bits(key.tensor((), device=device), wanted[0, 0])


def test_every_form_of_stream(device: str) -> None:
    wanted = {s: specified(PhiloxNoise(3, stream=s), (2, 9)) for s in (0, 1, 7, 2**31, 2**32 - 1)}
    for stream, z in wanted.items():
        for form in (
            stream,
            torch.tensor(stream, device=device),
            torch.tensor([5, stream], device=device)[1:],
            torch.tensor(stream + 2**32, device=device),  # low 32 bits
            torch.tensor(stream - 2**40, device=device),
        ):
            key = PhiloxNoise(3).at(form)
            assert_same_bits(key.tensor((2, 9), device=device), z, f"{form}")
    for a, b in itertools.combinations(wanted.values(), 2):
        assert not torch.isclose(a, b, rtol=0, atol=1e-6).any()


@pytest.mark.parametrize("cut", [4, 12, 64, 2048, 2052, 8192])
def test_shards_of_samples_make_the_whole(cut: int, device: str) -> None:
    n = 3 * cut + 5
    whole = PhiloxNoise(3, sample_ids=7).tensor((2, n), device=device)
    shards = [
        PhiloxNoise(3, sample_ids=7, first_element=at).tensor((2, min(cut, n - at)), device=device)
        for at in range(0, n, cut)
    ]
    assert_same_bits(torch.cat(shards, 1), whole)


@pytest.mark.parametrize("columns", [8, 30, 700])
def test_samples_end_at_element_2_to_the_34(columns: int, device: str) -> None:
    last = 2**34 - (columns + 3) // 4 * 4
    check(PhiloxNoise(3, first_element=last), (2, columns), device)
    beyond = PhiloxNoise(3, first_element=last + 4)
    refused(ValueError, "^noise must end by element", beyond.tensor, (2, columns), device=device)
    x = torch.randn(2, columns, device=device)
    refused(ValueError, "^noise must end by element", ops.add_noise, x, beyond, 0.8, 0.6)


@pytest.mark.parametrize("columns", [1, 3, 9, 70, 2049])
def test_any_split_and_order_of_a_batch(columns: int, device: str) -> None:
    key = PhiloxNoise(3).for_samples(-4)
    whole = key.tensor((21, columns), device=device)
    for size in (1, 2, 5, 20):
        starts = range(0, 21, size)
        parts = [
            key.for_samples(s - 4).tensor((min(size, 21 - s), columns), device=device)
            for s in starts
        ]
        assert_same_bits(torch.cat(parts), whole)
    order = torch.randperm(21, device=device)
    assert_same_bits(key.for_samples(order - 4).tensor((21, columns)), whole[order])


# ---- memory -------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("layout", [*DENSE.values(), *OTHER.values()], ids=[*DENSE, *OTHER])
def test_every_layout(layout: Layout, dtype: torch.dtype, device: str) -> None:
    key = PhiloxNoise(3, stream=1)
    for shape in ((3, 4, 5, 7), (2, 3, 33, 65), (2, 67, 3, 5)):
        out = layout(torch.zeros(shape, dtype=dtype, device=device))
        strides = out.stride()
        assert ops.randn(shape, key, out=out) is out
        assert out.stride() == strides
        assert_same_bits(out, specified(key, shape).to(dtype))


@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (1, 3, 1, 7), (5, 1, 33, 2)], ids=str)
def test_every_order_of_dimensions(sizes: tuple[int, ...], device: str) -> None:
    key = PhiloxNoise(3)
    for batch in (1, 3):
        wanted = specified(key, (batch, *sizes))
        for order in itertools.permutations(range(5)):
            out = inside(torch.zeros(batch, *sizes, device=device), 0, order)
            assert_same_bits(ops.randn(wanted.shape, key, out=out), wanted, f"{order}")


def test_channels_last_of_many_sizes(device: str) -> None:
    # Runs that end within a block, a draw, and what is drawn at once.
    key = PhiloxNoise(3)
    for channels in (2, 3, 4, 7, 63, 64, 65):
        for width in (1, 3, 4, 9, 57, 700):
            shape = (2, channels, 1, width)
            zeros = torch.zeros(shape, device=device)
            out = zeros.contiguous(memory_format=torch.channels_last)
            assert_same_bits(ops.randn(shape, key, out=out), specified(key, shape))


def test_nothing_beside_the_output_is_written(device: str) -> None:
    for columns in (1, 3, 5, 17, 63, 65, 2049):
        buffer = torch.full((3 * columns + 130,), 77.0, device=device)
        out = buffer[65:-65].view(3, columns)
        ops.randn((3, columns), PhiloxNoise(3), out=out)
        assert (buffer[:65] == 77).all()
        assert (buffer[-65:] == 77).all()


@pytest.mark.parametrize(
    "shape", [(3, 40_003), (1025, 37), (1, 100_003), (2, 3, 150, 150)], ids=str
)
def test_any_number_of_threads(shape: tuple[int, ...]) -> None:
    threads, key = torch.get_num_threads(), PhiloxNoise(3, sample_ids=2**40)
    out = torch.empty(shape)
    if len(shape) == 4:
        out = out.contiguous(memory_format=torch.channels_last)
    wanted = specified(key, shape)
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            assert_same_bits(ops.randn(shape, key, out=out), wanted, f"{n} threads")
    finally:
        torch.set_num_threads(threads)


# ---- known answers ------------------------------------------------------------------------------

# Salmon et al.'s known answers for Philox4x32-10: key, counter, words.
KNOWN = (
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def known(key: Any, counter: Any) -> PhiloxNoise:
    """The noise key whose first block has this key and this counter."""
    sample = counter[2] | counter[3] << 32
    return PhiloxNoise(
        key[0] | key[1] << 32,
        sample_ids=sample - 2**64 if sample >= 2**63 else sample,
        stream=counter[1],
        first_element=4 * counter[0],
    )


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers_of_philox(key: Any, counter: Any, words: Any, device: str) -> None:
    w = [torch.tensor(word) for word in words]
    wanted = torch.stack([*philox.box_muller(w[0], w[1]), *philox.box_muller(w[2], w[3])])
    noise = known(key, counter)
    for columns in (4, 40, 400):  # in a draw of many rows, of one, of a part of one
        if noise.first_element + columns <= 2**34:
            z = noise.tensor((3, columns), device=device)
            assert_same_bits(z[0, :4], wanted)
            check(noise, (3, columns), device)
    for column in range(4):
        assert_same_bits(noise.tensor((1, column + 1), device=device)[0, column], wanted[column])


def test_these_bits_are_the_format(device: str) -> None:
    """A noise key gives the same bits in every version."""
    found = [
        PINNED_KEY.tensor((2, 4), device=device),
        *(known(k, c).tensor((1, 4), device=device) for k, c, _ in KNOWN),
    ]
    assert [x.hex() for x in torch.cat(found).flatten().tolist()] == PINNED.split()


PINNED_KEY = PhiloxNoise(2026, sample_ids=11, stream=3, first_element=16)
PINNED = """
    0x1.7785520000000p-1 -0x1.fa355c0000000p+0 -0x1.e9b2f20000000p-3 -0x1.533a0e0000000p+0
    0x1.45368e0000000p+1 0x1.f77ab40000000p+0 -0x1.0990b60000000p-1 0x1.06badc0000000p-3
    0x1.d96d600000000p-1 -0x1.fb76660000000p-1 -0x1.3c37400000000p-1 -0x1.eda3660000000p-2
    0x1.294a780000000p-4 0x1.a8859c0000000p+0 -0x1.b137900000000p-2 0x1.b721900000000p-1
    -0x1.1a5a000000000p-1 -0x1.3fbe3a0000000p-2 0x1.2e40a00000000p+0 -0x1.ee51b80000000p-1
"""


def test_the_two_ways_to_the_exponent_are_one() -> None:
    s = torch.cat([torch.linspace(0.5, 8, 65537), 2.0 ** torch.linspace(-1, 31, 65537)])
    bits, parts = philox.split_by_bits(s), philox.split_by_frexp(s)
    assert all(map(torch.equal, bits, parts))
    k, f = (x.double() for x in bits)
    torch.testing.assert_close(2 ** (31 + k) * (1 + f), s.double(), rtol=0, atol=0)
