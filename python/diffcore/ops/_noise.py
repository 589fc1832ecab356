"""Noise as users pass it: a tensor or a noise key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore._engine import messages
from diffcore._engine.dispatch import run
from diffcore._engine.kernel import NoisyKernel
from diffcore._kernels import noise as k
from diffcore._types import Coef, Step
from diffcore.noise import Noise, PhiloxNoise, draw

__all__ = [
    "randn",
]


def run_noisy(
    kernel: NoisyKernel,
    inputs: tuple[Tensor, ...],
    noise: Noise,
    coefs: tuple[Coef, ...] = (),
    step: Step = None,
    out: Tensor | None = None,
) -> Any:
    """Runs a kernel whose last input is ``noise``, or the one that generates it."""
    if isinstance(noise, PhiloxNoise):
        if not isinstance(inputs[0], Tensor):
            messages.refuse_non_tensor(kernel.generating.inputs, inputs)
        return k.run_noisy(kernel, inputs, noise._parts, coefs, step, out)
    if not isinstance(noise, Tensor):
        kind = type(noise).__name__
        raise TypeError(
            f"{kernel.reading.inputs[-1]} must be a torch.Tensor or a PhiloxNoise, got {kind}"
        )
    return run(kernel.reading, (*inputs, noise), coefs, step, False, out)


def noise_or_default(
    like: Any, name: str, noise: Noise | None, generator: torch.Generator | None
) -> Noise:
    """The noise given, else a noise key seeded by torch's generator."""
    if noise is not None:
        if generator is not None:
            raise ValueError("generator must be None where noise is given, got both")
        return noise
    if not isinstance(like, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(like).__name__}")
    return PhiloxNoise.from_generator(generator, device=like.device)


def randn(
    shape: Sequence[int],
    noise: PhiloxNoise,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise from a noise key: ``z = normal(seed, sample id, stream, element)``.

    Args:
        shape: ``[B, ...]``; the first dimension counts samples.
        noise: The noise key.
        dtype: float32, float64, bfloat16 or float16; torch's default when ``None``. The noise is
            generated in float32 and rounded to it.
        device: ``None`` for that of the key's tensors, else torch's default.
        out: Tensor to write to; its shape, dtype and device count. It must not require grad.

    Returns:
        ``[B, ...]``.

    Source:
        Salmon et al. 2011; Box & Muller 1958.
    """
    if not isinstance(noise, PhiloxNoise):
        raise TypeError(f"noise must be a PhiloxNoise, got {type(noise).__name__}")
    if out is None:
        return noise.tensor(shape, dtype=dtype, device=device)
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
    messages.check_dense("out", out)
    for what, came, wanted in (
        ("shape", tuple(shape), tuple(out.shape)),
        ("dtype", dtype or out.dtype, out.dtype),
        ("device", torch.device(device or out.device), out.device),
    ):
        if came != wanted:
            raise ValueError(f"{what} must be that of out, {wanted}, got {came}")
    if out.requires_grad:
        raise ValueError("out must not require grad, got a tensor that does")
    result = draw(noise, out)
    return result if result is out else out.copy_(result)
