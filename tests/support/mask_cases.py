"""The cases of masks: the ops with a mask that follows from the shape, as the others have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcore import ops
from support import formulas
from support.op_case import NOISE_TABLE, OpCase, ramp, steps_of


def mask_like(x: Any) -> Tensor:
    """A mask of 0, 1, and halves for all samples; of four elements 2 count."""
    try:
        shape, device = x.shape, x.device
    except (AttributeError, RuntimeError):  # for the tests of bad input
        return torch.ones(())
    k = torch.arange(shape[1:].numel(), device=device) % 4
    mask = (k == 1) + 0.5 * (k % 3 == 0)
    return mask.reshape((1, *shape[1:]) if shape else ())


def _mask(xp: Any, x: Any) -> Any:
    if xp is torch:
        return mask_like(x).to(x.dtype)
    return mask_like(torch.empty(x.shape)).numpy().astype(np.longdouble)


def blend_known(x: Any, *args: Any, **options: Any) -> Tensor:
    return ops.blend_known(x, mask_like(x), *args, **options)


def _blended(xp: Any, x: Any, **rest: Any) -> Any:
    return formulas.blend_known(xp, x, _mask(xp, x), **rest)


def masked_denoising_loss(model_output: Any, *args: Any, **options: Any) -> Tensor:
    return ops.denoising_loss(model_output, *args, mask=mask_like(model_output), **options)


def _masked_loss(xp: Any, model_output: Any, *, mask_reduction: str, **rest: Any) -> Any:
    q = _mask(xp, model_output)
    return formulas.denoising_loss(xp, model_output, **rest, mask=q, mask_reduction=mask_reduction)


def _levels(batch: int) -> dict[str, Tensor]:
    alpha, sigma = NOISE_TABLE[steps_of(batch)].unbind(1)
    return {"alpha": alpha.clone(), "sigma": sigma.clone()}


def _loss(kind: str, reduction: str, options: Any) -> OpCase:
    return OpCase(
        f"masked_denoising_loss_{kind}",
        masked_denoising_loss,
        ("model_output", "x0", "noise"),
        _masked_loss,
        lambda b: {"prediction_type": kind, "mask_reduction": reduction, **options(b)},
        ("model_output",),
        backward_elements=1,
    )


_BLENDED = ("x", "known", "known_noise")

MASK_CASES: list[OpCase] = [
    OpCase(
        "blend_known",
        blend_known,
        _BLENDED,
        _blended,
        lambda b: {"alpha": 0.8, "sigma": 0.6},
        _BLENDED,
        out=True,
    ),
    OpCase("blend_known_per_sample", blend_known, _BLENDED, _blended, _levels, _BLENDED, out=True),
    _loss("v_prediction", "mask", lambda b: {**_levels(b), "weight": ramp(0.5, 2, b).float()}),
    _loss("epsilon", "all", lambda b: {"weight": 1.5}),
]
