"""Noise as users pass it: a tensor or a noise key."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import as_device, as_shape, check_dense
from diffcore._engine import messages
from diffcore._engine.dispatch import plain_eager, run
from diffcore._engine.dtensor import is_dtensor, of_first_rank
from diffcore._engine.kernel import NoisyKernel
from diffcore._kernels import noise as k
from diffcore._types import Coef, Step
from diffcore.noise import Noise, PhiloxNoise, draw
from diffcore.ops._arguments import converted

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
        if not all(isinstance(x, Tensor) for x in inputs):
            messages.refuse_non_tensor(kernel.generating.inputs, inputs)
        like = inputs[kernel.generating.samples]
        if type(noise) is PhiloxNoise or like.dtype not in messages.DTYPES:
            try:
                return k.run_noisy(kernel, inputs, noise._parts, coefs, step, out)
            except TypeError as error:
                coefs, step = converted(error, coefs, step, inputs[0])
            return k.run_noisy(kernel, inputs, noise._parts, coefs, step, out)
        noise = noise.tensor(like.shape, dtype=like.dtype, device=like.device)  # of a shard
    if not isinstance(noise, Tensor):
        kind = type(noise).__name__
        raise TypeError(
            f"{kernel.reading.inputs[-1]} must be a torch.Tensor or a PhiloxNoise, got {kind}"
        )
    try:
        return run(kernel.reading, (*inputs, noise), coefs, step, False, out)
    except TypeError as error:
        coefs, step = converted(error, coefs, step, inputs[0])
    return run(kernel.reading, (*inputs, noise), coefs, step, False, out)


def promoted(model_output: Tensor, x0: Any, noise: Any) -> tuple[Tensor, Any, Any]:
    """A prediction, x_0 and noise in the widest of their dtypes, by torch's promotion.

    The noise of a key is rounded to the dtype of ``x0`` first, as where it is added to ``x0``.
    """
    for name, x in (("model_output", model_output), ("x0", x0), ("noise", noise)):
        if isinstance(x, Tensor):
            messages.check_tensor(name, x)
    floats = [x.dtype for x in (model_output, x0, noise) if _is_float(x)]
    widest = functools.reduce(torch.promote_types, floats)
    if isinstance(noise, PhiloxNoise) and _is_float(x0) and x0.dtype != widest:
        noise = noise.tensor(x0.shape, dtype=x0.dtype, device=x0.device)
    found = [x.to(widest) if _is_float(x) else x for x in (model_output, x0, noise)]
    return found[0], found[1], found[2]


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


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
    return default_key(like, generator)


def default_key(like: Tensor, generator: torch.Generator | None = None) -> PhiloxNoise:
    """A noise key for these samples seeded by torch's generator; for DTensors the same everywhere.

    Args:
        like: The samples that the noise is for.
        generator: ``None`` for the default one of their device.

    Returns:
        Stream 0 of samples 0 .. B-1; the seed of the first rank, if the samples are a DTensor.
    """
    key = PhiloxNoise.from_generator(generator, device=like.device)
    if not is_dtensor(like):
        return key
    seed = key.seed
    if not isinstance(seed, Tensor):
        seed = torch.tensor([seed], device=like.device)
    seed = of_first_rank(seed, like)
    return PhiloxNoise(int(seed) if seed.device.type == "cpu" and plain_eager() else seed)


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
    sizes = as_shape("shape", shape)
    if out is None:
        return noise.tensor(sizes, dtype=dtype, device=device)
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
    check_dense("out", out)
    messages.check_dtype(dtype)
    for what, came, wanted in (
        ("shape", sizes, tuple(out.shape)),
        ("dtype", dtype or out.dtype, out.dtype),
        ("device", out.device if device is None else as_device("device", device), out.device),
    ):
        if came != wanted:
            raise ValueError(f"{what} must be that of out, {wanted}, got {came}")
    if out.requires_grad:
        raise ValueError("out must not require grad, got a tensor that does")
    result = draw(noise, out)
    return result if result is out else out.copy_(result)
