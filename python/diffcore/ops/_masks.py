"""Masks as users pass them: their checks, their shapes, and the blend that reads one."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import check_dense, check_memory
from diffcore._devices import wide_dtype
from diffcore._engine import messages
from diffcore._engine.dispatch import plain_eager
from diffcore._engine.dtensor import all_of, is_dtensor, per_sample, replicated, shard_of
from diffcore._engine.execute import expand_coefs
from diffcore._kernels import linear as k
from diffcore._types import Coef, Coefs, Step, Tensors
from diffcore.noise import Noise, PhiloxNoise, draw
from diffcore.ops._arguments import as_coef, run_converted
from diffcore.ops._groups import in_groups

MASK_REDUCTIONS = ("mask", "all")

_INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = (torch.bool, *_INTS, *messages.DTYPES)


def blend(
    x: Tensor,
    mask: Any,
    known: Tensor,
    known_noise: Any,
    alpha: Coef,
    sigma: Coef,
    t: Step = None,
    out: Tensor | None = None,
) -> Tensor:
    """``ops.blend_known``, which describes the arguments."""
    q = expanded_mask(mask, x, "x")
    z = noise_like("known_noise", known_noise, "known", known)
    coefs = (as_coef("alpha", alpha, t), as_coef("sigma", sigma, t))
    return blended(x, q, known, z, coefs, t, out)


def blended(
    x: Tensor,
    mask: Tensor,
    known: Tensor,
    noise: Tensor,
    coefs: Coefs,
    t: Step = None,
    out: Tensor | None = None,
) -> Tensor:
    """The kernel: all tensors in the shape of x; alpha and sigma."""
    return run_converted(k.BLEND, (x, mask, known, noise), coefs, t, out)


def step_blended(
    x: Tensor,
    mask: Tensor | None,
    known: Tensor | None,
    known_noise: Noise | None,
    alpha: Coef,
    sigma: Coef,
    t: Step = None,
) -> Tensor:
    """What a step returns with a known part: its x', which is overwritten where possible.

    Args:
        x: x' of the step, of which nothing else has a reference.
        mask: See ``ops.blend_known``.
        known: The known samples.
        known_noise: Their noise.
        alpha: Signal coefficient of x'.
        sigma: Noise coefficient of x'.
        t: The row, where these are tables.

    Returns:
        ``[B, ...]``.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Only some of the three are given.
    """
    check_together(mask, known, known_noise)
    assert mask is not None
    assert known is not None
    assert known_noise is not None
    check_dtype_of("known", known, x)
    check_dtype_of("known_noise", known_noise, x)
    tensors = (x, known, known_noise, alpha, sigma)
    out = None
    if type(x) is Tensor and plain_eager():
        grads = any(isinstance(y, Tensor) and y.requires_grad for y in tensors)
        out = None if grads and torch.is_grad_enabled() else x
    return blend(x, mask, known, known_noise, alpha, sigma, t, out)


def blended_in_groups(
    x: Tensor,
    mask: Tensor | None,
    known: Tensor | None,
    known_noise: Noise | None,
    level: tuple[Coef, Coef],
    t: Step,
    group_dim: int,
) -> Tensor:
    """``step_blended`` with a level for each group."""
    check_together(mask, known, known_noise)
    samples = {
        "x": x,
        "mask": expanded_mask(mask, x, "x"),
        "known": known,
        "known_noise": known_noise,
    }
    alpha, sigma = level
    found: Tensor = in_groups(step_blended, group_dim, samples, {"t": t}, alpha=alpha, sigma=sigma)
    return found


def check_together(mask: Any, known: Any, known_noise: Any) -> None:
    """Refuses a mask without known samples and noise, and these without a mask."""
    given = {"mask": mask, "known": known, "known_noise": known_noise}
    there = [name for name, value in given.items() if value is not None]
    missing = next((name for name, value in given.items() if value is None), None)
    if there and missing is not None:
        raise ValueError(f"{missing} must be given with {there[0]}, got None")


def check_dtype_of(name: str, value: Any, x: Tensor) -> None:
    """Refuses a tensor of another dtype than the samples, which would change theirs."""
    if isinstance(value, Tensor) and value.dtype != x.dtype:
        raise TypeError(
            f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}; pass "
            f"{name}.to(x.dtype)"
        )


def expanded_mask(mask: Any, like: Any, beside: str) -> Tensor:
    """A mask in the shape and dtype of samples, checked.

    Args:
        mask: See ``ops.blend_known``.
        like: The samples.
        beside: Their name.
    """
    return expanded(checked_mask(mask, like, beside), like)


def expanded(mask: Tensor, like: Tensor) -> Tensor:
    """A checked mask in the shape and dtype of samples.

    A mask of all samples is stored for one of them, which kernels read for each.
    """
    dtype, shape = like.dtype, like.shape
    q = mask if mask.dtype is dtype else mask.to(dtype)
    q = replicated(q, like)
    if q.shape == shape:
        return q
    if type(q) is not Tensor or type(like) is not Tensor or not len(like) or not plain_eager():
        return q.expand(shape)
    of_all = q.ndim < like.ndim or q.shape[0] == 1
    # In the memory order of the samples.
    return torch.empty_like(like[:1] if of_all else like).copy_(q).expand(shape)


def checked_mask(mask: Any, like: Any, beside: str) -> Tensor:
    """The mask as it came, which can be expanded to the samples."""
    if not isinstance(like, Tensor):
        raise TypeError(f"{beside} must be a torch.Tensor, got {type(like).__name__}")
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    messages.check_tensor(beside, like)
    check_dense("mask", mask)
    if mask.dtype not in _DTYPES:
        raise TypeError(
            "mask must have dtype bool, uint8, int8, int16, int32, int64, float32, float64, "
            f"bfloat16 or float16, got {mask.dtype}"
        )
    check_memory("mask", mask)
    if mask.requires_grad:
        raise ValueError(
            "mask must not require grad, got a tensor that does: it selects, and has no gradient; "
            "pass mask.detach()"
        )
    if mask.device != like.device:
        raise ValueError(f"mask must be on {like.device}, as the samples, got {mask.device}")
    theirs, ours = tuple(like.shape), tuple(mask.shape)
    fits = len(ours) <= len(theirs) and all(
        n in (1, size) for n, size in zip(reversed(ours), reversed(theirs), strict=False)
    )
    if not fits:
        fix = "; a mask of each sample has the shape [B, 1, ...]" if len(ours) > 1 else ""
        raise ValueError(f"mask must broadcast to the shape of {beside}, {theirs}, got {ours}{fix}")
    check_mask_values(mask)
    return mask


def check_mask_values(mask: Tensor) -> None:
    """Refuses values outside [0, 1] of a mask on the CPU, in a plain eager call."""
    if mask.dtype == torch.bool or mask.device.type != "cpu" or not plain_eager():
        return
    mask = shard_of(mask)
    if not mask.numel():
        return
    low, high = (end.item() for end in mask.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"mask must have values in [0, 1], got values from {low} to {high}")


def noise_like(name: str, noise: Any, beside: str, like: Any) -> Tensor:
    """Noise as a tensor; that of a key in the shape and dtype of ``like``, which is ``beside``."""
    if isinstance(noise, PhiloxNoise):
        if not isinstance(like, Tensor):
            raise TypeError(f"{beside} must be a torch.Tensor, got {type(like).__name__}")
        messages.check_tensor(beside, like)
        return draw(noise, torch.empty_like(like))
    if not isinstance(noise, Tensor):
        kind = type(noise).__name__
        raise TypeError(f"{name} must be a torch.Tensor or a PhiloxNoise, got {kind}")
    return noise


def counts(mask: Tensor, like: Tensor) -> Tensor:
    """The sum of a mask over each sample, float64 ``[B]``; 1 where it is 0.

    Args:
        mask: Checked, in the dtype of the samples.
        like: The samples.

    Returns:
        What divides the sum of masked terms: 0 / 1 where nothing counts.
    """
    q = mask
    if q.ndim < like.ndim:
        q = q.reshape((1,) * (like.ndim - mask.ndim) + tuple(mask.shape))
    if like.ndim > 1:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        total = q.sum(tuple(range(1, q.ndim)), dtype=wide).to(wide_dtype(q.device))
        if q.shape[1:] != like.shape[1:]:  # an axis of size 1 counts for all of the samples' one
            total = total * (like.shape[1:].numel() / max(q.shape[1:].numel(), 1))
    else:
        total = q.to(wide_dtype(q.device))
    total = total.masked_fill(total == 0, 1.0)
    return total if total.shape == like.shape[:1] else total.expand(like.shape[:1])


def shares(mask: Tensor, like: Tensor) -> Coef:
    """1 / ``counts``; a number where all samples have one mask and no device is waited for."""
    of_all = mask.ndim < like.ndim or mask.shape[:1] == (1,)
    plain = type(mask) is Tensor and type(like) is Tensor and mask.device.type == "cpu"
    if not (of_all and plain and like.ndim > 1 and plain_eager()):
        return 1.0 / counts(mask, like)
    total = mask.sum(dtype=torch.promote_types(mask.dtype, torch.float32)).item()
    return 1.0 / (total * (like.shape[1:].numel() / max(mask.numel(), 1)) or 1.0)


def of_groups(means: Tensor, mask: Tensor | None, group_dim: int, reduction: str) -> Tensor:
    """Losses of groups or samples, from the mean of each group over all its elements.

    Args:
        means: ``[B, G]``.
        mask: What counts, like the samples, where losses are divided by its sums; else ``None``.
        group_dim: The dimension of the groups in it.
        reduction: "group" for ``[B, G]``; anything else for ``[B]``.
    """
    by_group = reduction == "group"
    if mask is None:
        return means if by_group else means.mean(1)
    q = mask.movedim(group_dim, 1)
    within = tuple(range(2, q.ndim))
    counted = q.sum(within, dtype=means.dtype) if within else q.to(means.dtype)
    sums = means * q.shape[2:].numel()
    if not by_group:
        counted, sums = counted.sum(1), sums.sum(1)
    return sums / counted.masked_fill(counted == 0, 1.0)


def coefs_beside(coefs: Coefs, step: Step, like: Tensor) -> list[Coef]:
    """Coefficients for formulas in plain torch, which take DTensors beside DTensors only."""
    found = expand_coefs(coefs, all_of(step))
    return [beside(c, like) for c in found] if is_dtensor(like) else found


def beside(coef: Coef, like: Tensor) -> Coef:
    """A number of each sample, or one for all, for plain torch operations with ``like``."""
    if not isinstance(coef, Tensor):
        return coef
    each = coef.ndim == 1 and coef.shape == like.shape[:1]
    return per_sample(coef, like) if each else replicated(coef, like)


def in_one_dtype(names: tuple[str, ...], inputs: tuple[Any, ...]) -> Tensors:
    """Inputs by name in the widest of their dtypes, checked, for formulas in plain torch."""
    if not all(isinstance(x, Tensor) for x in inputs):
        messages.refuse_non_tensor(names, inputs)
    for name, x in zip(names, inputs, strict=True):
        messages.check_tensor(name, x)
    dtype = widest(inputs)
    return tuple([x.to(dtype) for x in inputs])


def widest(inputs: tuple[Any, ...]) -> torch.dtype:
    """The dtype that torch's promotion gives the tensors of kernels' dtypes among these."""
    dtypes = [x.dtype for x in inputs if isinstance(x, Tensor) and x.dtype in messages.DTYPES]
    return functools.reduce(torch.promote_types, dtypes)
