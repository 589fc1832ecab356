"""A known part of samples, put in where a mask says so."""

from __future__ import annotations

from torch import Tensor

from diffcore._types import Coef, Step
from diffcore.noise import Noise
from diffcore.ops._masks import blend

__all__ = [
    "blend_known",
]


def blend_known(
    x: Tensor,
    mask: Tensor,
    known: Tensor,
    known_noise: Noise,
    alpha: Coef,
    sigma: Coef,
    *,
    t: Step = None,
    out: Tensor | None = None,
) -> Tensor:
    """Puts a known part into samples: ``mask x + (1 - mask) (alpha known + sigma known_noise)``.

    Where the mask is 1 the result is x, and where it is 0 the known samples at the noise level,
    with the bits of :func:`add_noise`; there the other side is not used, whatever its value. A
    fraction is a share (a soft mask). Differentiable in ``x``, ``known``, ``known_noise`` and the
    coefficients.

    ``SolverTable.step`` and ``sample`` take ``mask``, ``known`` and ``known_noise`` themselves.

    Args:
        x: Samples ``[B, ...]``.
        mask: 1 or True where x is kept, 0 or False where it is known; broadcast to the shape of x
            (``[B, 1, H, W]``, ``[H, W]``, ...). Bool, integers or floating point in [0, 1]; other
            values raise on the CPU and are not checked on CUDA, which would wait for the device.
            One that has the shape and dtype of x is read without a copy.
        known: The known clean samples x_0, ``[B, ...]``.
        known_noise: The noise that they get ``[B, ...]``, or its noise key.
        alpha: Signal coefficient of x. A number, 0-dim, ``[B]``, or a table ``[T]`` with ``t``.
        sigma: Noise coefficient of x. A number, 0-dim, ``[B]``, or a table ``[T]`` with ``t``.
        t: The step at which the tables are read: an int, ``[B]`` or a one-element counter.
        out: Tensor to write to, such as ``x`` itself. Not where a gradient is needed.

    Returns:
        ``[B, ...]``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A mask that does not broadcast, has values outside [0, 1] or requires grad; or
            another shape.

    Source:
        Lugmayr et al. 2022 (arXiv 2201.09865), eq. 8.
    """
    return blend(x, mask, known, known_noise, alpha, sigma, t, out)
