"""Denoising losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore._checks import check_choice, check_dense
from diffcore._engine import messages
from diffcore._kernels import loss as k
from diffcore._types import Coef, Step, Tensors
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.noise import Noise, PhiloxNoise
from diffcore.ops._arguments import as_coef, as_step, negated, run_converted
from diffcore.ops._groups import in_groups
from diffcore.ops._masks import (
    MASK_REDUCTIONS,
    checked_mask,
    coefs_beside,
    expanded,
    expanded_mask,
    in_one_dtype,
    noise_like,
    of_groups,
    shares,
    widest,
)
from diffcore.ops._noise import promoted, run_noisy
from diffcore.ops._robust import Numbers, Robust, robust_loss, robust_of
from diffcore.reference.loss import squared_error

__all__ = [
    "denoising_loss",
]

_REDUCTIONS = ("none", "sample", "mean", "sum")

_COMMON = ("weight", "inverse_n")
_NOISE_LOSS = k.TARGET_LOSS.renamed(("model_output", "noise"), _COMMON)
_PAIR = ("target[0]", "target[1]")
_PAIR_LOSS = k.MIXED_TARGET_LOSS.renamed(("model_output", "x0", "noise"), (*_COMMON, *_PAIR))
_X0_LOSS = k.TARGET_LOSS.renamed(("model_output", "x0"), _COMMON)
_V_LOSS = k.MIXED_TARGET_LOSS.renamed(("model_output", "x0", "noise"), (*_COMMON, "sigma", "alpha"))


def denoising_loss(
    model_output: Tensor,
    x0: Tensor,
    noise: Noise,
    *,
    prediction_type: str = "epsilon",
    alpha: Coef | None = None,
    sigma: Coef | None = None,
    target: tuple[Coef, Coef] | None = None,
    weight: Coef | None = None,
    t: Step = None,
    group_dim: int | None = None,
    mask: Tensor | None = None,
    mask_reduction: str = "mask",
    reduction: str = "sample",
    loss: str = "mse",
    delta: Coef | None = None,
) -> Tensor:
    """The weighted squared error, per sample: ``weight · mean_i (m_i - target_i)²``.

    The target is noise ("epsilon"), x_0 ("sample"), alpha noise - sigma x_0 ("v_prediction") or
    noise - x_0 ("flow_prediction"), or with ``target=(a, b)`` any a x_0 + b noise. The target is
    never written to memory; neither is the noise of a key, which the kernel generates again.
    Where ``model_output`` needs a gradient, the same pass computes it for the mean over the batch,
    and the backward pass rescales it for any other function of the losses.

    With a mask q the loss of a sample is ``weight · Σ q_i (m_i - target_i)² / Σ q_i``, or the same
    over the n elements of the sample. A sample of which nothing counts has loss 0 and gradient 0.
    Where q is 0 no other value is used: an infinite or NaN one reaches neither loss nor gradient.
    Noise of a key is written to memory for a mask.

    ``loss`` is another function of each error e = m_i - target_i instead of its square, of which
    large errors count less; its gradient comes from the same pass::

        mse           e²
        pseudo_huber  2 delta (sqrt(e² + delta²) - delta)       e² for |e| << delta
        smooth_l1     e² / (2 delta) where |e| <= delta, else |e| - delta / 2

    The second is "huber" of diffusers' scripts and of sd-scripts (``huber_c`` is delta), computed
    without their cancellation; consistency training's sqrt(e² + c²) - c is its part 1 / (2 delta).
    The third is ``torch.nn.functional.smooth_l1_loss(beta=delta)``. "smooth_l1" of those scripts,
    2 (sqrt(e² + c²) - c), is pseudo_huber with ``weight=1 / delta``, and
    ``torch.nn.functional.huber_loss`` is smooth_l1 with ``weight=delta``. Noise of a key is written
    to memory for these, and with a mask they are computed in plain torch.

    Args:
        model_output: m, ``[B, ...]``.
        x0: Clean samples ``[B, ...]``.
        noise: The noise that was added ``[B, ...]``, or its noise key.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        alpha: Signal coefficient, for "v_prediction" only. A number, 0-dim, ``[B]``, or a table
            ``[T]`` with ``t``.
        sigma: Noise coefficient, for "v_prediction" only. A number, 0-dim, ``[B]``, or a table
            ``[T]`` with ``t``.
        target: (a, b) of the target a x_0 + b noise, instead of ``prediction_type``: (1, -1) for
            x_0 - noise. Each a number, 0-dim, ``[B]``, or a table ``[T]`` with ``t``.
        weight: Weight of each sample; ``None`` for 1. A number, 0-dim, ``[B]``, or a table ``[T]``
            with ``t``.
        t: The step at which the tables are read: an int, ``[B]`` or a one-element counter.
        group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
            frames of ``[B, C, F, H, W]``: alpha, sigma, target, weight and t may then be
            ``[B, G]``.
        mask: q, what counts: broadcast to the shape of m, with values in [0, 1], as in
            :func:`blend_known`.
        mask_reduction: What the sum of a masked sample is divided by: "mask" (the sum of q) or
            "all" (the number of elements n).
        reduction: "none" (``weight q_i (m_i - target_i)²``, ``[B, ...]``, in plain torch), "sample"
            (the loss of each sample, ``[B]``), "mean" or "sum" (that of the batch, 0-dim), or, with
            ``group_dim``, "group" (the loss of each group, ``[B, G]``). "mean"
            weighs samples equally, however much of them counts.
        loss: "mse", "pseudo_huber" or "smooth_l1".
        delta: Error at which the loss becomes linear, positive; required with "pseudo_huber" and
            "smooth_l1". A number, 0-dim, ``[B]``, a table ``[T]`` with ``t``, or ``[B, G]`` with
            ``group_dim``.

    Returns:
        The loss of each sample, ``[B]``, or as ``reduction`` says (float32 for 16-bit inputs; with
        "none" in their dtype).

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An unknown ``prediction_type``, ``mask_reduction``, ``reduction`` or ``loss``; a
            ``prediction_type`` beside ``target``; ``delta`` beside "mse" or not positive; a
            coefficient that is missing; another shape, or a mask as :func:`blend_known` refuses.

    Source:
        Ho et al. 2020, eq. 14 and Algorithm 1; weights: Hang et al. 2023; pseudo-Huber: Song and
        Dhariwal 2024 (arXiv 2310.14189), delta by timestep: Khrapov et al. 2024 (arXiv 2403.16728).
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    kind: str | None = prediction_type
    pair: Any = (sigma, alpha)
    if target is not None:
        kind, pair = None, _pair(target, prediction_type)
    if group_dim is not None or reduction == "group":
        levels = {"alpha": alpha, "sigma": sigma, "weight": weight, "t": t}
        if kind is None:
            levels |= zip(_PAIR, pair, strict=True)
        if delta is not None:
            levels["delta"] = delta
        return _loss_of_groups(
            group_dim,
            {"model_output": model_output, "x0": x0, "noise": noise},
            levels,
            prediction_type,
            (mask, mask_reduction),
            reduction,
            loss,
        )
    if not isinstance(model_output, Tensor):
        raise TypeError(f"model_output must be a torch.Tensor, got {type(model_output).__name__}")
    # Beside a tensor of noise the call path promotes what the kernel reads.
    by_key = isinstance(noise, PhiloxNoise) and isinstance(x0, Tensor)
    if by_key and x0.dtype is not model_output.dtype:
        model_output, x0, noise = promoted(model_output, x0, noise)
    try:
        inverse_n = 1.0 / max(model_output.shape[1:].numel() if model_output.ndim else 1, 1)
    except RuntimeError:  # a nested tensor has no shape
        check_dense("model_output", model_output)
        raise
    w = 1.0 if weight is None else as_coef("weight", weight, t)
    kernels, inputs, last, mixed = _form(model_output, x0, noise, kind, pair, t)
    by_step = kind in (None, "v_prediction") or (isinstance(w, Tensor) and w.ndim == 2)
    step = t if by_step else None
    robust = None
    if loss != "mse" or delta is not None:
        robust = robust_of(loss, delta, t)
        step = t if isinstance(robust[0], Tensor) and robust[0].ndim == 2 else step
    elif mask is None and reduction == "sample" and mask_reduction == "mask":
        return _loss(kernels, inputs, last, w, inverse_n, mixed, step)
    check_choice("mask_reduction", mask_reduction, MASK_REDUCTIONS)
    check_choice("reduction", reduction, _REDUCTIONS)
    share: Coef = inverse_n
    if mask is not None:
        mask = checked_mask(mask, model_output, "model_output").to(widest((*inputs, last)))
        share = shares(mask, model_output) if mask_reduction == "mask" else inverse_n
    return _reduced(kernels, inputs, last, (w, share, mixed, step), mask, reduction, robust)


def _form(
    model_output: Tensor,
    x0: Tensor,
    noise: Noise,
    prediction_type: str | None,
    pair: Any,
    t: Step,
) -> tuple[k.Loss, tuple[Tensor, ...], Noise, tuple[Coef, ...]]:
    """The kernels of a target, what they read, its last (noise or x_0), and its coefficients.

    With prediction_type ``None`` those of the target are ``pair``, otherwise it is (sigma, alpha).
    """
    if prediction_type == "epsilon":
        _check_unread("x0", x0, model_output)
        return _NOISE_LOSS, (model_output,), noise, ()
    if prediction_type == "sample":
        _check_unread_noise(noise, model_output)
        if not isinstance(x0, Tensor):
            raise TypeError(f"x0 must be a torch.Tensor, got {type(x0).__name__}")
        return _X0_LOSS, (model_output,), x0, ()
    inputs = (model_output, x0)
    if prediction_type == "flow_prediction":
        return k.MIXED_TARGET_LOSS, inputs, noise, (-1.0, 1.0)
    a, b = pair
    if prediction_type is None:
        return _PAIR_LOSS, inputs, noise, (as_coef(_PAIR[0], a, t), as_coef(_PAIR[1], b, t))
    sigma, alpha = a, b
    if alpha is None or sigma is None:
        missing = "alpha" if alpha is None else "sigma"
        raise ValueError(f"{missing} must be given with prediction_type='v_prediction', got None")
    minus_sigma = as_coef("sigma", negated("sigma", sigma), t)
    return _V_LOSS, inputs, noise, (minus_sigma, as_coef("alpha", alpha, t))


def _pair(target: Any, prediction_type: str) -> tuple[Coef, Coef]:
    if prediction_type != "epsilon":
        raise ValueError(
            f"prediction_type must be left out with target, got {prediction_type!r}: each names a "
            "target of its own"
        )
    if not isinstance(target, (tuple, list)) or len(target) != 2:
        came = f"{len(target)} entries" if isinstance(target, (tuple, list)) else None
        kind = ValueError if came else TypeError
        raise kind(f"target must be a pair (a, b), got {came or type(target).__name__}")
    a, b = target
    return a, b


def _of_pair(**arguments: Any) -> Tensor:
    """``denoising_loss`` with a and b as arguments of their own, which groups convert."""
    pair = (arguments.pop(_PAIR[0]), arguments.pop(_PAIR[1]))
    return denoising_loss(target=pair, **arguments)


def _reduced(
    loss: k.Loss,
    inputs: tuple[Tensor, ...],
    last: Noise,
    numbers: Numbers,
    mask: Tensor | None,
    reduction: str,
    robust: Robust | None,
) -> Tensor:
    """The loss with a mask, of another reduction than "sample", or of another error."""
    summed, each = reduction == "sum", reduction == "none"
    if robust is not None:
        read = _read(inputs, last)
        found = robust_loss(loss.robust, read, numbers, robust, mask, each, summed)
    elif each:
        found = _elementwise(loss, inputs, last, numbers, mask)
    elif mask is None:
        found = _loss(loss, inputs, last, *numbers, summed)
    else:
        found = _masked(loss, inputs, last, numbers, summed, mask)
    if reduction == "sample" or each:
        return found
    return found.sum() if summed else found.mean()


def _check_unread_noise(noise: Noise, model_output: Tensor) -> None:
    if isinstance(noise, PhiloxNoise):
        batch = model_output.shape[0] if model_output.ndim else 1
        messages.check_noise(noise._parts, batch, model_output)
    else:
        _check_unread("noise", noise, model_output)


def _loss_of_groups(
    group_dim: int | None,
    samples: dict[str, Any],
    levels: dict[str, Any],
    prediction_type: str,
    counted: tuple[Tensor | None, str],
    reduction: str,
    kind: str,
) -> Tensor:
    """The loss with a level for each group, which is a mean over the runs of it in memory."""
    if group_dim is None:
        raise ValueError("group_dim must be given with reduction='group', got None")
    check_choice("reduction", reduction, (*_REDUCTIONS, "group"))
    check_choice("mask_reduction", counted[1], MASK_REDUCTIONS)
    rest: dict[str, Any] = {"prediction_type": prediction_type, "loss": kind}
    if levels["t"] is not None:  # the others are tables
        levels, rest = {"t": levels.pop("t")}, rest | levels
    mask, model_output = counted[0], samples["model_output"]
    if mask is not None:
        mask = samples["mask"] = expanded_mask(mask, model_output, "model_output")
        rest["mask_reduction"] = "all"
    loss = denoising_loss if _PAIR[0] not in levels | rest else _of_pair
    if reduction == "none":
        elementwise: Tensor = in_groups(loss, group_dim, samples, levels, reduction="none", **rest)
        return elementwise
    found: Tensor = in_groups(loss, group_dim, samples, levels, mean=True, **rest)
    found = of_groups(found, mask if counted[1] == "mask" else None, group_dim, reduction)
    return found.mean() if reduction == "mean" else found.sum() if reduction == "sum" else found


def _check_unread(name: str, x: Tensor, model_output: Tensor) -> None:
    try:
        if isinstance(x, Tensor) and x.shape == model_output.shape:
            return
    except RuntimeError:  # a nested tensor has no shape
        check_dense(name, x)
        raise
    messages.refuse_other(name, x, model_output)


def _loss(
    loss: k.Loss,
    inputs: tuple[Tensor, ...],
    last: Noise,
    weight: Coef,
    inverse_n: Coef,
    target: tuple[Coef, ...],
    step: Step,
    summed: bool = False,
) -> Tensor:
    """``last``: the last input of the functor, noise or x_0; ``target``: its coefficients a, b."""
    model_output, others = inputs[0], inputs[1:]
    if isinstance(last, Tensor):
        others = (*others, last)
    coefs = (weight, inverse_n, *target)
    found: Tensor
    needed = torch.is_grad_enabled() and model_output.requires_grad
    if needed and not any(isinstance(x, Tensor) and x.requires_grad for x in others):
        slope = k.expected_gradient(model_output, summed) * inverse_n
        _, found = run_noisy(loss.with_gradient, inputs, last, (*coefs, slope), step)
    else:
        found = run_noisy(loss.plain, inputs, last, coefs, step)
    return found


def _masked(
    loss: k.Loss,
    inputs: tuple[Tensor, ...],
    last: Noise,
    numbers: Numbers,
    summed: bool,
    mask: Tensor,
) -> Tensor:
    """As ``_loss``, with a mask."""
    weight, share, target, step = numbers
    model_output, *others = in_one_dtype(loss.plain.reading.inputs, _read(inputs, last))
    if len(others) == 1:  # the target itself, which counts once: 0 x + 1 x
        others, target = others * 2, (0.0, 1.0)
    slope = k.expected_gradient(model_output, summed) * share
    tensors = (model_output, *others, expanded(mask, model_output))
    return run_converted(loss.masked, tensors, (weight, share, *target, slope), step)[1]


def _elementwise(
    loss: k.Loss,
    inputs: tuple[Tensor, ...],
    last: Noise,
    numbers: Numbers,
    mask: Tensor | None,
) -> Tensor:
    """The weighted squares, in plain torch."""
    weight, _, target, step = numbers
    kernel = loss.plain.reading
    tensors = in_one_dtype(kernel.inputs, _read(inputs, last))
    model_output = tensors[0]
    step = step if step is None or isinstance(step, Tensor) else as_step(step, model_output.device)
    coefs = (weight, 1.0, *target)
    messages.explain(messages.Arguments(kernel, tensors, coefs, step))
    w, _, *ab = coefs_beside(coefs, step, model_output)
    q = None if mask is None else expanded(mask, model_output)
    return squared_error(tensors, w, ab, q)


def _read(inputs: Tensors, last: Noise) -> tuple[Any, ...]:
    """The tensors of a loss, a key's noise written out."""
    if isinstance(last, PhiloxNoise):
        beside = "x0" if len(inputs) > 1 else "model_output"
        last = noise_like("noise", last, beside, inputs[-1])
    return (*inputs, last)
