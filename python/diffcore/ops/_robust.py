"""The losses of an error that are linear where it is large: what a call says of them, checked."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffcore._checks import check_choice, check_dense, check_memory
from diffcore._engine import messages
from diffcore._engine.dispatch import plain_eager
from diffcore._engine.dtensor import shard_of
from diffcore._engine.kernel import Kernel
from diffcore._kernels.loss import expected_gradient
from diffcore._types import Coef, Step, Tensors
from diffcore.ops._arguments import as_coef, as_step, run_converted
from diffcore.ops._masks import coefs_beside, expanded, in_one_dtype
from diffcore.reference.loss import robust_terms

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
LOSSES = ("mse", "pseudo_huber", "smooth_l1")

Robust: TypeAlias = tuple[Coef, float]
"""delta as the kernel takes it; 1 for smooth L1, 0 for pseudo-Huber."""

Numbers: TypeAlias = tuple[Coef, Coef, tuple[Coef, ...], Step]
"""Weight, what the sum is multiplied with, the target's a and b if it has them, the step."""


def robust_of(loss: Any, delta: Any, t: Step) -> Robust:
    """The coefficients of a loss other than "mse".

    Args:
        loss: See ``ops.denoising_loss``.
        delta: See ``ops.denoising_loss``.
        t: The step, where delta is a table.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An unknown loss; delta beside "mse", not given, or not positive.
    """
    check_choice("loss", loss, LOSSES)
    if loss == "mse":
        raise ValueError("delta must be left out with loss='mse', got one")
    if delta is None:
        raise ValueError(f"delta must be given with loss={loss!r}, got None")
    found = as_coef("delta", delta, t)
    check_delta(found)
    return found, float(loss == "smooth_l1")


def check_delta(delta: Coef) -> None:
    """Refuses what is not positive and in the range of float32, where its reciprocal is needed.

    Tensors are read on the CPU in a plain eager call.
    """
    if not isinstance(delta, Tensor):
        low = high = delta
    elif delta.device.type != "cpu" or not plain_eager():
        return
    else:
        check_dense("delta", delta)
        check_memory("delta", delta)
        shard = shard_of(delta)
        if not shard.numel():
            return
        low, high = (end.item() for end in shard.detach().aminmax())
    if not (low >= _SMALLEST and high <= _LARGEST):
        came = low if not low >= _SMALLEST else high
        raise ValueError(f"delta must be positive and in the range of float32, got {came}")


def robust_loss(
    kernel: Kernel,
    tensors: tuple[Any, ...],
    numbers: Numbers,
    robust: Robust,
    mask: Tensor | None,
    each: bool,
    summed: bool,
) -> Tensor:
    """The loss of each sample: one kernel, with its gradient; with a mask in plain torch.

    Args:
        kernel: ``ROBUST_LOSS`` under the names of the call.
        tensors: The prediction and its target, or the prediction, x_0 and the noise.
        numbers: See ``Numbers``.
        robust: See ``Robust``.
        mask: Checked, or ``None``.
        each: Whether to return the loss of each element instead, from plain torch.
        summed: Whether the batch will be added rather than averaged.
    """
    weight, share, target, step = numbers
    if len(tensors) == 2:  # 0 target + 1 target, which is in the cache
        tensors, target = (*tensors, tensors[1]), (0.0, 1.0)
    if mask is None and not each:
        slope = expected_gradient(tensors[0], summed) * share
        coefs = (weight, share, *target, *robust, slope)
        return run_converted(kernel, tensors, coefs, step)[1]
    inputs: Tensors = in_one_dtype(kernel.inputs, tensors)
    m = inputs[0]
    step = step if step is None or isinstance(step, Tensor) else as_step(step, m.device)
    coefs = (weight, share, *target, *robust, 0.0)
    messages.explain(messages.Arguments(kernel, inputs, coefs, step))
    w, by, a, b, delta, smooth, _ = coefs_beside(coefs, step, m)
    q = None if mask is None else expanded(mask, m)
    return robust_terms(inputs, w, (a, b), q, (delta, bool(smooth)), None if each else by)
