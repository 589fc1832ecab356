"""Normal numbers as a function of (seed, sample, stream, element): the specification of the noise.

``csrc/noise/normal.h`` computes the same bits, on every instruction set and on CUDA. Here they are
plain tensor operations, each rounded once, on any device and under torch's transforms.

Philox4x32-10 turns a counter of four 32-bit words and a key of two into four random words; one
round is, with M0 = 0xD2511F53 and M1 = 0xCD9E8D57,

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)),

and between rounds k0 += 0x9E3779B9, k1 += 0xBB67AE85. The key is the seed (low word, high word);
the counter is (element // 4, stream, sample id low, sample id high). Two words w, v make two
normals: with u = (floor(w / 2) + 1/2) / 2^31 in (0, 1], and x in [-pi/4, pi/4) from the lower 30
bits of v, an integer with sign,

    z0 = sqrt(-2 ln u) cos x,    z1 = sqrt(-2 ln u) sin x,

exchanged if bit 30 of v is set, both negated if bit 31 is: the four quarters of the circle. Element
e is the (e mod 4)-th of z0, z1 of the words (0, 1) and z0, z1 of the words (2, 3).

All floating-point arithmetic is float32, every operation rounded to nearest on its own: a fused
multiply-add, or another order, is another number. Largest errors, in ulp, against exact values
(``tests/noise/test_polynomials.py`` measures every argument there is):

    -2 ln u of the float32 u     1.96     its square root      1.52
    sin x of the float32 x       0.77     of the exact x       2.76
    cos x of the float32 x       1.65     of the exact x       2.44

``torch.compile`` for CPUs keeps to that; compilers for GPUs fuse, so their results may differ in
the last bits.

Sources: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011); G. Box, M. Muller, "A note on the generation of random normal deviates" (Ann. Math.
Statist. 29, 1958). The polynomials are minimax fits, each coefficient rounded to float32 before
the next ones are fitted.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore._devices import has_float64
from diffcore._types import NoiseParts

Words = tuple[Tensor, Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]
Key = tuple[int | Tensor, int | Tensor]


MASK = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
# Fractions of sqrt(2) and sqrt(7): they change the seed for words that are not those of the noise.
UNIFORM_SALT, INTEGER_SALT = 0x6A09E667F3BCC908, 0xA54FF53A5F1D36F1
PRECISION = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
SQRT_HALF_BITS = 0x3F3504F3  # of the smallest float32 above sqrt(1/2)

_hex = float.fromhex
MINUS_TWO_LN2 = _hex("-0x1.62e430p+0")
TURN = _hex("0x1.921fb6p-32")  # 2 pi / 2^34
LOG = (  # -2 log1p(f) / f on [sqrt(1/2) - 1, sqrt(2) - 1], lowest order first
    *(_hex("-0x1.000000p+1"), _hex("0x1.fffff6p-1"), _hex("-0x1.555702p-1")),
    *(_hex("0x1.0004c8p-1"), _hex("-0x1.98d39cp-2"), _hex("0x1.535c2cp-2")),
    *(_hex("-0x1.317c90p-2"), _hex("0x1.25059cp-2"), _hex("-0x1.65f09cp-3")),
)
# (sin x - x) / x^3 and (cos x - 1) / x^2 as polynomials in x^2, |x| <= pi / 4.
SIN = _hex("-0x1.555546p-3"), _hex("0x1.110778p-7"), _hex("-0x1.995408p-13")
COS = _hex("-0x1.ffffbap-2"), _hex("0x1.553faap-5"), _hex("-0x1.647822p-10")


_SQRT_HALF = struct.unpack("<f", struct.pack("<i", SQRT_HALF_BITS))[0]
_BITS_UNDER_VMAP = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product. In halves: int64 holds no product of two words."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def philox4x32(counter: Words, key: Key, rounds: int = 10) -> Words:
    """Four random 32-bit words for a counter and a key, all held in int64, shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        (high0, low0), (high1, low1) = _multiply(c0, MULTIPLIERS[0]), _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + KEY_STEPS[0] & MASK, k1 + KEY_STEPS[1] & MASK
    return c0, c1, c2, c3


def _horner(coefficients: Sequence[float], t: Tensor) -> Tensor:
    value = t * coefficients[-1] + coefficients[-2]
    for c in coefficients[-3::-1]:
        value = value * t + c
    return value


def _uniform(w: Tensor) -> Tensor:
    """2^31 u in [1/2, 2^31], in float32: the upper 31 bits of the word, and a half."""
    return (w >> 1).to(torch.float32) + 0.5


def _minus_two_log(s: Tensor) -> Tensor:
    """-2 ln(s / 2^31) >= 0 for float32 s in [1/2, 2^31]: s / 2^31 = 2^k (1 + f), 1 + f near 1."""
    k, f = (split_by_bits if _BITS_UNDER_VMAP else split_by_frexp)(s)
    return k * MINUS_TWO_LN2 + f * _horner(LOG, f)


def split_by_bits(s: Tensor) -> tuple[Tensor, Tensor]:
    """The k and f of s = 2^(31+k) (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), from the bits of s."""
    t = s.view(torch.int32) - (SQRT_HALF_BITS + (31 << 23))
    f = ((t & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32) - 1
    return (t >> 23).to(torch.float32), f


def split_by_frexp(s: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers without a view, for which ``vmap`` of torch 2.12 and before has no rule."""
    mantissa, exponent = torch.frexp(s)
    low = mantissa < _SQRT_HALF
    one_plus_f = torch.where(low, 2 * mantissa, mantissa)
    return (exponent - 31 - low.to(exponent.dtype)).to(torch.float32), one_plus_f - 1


def _root(x: Tensor) -> Tensor:
    """The root, correctly rounded, as torch's own in float32 is not everywhere (MKL's is not)."""
    return x.double().sqrt().float()


def _sin(x: Tensor) -> Tensor:
    y = x * x
    return x + x * (y * _horner(SIN, y))


def _cos(x: Tensor) -> Tensor:
    y = x * x
    return 1 + y * _horner(COS, y)


def _angle(v: Tensor) -> Tensor:
    """The lower 30 bits, the highest of them a sign, as an angle in [-pi/4, pi/4)."""
    signed = ((v & (1 << 30) - 1) ^ 1 << 29) - (1 << 29)
    return (signed << 2).to(torch.float32) * TURN


def box_muller(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent float32 normals from two 32-bit words held in int64."""
    radius = _root(_minus_two_log(_uniform(w)))
    x = _angle(v)
    cos, sin = _cos(x), _sin(x)
    radius, swap = torch.where(v >> 31 & 1 != 0, -radius, radius), v >> 30 & 1 != 0
    return radius * torch.where(swap, sin, cos), radius * torch.where(swap, cos, sin)


def _counters(noise: NoiseParts, blocks: Tensor, batch: int, salt: int = 0) -> tuple[Words, Key]:
    """The counters ``[B, n]`` of blocks ``[n]`` of each sample, and the key.

    Args:
        noise: As for ``normals``; its first element does not count.
        blocks: Block numbers, on the device of the result.
        batch: B.
        salt: 64 bits that change those of the seed, for words with another purpose.
    """
    seed, sample_ids, stream, _ = noise
    device = blocks.device
    offset: int | Tensor = 0
    if isinstance(seed, Tensor):
        seed = seed.to(device).reshape(-1)
        if seed.shape[0] == 2:
            offset = seed[1]
        seed = seed[0]
    if isinstance(stream, Tensor):
        stream = stream.to(device).reshape(())
    if isinstance(sample_ids, Tensor):
        sample_ids = sample_ids.to(device)
    if not isinstance(sample_ids, Tensor) or sample_ids.ndim == 0:
        sample_ids = sample_ids + torch.arange(batch, device=device)
    ids, zero = sample_ids.reshape(batch, 1), torch.zeros_like(blocks)
    counter = (
        *(blocks & MASK, zero + (stream & MASK) + (offset & MASK) & MASK),
        *(ids & MASK, ids >> 32 & MASK),
    )
    return counter, (seed & MASK ^ salt & MASK, seed >> 32 & MASK ^ salt >> 32)


def normals(
    noise: NoiseParts, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """The noise (seed, sample ids, stream, first element) as a tensor: [B, ...], or () for B = 1.

    Args:
        noise: The seed, an int or an int64 tensor, 0-dim, [1], or [2] (seed, an offset to the
            stream); the sample ids, an int64 tensor [B], or an int or a 0-dim tensor of the
            first of B successive ones; the stream, an int or an int64 tensor of one element;
            and the element at which the tensor begins in its sample, a multiple of 4.
        shape: Of the result; elements count along the row-major order inside a sample.
        dtype: Of the result, the float32 draw rounded.
        device: Of the result.
    """
    if not has_float64(device):  # for the root
        return normals(noise, shape, dtype, "cpu").to(device)
    batch, size = (shape[0] if shape else 1), math.prod(shape[1:])
    blocks = torch.arange((size + 3) // 4, device=device) + noise[3] // 4
    w = philox4x32(*_counters(noise, blocks, batch))
    z = torch.stack((*box_muller(w[0], w[1]), *box_muller(w[2], w[3])), -1)
    return z.flatten(1)[:, :size].reshape(tuple(shape)).to(dtype)


def pairs(noise: NoiseParts, elements: Tensor, batch: int, salt: int) -> Pair:
    """Two words for each element of each sample, ``[B, n]``: of a block, two elements.

    Args:
        noise: As for ``normals``; its first element does not count.
        elements: Elements below 2^33, int64 ``[n]``, on the device of the result.
        batch: B.
        salt: 64 bits that change those of the seed: words independent of the key's noise.

    Returns:
        The high and the low 32 of 64 random bits, held in int64.
    """
    if not has_float64(elements.device):  # as the root of the noise
        high, low = pairs(noise, elements.cpu(), batch, salt)
        return high.to(elements.device), low.to(elements.device)
    w = philox4x32(*_counters(noise, elements // 2, batch, salt))
    second = elements % 2 != 0
    return torch.where(second, w[2], w[0]), torch.where(second, w[3], w[1])


def uniforms(words: Pair, dtype: torch.dtype) -> Tensor:
    """Uniform numbers in [0, 1): the upper p of 64 random bits, as multiples of 2^-p.

    p is the precision of the dtype, so nothing is rounded.

    Args:
        words: Of ``pairs`` with ``UNIFORM_SALT``.
        dtype: Of the result.
    """
    high, low = words
    bits, at = PRECISION[dtype], high.device
    if not has_float64(at):
        return uniforms((high.cpu(), low.cpu()), dtype).to(at)
    return ((high << 21 | low >> 11) >> 53 - bits).double().mul(2.0**-bits).to(dtype)


def integers(words: Pair, bounds: int | Tensor) -> Tensor:
    """Uniform integers in 0 .. bound - 1, int64: the upper part of 64 bits times bound.

    Args:
        words: Of ``pairs`` with ``INTEGER_SALT``.
        bounds: In 1 .. 2^31: one, or one for each element, int64 ``[n]`` on their device.
    """
    high, low = words
    return high * bounds + (low * bounds >> 32) >> 32
