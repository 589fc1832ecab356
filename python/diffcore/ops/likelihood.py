"""The likelihood of pixels, in nats."""

from __future__ import annotations

from torch import Tensor

from diffcore._kernels import likelihood as k
from diffcore.ops.gaussian import reduced

__all__ = [
    "discretized_gaussian_log_likelihood",
]


def discretized_gaussian_log_likelihood(
    x: Tensor, *, means: Tensor, log_scales: Tensor, reduction: str = "none"
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

    Args:
        x: Pixels, scaled to [-1, 1] ``[B, ...]``.
        means: ``[B, ...]``.
        log_scales: Logs of standard deviations (half a log-variance) ``[B, ...]``.
        reduction: As in :func:`diffcore.ops.normal_kl`.

    Returns:
        ``[B, ...]``, ``[B]`` or a 0-dim tensor, nats.

    Source:
        Ho et al. 2020 (DDPM), §3.3; names as in OpenAI's improved-diffusion.
    """
    return reduced(k.DISCRETIZED, (x, means, log_scales), reduction)
