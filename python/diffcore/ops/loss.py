"""Denoising losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore._checks import check_choice, check_dense
from diffcore._engine import messages
from diffcore._kernels import loss as k
from diffcore._types import Coef, Step
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.noise import Noise, PhiloxNoise
from diffcore.ops._arguments import as_coef, negated
from diffcore.ops._groups import in_groups
from diffcore.ops._noise import promoted, run_noisy

__all__ = [
    "denoising_loss",
]


_COMMON = ("weight", "inverse_n")
_NOISE_LOSS = k.TARGET_LOSS.renamed(("model_output", "noise"), _COMMON)
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
    weight: Coef | None = None,
    t: Step = None,
    group_dim: int | None = None,
    reduction: str = "sample",
) -> Tensor:
    """The weighted squared error, per sample: ``weight · mean_i (m_i - target_i)²``.

    The target is noise ("epsilon"), x_0 ("sample"), alpha noise - sigma x_0 ("v_prediction") or
    noise - x_0 ("flow_prediction"). The target is never written to memory; neither is the noise of
    a key, which the kernel generates again. Where ``model_output`` needs a gradient, the same pass
    computes it for the mean over the batch, and the backward pass rescales it for any other
    function of the losses.

    Args:
        model_output: m, ``[B, ...]``.
        x0: Clean samples ``[B, ...]``.
        noise: The noise that was added ``[B, ...]``, or its noise key.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        alpha: Signal coefficient, for "v_prediction" only. A number, 0-dim, ``[B]``, or a table
            ``[T]`` with ``t``.
        sigma: Noise coefficient, for "v_prediction" only. A number, 0-dim, ``[B]``, or a table
            ``[T]`` with ``t``.
        weight: Weight of each sample; ``None`` for 1. A number, 0-dim, ``[B]``, or a table ``[T]``
            with ``t``.
        t: The step at which the tables are read: an int, ``[B]`` or a one-element counter.
        group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
            frames of ``[B, C, F, H, W]``: alpha, sigma, weight and t may then be ``[B, G]``.
        reduction: "sample" for the loss of each sample, or, with ``group_dim``, "group" for that of
            each group.

    Returns:
        The loss of each sample, ``[B]``, or of each group, ``[B, G]`` (float32 for 16-bit inputs).

    Source:
        Ho et al. 2020, eq. 14 and Algorithm 1; weights: Hang et al. 2023.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if group_dim is not None:
        check_choice("reduction", reduction, ("sample", "group"))
        of_groups = _loss_of_groups(
            group_dim,
            {"model_output": model_output, "x0": x0, "noise": noise},
            {"alpha": alpha, "sigma": sigma, "weight": weight, "t": t},
            prediction_type,
        )
        return of_groups if reduction == "group" else of_groups.mean(1)
    if reduction != "sample":
        check_choice("reduction", reduction, ("sample", "group"))
        raise ValueError("group_dim must be given with reduction='group', got None")
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
    step = t if isinstance(w, Tensor) and w.ndim == 2 else None
    if prediction_type == "epsilon":
        _check_unread("x0", x0, model_output)
        return _loss(_NOISE_LOSS, (model_output,), noise, w, inverse_n, (), step)
    if prediction_type == "sample":
        if isinstance(noise, PhiloxNoise):
            batch = model_output.shape[0] if model_output.ndim else 1
            messages.check_noise(noise._parts, batch, model_output)
        else:
            _check_unread("noise", noise, model_output)
        if not isinstance(x0, Tensor):
            raise TypeError(f"x0 must be a torch.Tensor, got {type(x0).__name__}")
        return _loss(_X0_LOSS, (model_output,), x0, w, inverse_n, (), step)
    if prediction_type == "flow_prediction":
        return _loss(
            k.MIXED_TARGET_LOSS, (model_output, x0), noise, w, inverse_n, (-1.0, 1.0), step
        )
    if alpha is None or sigma is None:
        missing = "alpha" if alpha is None else "sigma"
        raise ValueError(f"{missing} must be given with prediction_type='v_prediction', got None")
    a = as_coef("sigma", negated("sigma", sigma), t)
    return _loss(
        _V_LOSS, (model_output, x0), noise, w, inverse_n, (a, as_coef("alpha", alpha, t)), t
    )


def _loss_of_groups(
    group_dim: int, samples: dict[str, Any], levels: dict[str, Any], prediction_type: str
) -> Tensor:
    """The loss of each group, ``[B, G]``: the mean over the runs of the group in memory."""
    rest: dict[str, Any] = {"prediction_type": prediction_type}
    if levels["t"] is not None:  # the others are tables
        levels, rest = {"t": levels.pop("t")}, rest | levels
    of_groups: Tensor = in_groups(denoising_loss, group_dim, samples, levels, mean=True, **rest)
    return of_groups


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
    inverse_n: float,
    target: tuple[Coef, ...],
    step: Step,
) -> Tensor:
    """``last``: the last input of the functor, noise or x_0; ``target``: its coefficients a, b."""
    model_output, others = inputs[0], inputs[1:]
    if isinstance(last, Tensor):
        others = (*others, last)
    coefs = (weight, inverse_n, *target)
    found: Tensor
    needed = torch.is_grad_enabled() and model_output.requires_grad
    if needed and not any(isinstance(x, Tensor) and x.requires_grad for x in others):
        slope = k.expected_gradient(model_output) * inverse_n
        _, found = run_noisy(loss.with_gradient, inputs, last, (*coefs, slope), step)
    else:
        found = run_noisy(loss.plain, inputs, last, coefs, step)
    return found
