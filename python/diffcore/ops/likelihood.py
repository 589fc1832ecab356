"""The likelihood of pixels, in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore._checks import as_int, check_float_tensor
from diffcore._devices import in_float64
from diffcore._engine import messages
from diffcore._kernels import likelihood as k
from diffcore._types import Tensors
from diffcore.ops.gaussian import reduced
from diffcore.reference import compute_dtype

__all__ = [
    "discretized_gaussian_log_likelihood",
]

MOST_BITS = 32


def discretized_gaussian_log_likelihood(
    x: Tensor,
    *,
    means: Tensor,
    log_scales: Tensor,
    reduction: str = "none",
    bits: int = 8,
) -> Tensor:
    """Log of the mass of ``N(means, exp(log_scales)²)`` in the bin of each pixel, in nats, exactly.

    ``log(Φ((x + 1/255 - mean) / scale) - Φ((x - 1/255 - mean) / scale))`` for a pixel
    x = k / 127.5 - 1; the bin has no lower end where x < -0.999 and no upper one where x > 0.999,
    so that the masses of the 256 values sum to 1. In a form without cancellation, whose bins are
    float64 for every dtype: to 2e-6 of itself in float32, finite wherever the result can be
    represented, with gradients that live in both tails. (The usual approximation of Φ by a tanh,
    clamped at 1e-12, has neither.)

    Pixel values are not validated: the bin is x ± 1/255 for any x. In 16 bits x is a rounded pixel
    and its bin lies around the rounded value, so masses sum to 1 only for scales that are wide
    beside the rounding; prefer float32 pixels. A scale of 0 (log_scales -inf) gives the limit, 0
    inside the bin and -inf outside of it; an infinite scale gives -inf, and log ½ in an open bin.
    nan in, nan out.

    Pixels of ``bits`` bits are x = 2 k / (2^bits - 1) - 1 for k = 0 .. 2^bits - 1, in bins of
    x ± 1 / (2^bits - 1), open where |x| is beyond the last bound between two bins. For any depth
    but 8 the inputs are first mapped in float64 to those of an 8-bit bin with the same mass (0
    inside, ±1 at the ends), which takes more time and memory. Prefer float64 for pixels of more
    than 12 bits: the rounding of float32 moves a bin of 16 bits by up to 0.1 % of its width.

    Args:
        x: Pixels, scaled to [-1, 1] ``[B, ...]``.
        means: ``[B, ...]``.
        log_scales: Logs of standard deviations (half a log-variance) ``[B, ...]``.
        reduction: As in :func:`diffcore.ops.normal_kl`.
        bits: Depth of the pixels, 1 to 32.

    Returns:
        ``[B, ...]``, ``[B]`` or a 0-dim tensor, nats.

    Source:
        Ho et al. 2020 (DDPM), §3.3; names as in OpenAI's improved-diffusion.
    """
    if type(bits) is int and bits == 8:
        return reduced(k.DISCRETIZED, (x, means, log_scales), reduction)
    bits = as_int("bits", bits, 1)
    if bits > MOST_BITS:
        raise ValueError(f"bits must be in 1 .. {MOST_BITS}, got {bits}")
    if bits == 8:
        return reduced(k.DISCRETIZED, (x, means, log_scales), reduction)
    for name, tensor in (("x", x), ("means", means), ("log_scales", log_scales)):
        check_float_tensor(name, tensor)
        messages.check_tensor(name, tensor)
        if tensor.shape != x.shape:
            shapes = f"{tuple(x.shape)}, got {tuple(tensor.shape)}"
            raise ValueError(f"{name} must have the shape of x, {shapes}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, the device of x, got {tensor.device}")
    found = reduced(k.DISCRETIZED, _in_bins_of_8_bits(x, means, log_scales, bits), reduction)
    dtype = torch.promote_types(torch.promote_types(x.dtype, means.dtype), log_scales.dtype)
    return found.to(dtype if reduction == "none" else compute_dtype(dtype)).to(x.device)


def _in_bins_of_8_bits(x: Tensor, means: Tensor, log_scales: Tensor, bits: int) -> Tensors:
    """Inputs of the kernel whose 8-bit bins have the masses of bins of another depth.

    The mass depends on the bounds of the bin minus the mean, over the scale: all three may be
    multiplied by a number, and x and the mean shifted by one, as long as an open bin stays open.
    """
    most = 2**bits - 1
    ratio = most / 255
    wide = in_float64(x)
    at = torch.where(wide.detach().abs() > 1 - 1 / most, wide.detach().sign(), 0.0)
    return at, at + ratio * (in_float64(means) - wide), in_float64(log_scales) + math.log(ratio)
