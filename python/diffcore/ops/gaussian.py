"""Diagonal Gaussians: KL, negative log-likelihood, reparameterization; in nats."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import as_real, check_choice, check_dense
from diffcore._engine import messages
from diffcore._engine.dispatch import run
from diffcore._kernels import gaussian as k
from diffcore._kernels.term import Term
from diffcore._types import Tensors
from diffcore.noise import Noise
from diffcore.ops._noise import noise_or_default, run_noisy

__all__ = [
    "gaussian_nll",
    "normal_kl",
    "reparameterize",
    "reparameterize_kl",
    "standard_normal_kl",
]


_NORMAL_KL = ("mean1", "logvar1", "mean2", "logvar2")


def reduced(term: Term, inputs: tuple[Tensor, ...], reduction: str) -> Tensor:
    """The terms, or the sum that ``reduction`` names."""
    if type(reduction) is not str:
        check_choice("reduction", reduction, messages.REDUCTIONS)
    if reduction == "none":
        return run(term.elementwise, inputs)
    if reduction == "sample":
        return run(term.sum, inputs, (1.0,))
    if reduction == "sum":
        return run(term.sum, inputs, (1.0,), None, True)
    check_choice("reduction", reduction, messages.REDUCTIONS)
    if not isinstance(inputs[0], Tensor):
        messages.refuse_non_tensor(term.sum.inputs, inputs)
    if inputs[0].is_nested:
        check_dense(term.sum.inputs[0], inputs[0])
    n = inputs[0].numel() if reduction == "mean" else (inputs[0].shape[0] if inputs[0].ndim else 1)
    return run(term.sum, inputs, (1.0 / n if n else float("nan"),), None, True)


def normal_kl(
    mean1: Tensor | float,
    logvar1: Tensor | float,
    mean2: Tensor | float,
    logvar2: Tensor | float,
    *,
    reduction: str = "none",
) -> Tensor:
    """KL(N1 || N2) of diagonal Gaussians, in nats.

    ``½ [ expm1(d) - d + (mean1 - mean2)² exp(-logvar2) ]`` with d = logvar1 - logvar2: the
    textbook formula without its cancellation (which goes negative in bfloat16), by its series
    where d is small.

    The arguments broadcast as in torch; at least one is a tensor. Four tensors of one shape take
    one launch and no copy. An argument that broadcasts is first written out in the common shape,
    except that ``mean2=0, logvar2=0`` as numbers take the kernel of :func:`standard_normal_kl`.

    Equal means add 0 for any log-variance. The KL to or from a point (log-variance -inf) is inf; of
    two log-variances that are the same infinity it is nan.

    Args:
        mean1: ``[B, ...]``, a tensor that broadcasts to it, or a number.
        logvar1: Log-variance. ``[B, ...]``, a tensor that broadcasts to it, or a number.
        mean2: ``[B, ...]``, a tensor that broadcasts to it, or a number.
        logvar2: Log-variance. ``[B, ...]``, a tensor that broadcasts to it, or a number.
        reduction: "none" (elementwise), "sample" (sum over each sample, ``[B]``), "batchmean" (sum
            / B), "mean" (over all elements) or "sum". Sums of 16-bit inputs are float32.

    Returns:
        ``[B, ...]``, ``[B]`` or a 0-dim tensor, nats.

    Raises:
        TypeError: An argument is neither a tensor nor a number, none is a tensor, or two tensors
            have different dtypes.
        ValueError: The shapes do not broadcast, or two tensors are on different devices.

    Source:
        Kullback & Leibler 1951; the stable form as in Kingma et al. 2021 (VDM).
    """
    inputs: Any = (mean1, logvar1, mean2, logvar2)
    refusal = None
    # A kernel checks the shapes faster than Python does. A compiler records the call unchecked.
    if not torch.compiler.is_compiling():
        try:
            return reduced(k.NORMAL_KL, inputs, reduction)
        except (TypeError, ValueError, RuntimeError) as error:
            refusal = error
    if refusal is not None:  # a RuntimeError: a nested tensor has no shape
        for name, x in zip(_NORMAL_KL, inputs, strict=True):
            if isinstance(x, Tensor):
                check_dense(name, x)
        if isinstance(refusal, RuntimeError):
            raise refusal
    if all(isinstance(x, Tensor) and x.shape == inputs[0].shape for x in inputs):
        if refusal is not None:
            raise refusal
        return reduced(k.NORMAL_KL, inputs, reduction)
    full = _broadcast(_NORMAL_KL, inputs)
    if all(type(x) in (int, float) and x == 0 for x in (mean2, logvar2)):
        return reduced(k.STANDARD_NORMAL_KL, full[:2], reduction)
    return reduced(k.NORMAL_KL, full, reduction)


def _broadcast(names: tuple[str, ...], inputs: tuple[Tensor | float, ...]) -> Tensors:
    """The inputs as tensors of one shape; numbers in the dtype of the tensors."""
    tensors = {n: x for n, x in zip(names, inputs, strict=True) if isinstance(x, Tensor)}
    for name, x in zip(names, inputs, strict=True):
        if name in tensors:
            continue
        # The types first: Dynamo has no hasattr for a symbolic number.
        is_number = isinstance(x, (int, float)) or hasattr(x, "__float__")
        if isinstance(x, (str, bool)) or not is_number:
            kind = type(x).__name__
            raise TypeError(f"{name} must be a torch.Tensor or a number, got {kind}")
    if not tensors:
        raise TypeError(f"one of {', '.join(names)} must be a torch.Tensor, got only numbers")
    first_name, first = next(iter(tensors.items()))
    check_dense(first_name, first)
    shape = first.shape
    for name, x in tensors.items():
        messages.check_tensor(name, x)
        if x.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {first.device}, got {x.device}"
            )
        try:
            shape = torch.broadcast_shapes(shape, x.shape)
        except RuntimeError:
            raise ValueError(
                f"{name} must have a shape that broadcasts with {tuple(shape)}, got "
                f"{tuple(x.shape)}"
            ) from None
    each = [
        x if isinstance(x, Tensor) else _filled(first, as_real(n, x))
        for n, x in zip(names, inputs, strict=True)
    ]
    return tuple(x.expand(shape) for x in each)


def _filled(like: Tensor, value: float) -> Tensor:
    """A number as a tensor; infinite where the dtype cannot hold it."""
    try:
        return like.new_full((), value)
    except RuntimeError:
        return like.new_full((), math.copysign(math.inf, value))


def standard_normal_kl(mean: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """KL(N(mean, e^logvar) || N(0, I)), in nats: ``½ [ mean² + expm1(logvar) - logvar ]``.

    Args:
        mean: ``[B, ...]``.
        logvar: Log-variance, ``[B, ...]``.
        reduction: As in :func:`normal_kl`.

    Returns:
        ``[B, ...]``, ``[B]`` or a 0-dim tensor, nats.

    Source:
        Kingma & Welling 2014, appendix B.
    """
    return reduced(k.STANDARD_NORMAL_KL, (mean, logvar), reduction)


def gaussian_nll(x: Tensor, mean: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """``-log N(x; mean, e^logvar) = ½ [ log 2π + logvar + (x - mean)² exp(-logvar) ]``, in nats.

    At its mean, a point (log-variance -inf) gives -inf; away from it the formula is inf - inf, nan.

    Args:
        x: The points at which to evaluate the density, ``[B, ...]``.
        mean: ``[B, ...]``.
        logvar: Log-variance, ``[B, ...]``.
        reduction: As in :func:`normal_kl`.

    Returns:
        ``[B, ...]``, ``[B]`` or a 0-dim tensor, nats.
    """
    return reduced(k.GAUSSIAN_NLL, (x, mean, logvar), reduction)


def reparameterize(
    mean: Tensor,
    logvar: Tensor,
    noise: Noise | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A differentiable sample of N(mean, e^logvar): ``z = mean + exp(logvar / 2) noise``.

    Args:
        mean: ``[B, ...]``.
        logvar: Log-variance, ``[B, ...]``.
        noise: Standard normal noise ``[B, ...]``, or a noise key: the kernel generates it, and the
            backward pass generates it again. ``None`` for a key seeded by torch's generator.
        generator: The generator that seeds the key, instead of the default one.

    Returns:
        ``z`` ``[B, ...]``.

    Source:
        Kingma & Welling 2014, section 2.4.
    """
    source = noise_or_default(mean, "mean", noise, generator)
    z: Tensor = run_noisy(k.REPARAMETERIZE, (mean, logvar), source)
    return z


def reparameterize_kl(
    mean: Tensor,
    logvar: Tensor,
    noise: Noise | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A reparameterized sample and its KL term of the ELBO, in one pass over the parameters.

    ``z = mean + exp(logvar / 2) noise`` and, per sample, ``½ Σ [ mean² + expm1(logvar) - logvar
    ]``.

    Args:
        mean: ``[B, ...]``.
        logvar: Log-variance, ``[B, ...]``.
        noise: Standard normal noise ``[B, ...]``, or a noise key: the kernel generates it, and the
            backward pass generates it again. ``None`` for a key seeded by torch's generator.
        generator: The generator that seeds the key, instead of the default one.

    Returns:
        ``z`` ``[B, ...]`` and the KL of each sample to the standard normal, ``[B]``, nats (float32
        for 16-bit inputs).

    Source:
        Kingma & Welling 2014, section 2.4 and appendix B.
    """
    source = noise_or_default(mean, "mean", noise, generator)
    z, kl = run_noisy(k.REPARAMETERIZE_KL, (mean, logvar), source)
    return z, kl
