"""Diagonal Gaussians: KL, negative log-likelihood, reparameterisation. Nats."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore._engine import messages
from diffcore._engine.dispatch import run
from diffcore._kernels import gaussian as k
from diffcore._kernels.term import Term
from diffcore._types import Noise
from diffcore.ops._noise import drawn_for, noised

__all__ = [
    "gaussian_nll",
    "normal_kl",
    "reparameterize",
    "reparameterize_kl",
    "standard_normal_kl",
]


def reduced(term: Term, inputs: tuple[Tensor, ...], reduction: str) -> Tensor:
    """The terms, or their sum as `reduction` asks."""
    if reduction == "none":
        return run(term.elementwise, inputs)
    if reduction == "sample":
        return run(term.sum, inputs, (1.0,))
    if reduction == "sum":
        return run(term.sum, inputs, (1.0,), None, True)
    messages.choice("reduction", reduction, messages.REDUCTIONS)
    if not isinstance(inputs[0], Tensor):
        messages.refuse_non_tensor(term.sum.inputs, inputs)
    n = inputs[0].numel() if reduction == "mean" else (inputs[0].shape[0] if inputs[0].ndim else 1)
    return run(term.sum, inputs, (1.0 / n if n else float("nan"),), None, True)


def normal_kl(
    mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor, *, reduction: str = "none"
) -> Tensor:
    """KL(N1 || N2) of diagonal Gaussians, in nats.

    ``½ [ expm1(d) - d + (mean1 - mean2)² exp(-logvar2) ]`` with d = logvar1 - logvar2: the
    textbook formula without its cancellation (which goes negative in bfloat16), by its series
    where d is small.

    Args:
        mean1: `[B, ...]`.
        logvar1: log-variance `[B, ...]`.
        mean2: `[B, ...]`.
        logvar2: log-variance `[B, ...]`.
        reduction: "none" (elementwise), "sample" (sum over each sample, `[B]`), "batchmean" (sum
            / B), "mean" (over every element) or "sum". Sums of 16-bit inputs come in float32.

    Returns:
        `[B, ...]`, `[B]` or a 0-dim tensor, nats.

    Source: Kullback & Leibler 1951; the stable form as in Kingma et al. 2021 (VDM).
    """
    return reduced(k.NORMAL_KL, (mean1, logvar1, mean2, logvar2), reduction)


def standard_normal_kl(mean: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """KL(N(mean, e^logvar) || N(0, I)), in nats: ``½ [ mean² + expm1(logvar) - logvar ]``.

    Args:
        mean: `[B, ...]`.
        logvar: log-variance `[B, ...]`.
        reduction: as in :func:`normal_kl`.

    Returns:
        `[B, ...]`, `[B]` or a 0-dim tensor, nats.

    Source: Kingma & Welling 2014, appendix B.
    """
    return reduced(k.STANDARD_NORMAL_KL, (mean, logvar), reduction)


def gaussian_nll(x: Tensor, mean: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """``-log N(x; mean, e^logvar) = ½ [ log 2π + logvar + (x - mean)² exp(-logvar) ]``, in nats.

    Args:
        x: where the density is wanted `[B, ...]`.
        mean: `[B, ...]`.
        logvar: log-variance `[B, ...]`.
        reduction: as in :func:`normal_kl`.

    Returns:
        `[B, ...]`, `[B]` or a 0-dim tensor, nats.
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
        mean: `[B, ...]`.
        logvar: log-variance `[B, ...]`.
        noise: standard normal noise `[B, ...]`, or a recipe for it, drawn in the kernel and drawn
            again in the backward; None for a recipe seeded by torch's generator.
        generator: the generator that seeds it, instead of the default one.

    Returns:
        `z` `[B, ...]`.

    Source: Kingma & Welling 2014, section 2.4.
    """
    source = drawn_for(mean, "mean", noise, generator)
    z: Tensor = noised(k.REPARAMETERIZE, (mean, logvar), source)
    return z


def reparameterize_kl(
    mean: Tensor,
    logvar: Tensor,
    noise: Noise | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A reparameterised sample and its KL term of the ELBO, in one pass over `mean` and `logvar`.

    ``z = mean + exp(logvar / 2) noise`` and, per sample, ``½ Σ [ mean² + expm1(logvar) - logvar
    ]``.

    Args:
        mean: `[B, ...]`.
        logvar: log-variance `[B, ...]`.
        noise: standard normal noise `[B, ...]`, or a recipe for it, drawn in the kernel and drawn
            again in the backward; None for a recipe seeded by torch's generator.
        generator: the generator that seeds it, instead of the default one.

    Returns:
        `z` `[B, ...]` and the KL of each sample to the standard normal, `[B]`, nats (float32 for
        16-bit inputs).

    Source: Kingma & Welling 2014, section 2.4 and appendix B.
    """
    source = drawn_for(mean, "mean", noise, generator)
    z, kl = noised(k.REPARAMETERIZE_KL, (mean, logvar), source)
    return z, kl
