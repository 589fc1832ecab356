"""Noise as users pass it: a tensor, or a recipe for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore._engine import messages
from diffcore._engine.dispatch import run
from diffcore._engine.kernel import NoisyKernel
from diffcore._kernels import noise as k
from diffcore._types import Coef, Noise, Step
from diffcore.noise import PhiloxNoise, draw

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
    """Runs a kernel whose last input is noise, or its twin that draws it."""
    if isinstance(noise, PhiloxNoise):
        if not isinstance(inputs[0], Tensor):
            messages.refuse_non_tensor(kernel.generating.inputs, inputs)
        return k.run_noisy(kernel, inputs, noise._parts, coefs, step, out)
    if not isinstance(noise, Tensor):
        kind = type(noise).__name__
        raise TypeError(
            f"{kernel.reading.inputs[-1]} is a {kind}; wanted a torch.Tensor or a PhiloxNoise"
        )
    return run(kernel.reading, (*inputs, noise), coefs, step, False, out)


def noise_or_default(
    like: Any, name: str, noise: Noise | None, generator: torch.Generator | None
) -> Noise:
    """The noise given, else a recipe seeded by torch's generator."""
    if noise is not None:
        if generator is not None:
            raise ValueError("noise and generator are both given; wanted one")
        return noise
    if not isinstance(like, Tensor):
        raise TypeError(f"{name} is a {type(like).__name__}; wanted a torch.Tensor")
    return PhiloxNoise.from_generator(generator, device=like.device)


def randn(
    shape: Sequence[int],
    noise: PhiloxNoise,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise from a recipe: ``z = normal(seed, sample id, stream, element)``.

    Args:
        shape: `[B, ...]`; the first dimension counts samples.
        noise: the recipe.
        dtype: float32, float64, bfloat16 or float16; torch's default when None. The draw is
            float32, rounded to it.
        device: None for that of the recipe's tensors, else torch's default.
        out: where to write instead; its shape, dtype and device count, and no gradient may be
            needed.

    Returns:
        `[B, ...]`.

    Source: Salmon et al. 2011; Box & Muller 1958.
    """
    if not isinstance(noise, PhiloxNoise):
        raise TypeError(f"noise is a {type(noise).__name__}; wanted a PhiloxNoise")
    if out is None:
        return noise.tensor(shape, dtype=dtype, device=device)
    if not isinstance(out, Tensor):
        raise TypeError(f"out is a {type(out).__name__}; wanted a torch.Tensor")
    for what, came, wanted in (
        ("shape", tuple(shape), tuple(out.shape)),
        ("dtype", dtype or out.dtype, out.dtype),
        ("device", torch.device(device or out.device), out.device),
    ):
        if came != wanted:
            raise ValueError(f"{what} is {came}; wanted {wanted}, that of out")
    if out.requires_grad:
        raise ValueError("out requires grad; wanted a tensor that does not")
    result = draw(noise, out)
    return result if result is out else out.copy_(result)
